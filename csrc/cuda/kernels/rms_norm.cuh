// RMSNorm and add + RMSNorm on an NVIDIA GPU, forward and backward.
//
// Floor: bytes, as for the Triton kernels; these exist for calls so small that launching is the
// time (a Triton launch spends its time in Python, these in one C++ function) and need no compiler
// at run time. A thread keeps kKept vectors of its row in registers, so up to 4 x 1024 threads x
// 16 bytes a row is read once; what lies beyond is read again from the cache. Short rows share a
// block, down to 8 threads a row.
//
// Weight gradients: a fixed number of blocks walk the rows in a fixed order, each leaves a partial
// row, and a second kernel adds the partial rows in order: no atomics, the same bits every run.
#pragma once

#include "device.cuh"

namespace lmfast::gpu {

constexpr int kKept = 4;          // vectors of a row a thread keeps in registers
constexpr int kRowThreads = 128;  // threads of a block whose rows fit a warp
constexpr int kMaxFwdThreads = 1024;
// Backward keeps x, dy and the running weight gradient: with 512 threads, hence 128 registers, bf16
// rows with an fp32 weight spill 56 bytes per thread.
constexpr int kMaxBwdThreads = 384;

struct BlockShape {
  int threads_per_row, rows;
};

// For rows of `vectors` vectors, with at most `most` threads.
inline BlockShape rms_norm_block(int vectors, int most) {
  const int wanted = (vectors + kKept - 1) / kKept;
  if (wanted > 32) {
    const int warps = (wanted + 31) / 32;
    return {warps * 32 < most ? warps * 32 : most, 1};
  }
  int lanes = 8;
  while (lanes < wanted) lanes *= 2;
  return {lanes, kRowThreads / lanes};
}

struct RmsNormFwd {
  RowLayout rows;  // operands: x, y, residual, sum
  int width;
  float eps;
  const void* x;
  const void* residual;  // null: plain rms_norm
  const void* weight;    // null: all ones
  void* y;
  void* sum;
};

struct RmsNormBwd {
  RowLayout rows;  // operands: x, dy, dx, dsum
  int width;
  float eps;
  const void* x;
  const void* dy;
  const void* weight;
  const void* dsum;
  void* dx;
  float* partial;  // (gridDim.x, width) or null
};

// x, or x + residual rounded to T.
template <typename T, int N>
__device__ __forceinline__ Pack<T, N> load_sum(const T* x, const T* residual, int at) {
  Pack<T, N> h = load<T, N>(x + at);
  if (residual == nullptr) return h;
  const Pack<T, N> r = load<T, N>(residual + at);
#pragma unroll
  for (int e = 0; e < N; ++e) h.at[e] = from_float<T>(to_float(h.at[e]) + to_float(r.at[e]));
  return h;
}

template <typename T, int N>
__device__ __forceinline__ float squares(const Pack<T, N>& h) {
  float total = 0.0f;
#pragma unroll
  for (int e = 0; e < N; ++e) total += to_float(h.at[e]) * to_float(h.at[e]);
  return total;
}

template <typename T, typename W, int N>
__device__ __forceinline__ void store_norm(T* y, const W* weight, int at, const Pack<T, N>& h,
                                           float scale) {
  Pack<T, N> out;
  if (weight != nullptr) {
    const Pack<W, N> w = load<W, N>(weight + at);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      out.at[e] = from_float<T>(to_float(h.at[e]) * scale * to_float(w.at[e]));
    }
  } else {
#pragma unroll
    for (int e = 0; e < N; ++e) out.at[e] = from_float<T>(to_float(h.at[e]) * scale);
  }
  store<T, N>(y + at, out);
}

