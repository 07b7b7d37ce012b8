// What the CUDA kernels share: vectors of up to 16 bytes, conversions, sums over a row's threads.
// No torch header.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../../cpu/rows.h"

namespace lmfast::gpu {

using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }
__device__ __forceinline__ float to_float(int8_t x) { return static_cast<float>(x); }

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

#ifndef LMFAST_CUDA_ON_HOST
// What the thread whose lane differs by `mask` holds of each value. All of the warp must call it.
template <int K>
__device__ __forceinline__ void from_lane_across(const float (&mine)[K], int mask,
                                                 float (&other)[K]) {
#pragma unroll
  for (int k = 0; k < K; ++k) other[k] = __shfl_xor_sync(0xffffffffu, mine[k], mask);
}
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
