// Runs CUDA kernels on the CPU: one thread per CUDA thread, one block after the other. Include it
// before a kernel. Slow, but the sanitizers then see every access and every race of the kernel.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <pthread.h>
#include <sched.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#undef __global__
#undef __device__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static  // blocks run one after the other

namespace cuda_on_host {

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

class Barrier {
 public:
  explicit Barrier(unsigned count) { pthread_barrier_init(&barrier_, nullptr, count); }
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  Barrier(const Barrier&) = delete;
  Barrier& operator=(const Barrier&) = delete;
  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

constexpr int kMostValues = 64;  // that a warp exchanges at once

struct Warp {
  Barrier barrier{32};
  float value[32][kMostValues];
};

struct Block {
  explicit Block(unsigned threads, size_t shared_bytes = 0)
      : barrier(threads), shared((shared_bytes + 15) / 16 * 4) {
    for (unsigned w = 0; w < threads / 32; ++w) warps.push_back(std::make_unique<Warp>());
  }
  Barrier barrier;
  std::shared_ptr<Barrier> cluster_barrier;  // of all threads of the blocks of its row of the grid
  std::vector<Block*> cluster;
  std::vector<float> shared;  // what the launch sizes
  std::vector<std::unique_ptr<Warp>> warps;
};

inline thread_local Block* block = nullptr;
inline thread_local unsigned thread = 0;

}  // namespace cuda_on_host

inline thread_local cuda_on_host::Index threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() { cuda_on_host::block->barrier.wait(); }

inline float __shfl_xor_sync(unsigned, float value, int mask) {
  cuda_on_host::Warp& warp = *cuda_on_host::block->warps[cuda_on_host::thread / 32];
  const unsigned lane = cuda_on_host::thread % 32;
  warp.value[lane][0] = value;
  warp.barrier.wait();
  const float other = warp.value[lane ^ static_cast<unsigned>(mask)][0];
  warp.barrier.wait();
  return other;
}

#define LMFAST_CUDA_ON_HOST
namespace lmfast::gpu {

// One exchange for all values: the barriers are what takes the time here.
template <int K>
void from_lane_across(const float (&mine)[K], int mask, float (&other)[K]) {
  static_assert(K <= cuda_on_host::kMostValues);
  cuda_on_host::Warp& warp = *cuda_on_host::block->warps[cuda_on_host::thread / 32];
  const unsigned lane = cuda_on_host::thread % 32;
  for (int k = 0; k < K; ++k) warp.value[lane][k] = mine[k];
  warp.barrier.wait();
  for (int k = 0; k < K; ++k) other[k] = warp.value[lane ^ static_cast<unsigned>(mask)][k];
  warp.barrier.wait();
}

inline void* dynamic_shared() { return cuda_on_host::block->shared.data(); }

// mma.sync m16n8k16: a holds rows lane / 4 and 8 more, columns 2 (lane % 4) and 8 more; b columns
// lane / 4; c rows lane / 4 and 8 more, columns 2 (lane % 4).
template <typename T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  cuda_on_host::Warp& warp = *cuda_on_host::block->warps[cuda_on_host::thread / 32];
  const int lane = static_cast<int>(cuda_on_host::thread % 32);
  const uint32_t pairs[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  for (int i = 0; i < 12; ++i) {
    const uint16_t bits = static_cast<uint16_t>(pairs[i / 2] >> (16 * (i % 2)));
    T value;
    std::memcpy(static_cast<void*>(&value), &bits, 2);
    warp.value[lane][i] = static_cast<float>(value);
  }
  warp.barrier.wait();
  for (int r = 0; r < 4; ++r) {
    const int row = lane / 4 + r / 2 * 8, column = lane % 4 * 2 + r % 2;
    for (int k = 0; k < 16; ++k) {
      const int holder_a = row % 8 * 4 + k % 8 / 2, holder_b = column * 4 + k % 8 / 2;
      c[r] += warp.value[holder_a][2 * (row / 8 + k / 8 * 2) + k % 2] *
              warp.value[holder_b][8 + 2 * (k / 8) + k % 2];
    }
  }
  warp.barrier.wait();
}

template <typename T, int N>
struct Pack;
template <typename T, int N>
Pack<T, N> load_past_l1(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}

inline void add_released(unsigned* counter) { __atomic_fetch_add(counter, 1, __ATOMIC_RELEASE); }
inline unsigned load_acquired(const unsigned* counter) {
  return __atomic_load_n(counter, __ATOMIC_ACQUIRE);
}
inline void pause_briefly() { sched_yield(); }

// A cluster is a row of the grid: see launch_together.
inline void sync_cluster() { cuda_on_host::block->cluster_barrier->wait(); }
inline void store_to_rank(void* to, unsigned rank, const uint4& v) {
  cuda_on_host::Block& mine = *cuda_on_host::block;
  const auto at = static_cast<char*>(to) - reinterpret_cast<char*>(mine.shared.data());
  *reinterpret_cast<uint4*>(reinterpret_cast<char*>(mine.cluster.at(rank)->shared.data()) + at) = v;
}

}  // namespace lmfast::gpu

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

namespace cuda_on_host {

// kernel<<<grid, threads>>>(args...); threads.x * threads.y must be a multiple of 32.
template <typename... Parameters, typename... Args>
void launch(void (*kernel)(Parameters...), Index grid, Index threads, Args... args) {
  const unsigned count = threads.x * threads.y;
  Block shared(count);
  std::vector<std::thread> running;
  for (unsigned t = 0; t < count; ++t) {
    running.emplace_back([&, t] {
      block = &shared;
      thread = t;
      threadIdx = {t % threads.x, t / threads.x, 0};
      blockDim = threads;
      gridDim = grid;
      for (unsigned b = 0; b < grid.x * grid.y * grid.z; ++b) {
        blockIdx = {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
        kernel(args...);
        shared.barrier.wait();  // the next block reuses the shared memory
      }
    });
  }
  for (std::thread& t : running) t.join();
}

// The same for kernels whose blocks wait for each other: all of them run at once. No static
// shared memory: they would share it.
template <typename... Parameters, typename... Args>
void launch_together(void (*kernel)(Parameters...), Index grid, Index threads, size_t shared_bytes,
                     Args... args) {
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::thread> running;
  for (unsigned b = 0; b < grid.x * grid.y; ++b) {
    blocks.push_back(std::make_unique<Block>(threads.x, shared_bytes));
  }
  for (unsigned y = 0; y < grid.y; ++y) {
    const auto barrier = std::make_shared<Barrier>(grid.x * threads.x);
    for (unsigned x = 0; x < grid.x; ++x) {
      Block& b = *blocks[y * grid.x + x];
      b.cluster_barrier = barrier;
      for (unsigned i = 0; i < grid.x; ++i) b.cluster.push_back(blocks[y * grid.x + i].get());
    }
  }
  for (unsigned b = 0; b < grid.x * grid.y; ++b) {
    for (unsigned t = 0; t < threads.x; ++t) {
      running.emplace_back([&, b, t] {
        block = blocks[b].get();
        thread = t;
        threadIdx = {t, 0, 0};
        blockDim = threads;
        gridDim = grid;
        blockIdx = {b % grid.x, b / grid.x, 0};
        kernel(args...);
      });
    }
  }
  for (std::thread& t : running) t.join();
}

}  // namespace cuda_on_host
