// What the CUDA kernels share: vectors of up to 16 bytes, conversions, sums over a row's threads.
// No torch header.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../../cpu/rows.h"

namespace lmfast::gpu {

using bf16 = __nv_bfloat16;
using f16 = __half;
using e4m3 = __nv_fp8_e4m3;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }
__device__ __forceinline__ float to_float(int8_t x) { return static_cast<float>(x); }
__device__ __forceinline__ float to_float(e4m3 x) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(x.__x, __NV_E4M3)));
}

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float x) {
  return __float2half_rn(x);
}

// To nearest, halves to even; finite numbers beyond 448 to 448, infinity to NaN.
template <>
__device__ __forceinline__ e4m3 from_float<e4m3>(float x) {
  e4m3 rounded;
  rounded.__x = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
  if (!(fabsf(x) <= 3.4028235e38f)) rounded.__x = 0x7f;
  return rounded;
}

// N elements that are loaded and stored together, in pieces of at most 16 bytes.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T at[N];
};

// Elements of T in 16 bytes.
template <typename T>
constexpr int kFullVector = 16 / sizeof(T);

template <typename T, int N>
__device__ __forceinline__ Pack<T, N> load(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}

// All of its numbers. Eight-bit floats are widened in pairs, for which there is an instruction.
template <typename T, int N>
__device__ __forceinline__ void widen(const Pack<T, N>& v, float (&x)[N]) {
  if constexpr (std::is_same<T, e4m3>::value && N % 2 == 0) {
#pragma unroll
    for (int e = 0; e < N; e += 2) {
      const auto both = static_cast<__nv_fp8x2_storage_t>(v.at[e].__x | v.at[e + 1].__x << 8);
      const float2 two = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(both, __NV_E4M3)));
      x[e] = two.x;
      x[e + 1] = two.y;
    }
  } else {
#pragma unroll
    for (int e = 0; e < N; ++e) x[e] = to_float(v.at[e]);
  }
}

template <typename T, int N>
__device__ __forceinline__ void store(T* p, const Pack<T, N>& v) {
  *reinterpret_cast<Pack<T, N>*>(p) = v;
}

// The element offset of a row in one operand. Contiguous operands have one dimension left, and
// then there is no division.
__device__ __forceinline__ int64_t row_offset(const RowLayout& layout, int operand, int64_t row) {
  int64_t offset = 0;
  for (int d = layout.ndim - 1; d > 0; --d) {
    offset += row % layout.size[d] * layout.stride[operand][d];
    row /= layout.size[d];
  }
  return layout.ndim > 0 ? offset + row * layout.stride[operand][0] : offset;
}

// Two neighbours in one register. Left as two values, the compiler gives each of them a register.
template <typename T>
__device__ __forceinline__ uint32_t pair_of(T low, T high) {
  uint16_t bits[2];
  memcpy(&bits[0], &low, 2);
  memcpy(&bits[1], &high, 2);
  return bits[0] | static_cast<uint32_t>(bits[1]) << 16;
}

#ifndef LMFAST_CUDA_ON_HOST
// What only a GPU has. tests/cuda_on_host has the same for the host.

// What the thread whose lane differs by `mask` holds of each value. All of the warp must call it.
template <int K>
__device__ __forceinline__ void from_lane_across(const float (&mine)[K], int mask,
                                                 float (&other)[K]) {
#pragma unroll
  for (int k = 0; k < K; ++k) other[k] = __shfl_xor_sync(0xffffffffu, mine[k], mask);
}

// The block's shared memory that the launch sized.
__device__ __forceinline__ void* dynamic_shared() {
  extern __shared__ uint4 lmfast_shared[];
  return lmfast_shared;
}

// c (16, 8) += a (16, 16) b (16, 8), of a warp: mma.sync's layout of the fragments, pairs of T.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  if constexpr (std::is_same<T, bf16>::value) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// Loads what other blocks wrote in this launch: from L2, as L1 may hold what was there before.
template <typename T, int N>
__device__ __forceinline__ Pack<T, N> load_past_l1(const T* p) {
  Pack<T, N> v;
  if constexpr (sizeof(T) * N == 16) {
    *reinterpret_cast<uint4*>(&v) = __ldcg(reinterpret_cast<const uint4*>(p));
  } else if constexpr (sizeof(T) * N == 4) {
    *reinterpret_cast<uint32_t*>(&v) = __ldcg(reinterpret_cast<const uint32_t*>(p));
  } else {
    static_assert(sizeof(T) * N == 2);
    *reinterpret_cast<uint16_t*>(&v) = __ldcg(reinterpret_cast<const unsigned short*>(p));
  }
  return v;
}

// Counts one more; what the block wrote before is seen by whoever sees the count.
__device__ __forceinline__ void add_released(unsigned* counter) {
  __threadfence();
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
__device__ __forceinline__ unsigned load_acquired(const unsigned* counter) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}
__device__ __forceinline__ void pause_briefly() { __nanosleep(20); }

// Clusters of blocks, from compute capability 9 on. It is what the code was compiled for that
// counts: a later GPU may run code made for an earlier one. Kernels that use clusters end with an
// error there, and are not launched.
#if __CUDA_ARCH__ >= 900
#define LMFAST_CLUSTERS 1
#endif

// Writes 16 bytes to where `to` is in the shared memory of another block of the cluster.
__device__ __forceinline__ void store_to_rank(void* to, unsigned rank, const uint4& v) {
#ifdef LMFAST_CLUSTERS
  asm volatile(
      "{ .reg .b32 at; mapa.shared::cluster.u32 at, %0, %1;\n"
      "st.shared::cluster.v4.u32 [at], {%2, %3, %4, %5}; }" ::"r"(
          static_cast<uint32_t>(__cvta_generic_to_shared(to))),
      "r"(rank), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
      : "memory");
#endif
}

// Every thread of the cluster has got here, and sees what the others wrote before.
__device__ __forceinline__ void sync_cluster() {
#ifdef LMFAST_CLUSTERS
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
#else
#define LMFAST_CLUSTERS 1
#endif

// Sums over groups of `lanes` neighbouring threads, in every one of them; a power of two, up to 32.
template <int K>
__device__ __forceinline__ void sum_over_lanes(float (&value)[K], int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) {
    float other[K];
    from_lane_across(value, step, other);
#pragma unroll
    for (int k = 0; k < K; ++k) value[k] += other[k];
  }
}

// The sum over the threads of a row, in every one of them: threadIdx.x counts them. Up to a warp,
// blockDim.x is a power of two and a block may hold several rows; above, it is a multiple of 32 and
// a block holds one. Every thread of the block must call it.
__device__ __forceinline__ float sum_over_row(float value) {
  constexpr unsigned kAll = 0xffffffffu;
  const int lanes = blockDim.x < 32 ? blockDim.x : 32;
  for (int step = lanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAll, value, step);
  if (blockDim.x <= 32) return value;
  __shared__ float of_warp[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  __syncthreads();  // of_warp may still be read from the call before
  if (lane == 0) of_warp[warp] = value;
  __syncthreads();
  value = lane < warps ? of_warp[lane] : 0.0f;
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAll, value, step);
  return value;
}

}  // namespace lmfast::gpu