// blockDim = (threads per row, rows per block); N elements per vector; width % N == 0.
template <typename T, typename W, int N>
__global__ void __launch_bounds__(kMaxFwdThreads)
    rms_norm_fwd_kernel(const __grid_constant__ RmsNormFwd p) {
  const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  const bool active = row < p.rows.count;
  const int64_t r = active ? row : 0;
  const T* x = static_cast<const T*>(p.x) + row_offset(p.rows, 0, r);
  T* y = static_cast<T*>(p.y) + row_offset(p.rows, 1, r);
  const W* weight = static_cast<const W*>(p.weight);
  const T* residual = nullptr;
  T* sum = nullptr;
  if (p.residual != nullptr) {
    residual = static_cast<const T*>(p.residual) + row_offset(p.rows, 2, r);
    sum = static_cast<T*>(p.sum) + row_offset(p.rows, 3, r);
  }
  const int step = blockDim.x * N;
  const int first = threadIdx.x * N, beyond = first + kKept * step;
  const int end = active ? p.width : 0;

  Pack<T, N> kept[kKept];
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int at = first + i * step;
    if (at >= end) continue;
    kept[i] = load_sum<T, N>(x, residual, at);
    if (sum != nullptr) store<T, N>(sum + at, kept[i]);
    total += squares(kept[i]);
  }
  for (int at = beyond; at < end; at += step) {
    const Pack<T, N> h = load_sum<T, N>(x, residual, at);
    if (sum != nullptr) store<T, N>(sum + at, h);
    total += squares(h);
  }
  const float scale = rsqrtf(sum_over_row(total) / p.width + p.eps);
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int at = first + i * step;
    if (at < end) store_norm<T, W, N>(y, weight, at, kept[i], scale);
  }
  for (int at = beyond; at < end; at += step) {
    const Pack<T, N> h = sum != nullptr ? load<T, N>(sum + at) : load<T, N>(x + at);
    store_norm<T, W, N>(y, weight, at, h, scale);
  }
}

// dy times weight.
template <typename T, typename W, int N>
__device__ __forceinline__ void weighted(const Pack<T, N>& dy, const W* weight, int at,
                                         float (&out)[N]) {
#pragma unroll
  for (int e = 0; e < N; ++e) out[e] = to_float(dy.at[e]);
  if (weight == nullptr) return;
  const Pack<W, N> w = load<W, N>(weight + at);
#pragma unroll
  for (int e = 0; e < N; ++e) out[e] *= to_float(w.at[e]);
}

template <typename T, typename W, int N>
__device__ __forceinline__ void store_dx(T* dx, const T* dsum, const W* weight, int at,
                                         const Pack<T, N>& x, const Pack<T, N>& dy, float scale,
                                         float slope) {
  float g[N];
  weighted<T, W, N>(dy, weight, at, g);
  Pack<T, N> out;
  if (dsum != nullptr) {
    const Pack<T, N> s = load<T, N>(dsum + at);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      g[e] = scale * (g[e] - to_float(x.at[e]) * scale * slope) + to_float(s.at[e]);
    }
  } else {
#pragma unroll
    for (int e = 0; e < N; ++e) g[e] = scale * (g[e] - to_float(x.at[e]) * scale * slope);
  }
#pragma unroll
  for (int e = 0; e < N; ++e) out.at[e] = from_float<T>(g[e]);
  store<T, N>(dx + at, out);
}

