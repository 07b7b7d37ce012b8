// Runs CUDA kernels on the CPU: one thread per CUDA thread, one block after the other. Include it
// before a kernel. Slow, but the sanitizers then see every access and every race of the kernel.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <pthread.h>

#include <cmath>
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
  explicit Block(unsigned threads) : barrier(threads) {
    for (unsigned w = 0; w < threads / 32; ++w) warps.push_back(std::make_unique<Warp>());
  }
  Barrier barrier;
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
      for (unsigned b = 0; b < grid.x * grid.y; ++b) {
        blockIdx = {b % grid.x, b / grid.x, 0};
        kernel(args...);
        shared.barrier.wait();  // the next block reuses the shared memory
      }
    });
  }
  for (std::thread& t : running) t.join();
}

}  // namespace cuda_on_host