// Layout as forward. Every block walks rows blockIdx.x, blockIdx.x + gridDim.x, ...
template <typename T, typename W, int N>
__global__ void __launch_bounds__(kMaxBwdThreads)
    rms_norm_bwd_kernel(const __grid_constant__ RmsNormBwd p) {
  const W* weight = static_cast<const W*>(p.weight);
  const int step = blockDim.x * N;
  const int first = threadIdx.x * N, beyond = first + kKept * step;
  float* partial = p.partial != nullptr ? p.partial + int64_t{blockIdx.x} * p.width : nullptr;
  float dweight[kKept][N] = {};

  const int64_t stride = int64_t{gridDim.x} * blockDim.y;
  for (int64_t base = int64_t{blockIdx.x} * blockDim.y; base < p.rows.count; base += stride) {
    const int64_t row = base + threadIdx.y;
    const bool active = row < p.rows.count;
    const int64_t r = active ? row : 0;
    const T* x = static_cast<const T*>(p.x) + row_offset(p.rows, 0, r);
    const T* dy = static_cast<const T*>(p.dy) + row_offset(p.rows, 1, r);
    T* dx = static_cast<T*>(p.dx) + row_offset(p.rows, 2, r);
    const T* dsum = nullptr;
    if (p.dsum != nullptr) dsum = static_cast<const T*>(p.dsum) + row_offset(p.rows, 3, r);
    const int end = active ? p.width : 0;

    Pack<T, N> kept_x[kKept], kept_dy[kKept];
    float total = 0.0f, product = 0.0f;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const int at = first + i * step;
      if (at >= end) continue;
      kept_x[i] = load<T, N>(x + at);
      kept_dy[i] = load<T, N>(dy + at);
    }
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const int at = first + i * step;
      if (at >= end) continue;
      float g[N];
      weighted<T, W, N>(kept_dy[i], weight, at, g);
      total += squares(kept_x[i]);
#pragma unroll
      for (int e = 0; e < N; ++e) product += g[e] * to_float(kept_x[i].at[e]);
    }
    for (int at = beyond; at < end; at += step) {
      const Pack<T, N> h = load<T, N>(x + at);
      float g[N];
      weighted<T, W, N>(load<T, N>(dy + at), weight, at, g);
      total += squares(h);
#pragma unroll
      for (int e = 0; e < N; ++e) product += g[e] * to_float(h.at[e]);
    }
    const float scale = rsqrtf(sum_over_row(total) / p.width + p.eps);
    const float slope = sum_over_row(product) * scale / p.width;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const int at = first + i * step;
      if (at >= end) continue;
#pragma unroll
      for (int e = 0; e < N; ++e) {
        dweight[i][e] += to_float(kept_dy[i].at[e]) * (to_float(kept_x[i].at[e]) * scale);
      }
      store_dx<T, W, N>(dx, dsum, weight, at, kept_x[i], kept_dy[i], scale, slope);
    }
    for (int at = beyond; at < end; at += step) {
      const Pack<T, N> h = load<T, N>(x + at), g = load<T, N>(dy + at);
      for (int e = 0; partial != nullptr && e < N; ++e) {
        // Only this thread writes these columns of this block's partial row.
        const float before = base == int64_t{blockIdx.x} ? 0.0f : partial[at + e];
        partial[at + e] = before + to_float(g.at[e]) * (to_float(h.at[e]) * scale);
      }
      store_dx<T, W, N>(dx, dsum, weight, at, h, g, scale, slope);
    }
  }
  if (partial == nullptr) return;

  // Rows of one block were walked by different threads: add them up in order of threadIdx.y.
  __shared__ float shared[kRowThreads * kKept * N];
  if (blockDim.y > 1) {
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const int at = first + i * step + e;
        if (at < p.width) shared[threadIdx.y * p.width + at] = dweight[i][e];
      }
    }
    __syncthreads();
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    for (int at = thread; at < p.width; at += blockDim.x * blockDim.y) {
      float total = 0.0f;
      for (unsigned y = 0; y < blockDim.y; ++y) total += shared[y * p.width + at];
      partial[at] = total;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const int at = first + i * step + e;
      if (at < p.width) partial[at] = dweight[i][e];
    }
  }
}

constexpr int kSumColumns = 32, kSumSlices = 16;

// dweight[c] = sum over rows of partial[row][c]. blockDim = (kSumColumns, kSumSlices).
template <typename W>
__global__ void __launch_bounds__(kSumColumns* kSumSlices)
    add_partial_rows_kernel(const float* partial, W* dweight, int rows, int width) {
  const int column = blockIdx.x * kSumColumns + threadIdx.x;
  float total = 0.0f;
  if (column < width) {
#pragma unroll 4
    for (int row = threadIdx.y; row < rows; row += kSumSlices) {
      total += partial[int64_t{row} * width + column];
    }
  }
  __shared__ float slices[kSumSlices][kSumColumns];
  slices[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y != 0 || column >= width) return;
  for (int slice = 1; slice < kSumSlices; ++slice) total += slices[slice][threadIdx.x];
  dweight[column] = from_float<W>(total);
}

}  // namespace lmfast::gpu
