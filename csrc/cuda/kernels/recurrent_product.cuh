// The product of a recurrent step: rows of a matrix that stay in registers with rows of a batch.
// recurrent.cuh says why it is built so.
#pragma once

#include "device.cuh"

namespace lmfast::gpu {

// How rows of the batch are read: from global memory that other blocks write, or shared memory.
struct PastL1 {
  template <typename T, int N>
  __device__ __forceinline__ static Pack<T, N> read(const T* p) {
    return load_past_l1<T, N>(p);
  }
};
struct FromShared {
  template <typename T, int N>
  __device__ __forceinline__ static Pack<T, N> read(const T* p) {
    return load<T, N>(p);
  }
};

// A block's rows of a matrix, and their product with rows of a batch.
template <typename T, int R, int D>
struct RecurrentProduct {
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr int kTiles = R / 16;
  static constexpr int kTogether = kHalf && D < 4 ? D : 4;  // loads of h under way together

  uint32_t half[kHalf ? kTiles : 1][kHalf ? D : 1][2][4];
  float full[kHalf ? 1 : R][kHalf ? 1 : D];

  // weight(row, k): an element, zero outside.
  template <typename Weight>
  __device__ __forceinline__ void load_weights(Weight weight) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if constexpr (kHalf) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int d = 0; d < D; ++d) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int r = 0; r < 4; ++r) {
              const int row = m * 16 + lane / 4 + r % 2 * 8;
              const int k = (warp * D + d) * 32 + lane % 4 * 8 + i * 4 + r / 2 * 2;
              half[m][d][i][r] = pair_of<T>(weight(row, k), weight(row, k + 1));
            }
          }
        }
      }
    } else {
#pragma unroll
      for (int row = 0; row < R; ++row) {
#pragma unroll
        for (int d = 0; d < D; ++d) {
          full[row][d] = to_float(weight(row, (warp * D + d) * 32 + lane));
        }
      }
    }
  }

  // partial[warp][row][n], n < count: the warp's share. source(n): the row of the batch, or null
  // for zeros; 16 bits: aligned to 16 bytes, and the depth a multiple of 8.
  template <typename Reader, typename Source>
  __device__ __forceinline__ void multiply(Source source, int count, int depth, float* partial,
                                           int stride) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float* mine = partial + warp * R * stride;
    if constexpr (kHalf) {
      // From here on offsets are constants: sixteen of them kept in registers made others spill.
      const int begin = warp * D * 32 + lane % 4 * 8, left = depth - begin;
      for (int n0 = 0; n0 < count; n0 += 8) {
        const T* row = n0 + lane / 4 < count ? source(n0 + lane / 4) : nullptr;
        const int there = row == nullptr ? 0 : left;
        const T* start = row == nullptr ? nullptr : row + begin;
        const uint32_t* from = reinterpret_cast<const uint32_t*>(start);
        float acc[kTiles][4] = {};
#pragma unroll
        for (int d0 = 0; d0 < D; d0 += kTogether) {
          Pack<uint32_t, 4> x[kTogether];
#pragma unroll
          for (int d = 0; d < kTogether; ++d) {
            x[d] = Pack<uint32_t, 4>{};
            if ((d0 + d) * 32 >= there) continue;
            x[d] = Reader::template read<uint32_t, 4>(from + (d0 + d) * 16);
          }
#pragma unroll
          for (int d = 0; d < kTogether; ++d) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const uint32_t b[2] = {x[d].at[2 * i], x[d].at[2 * i + 1]};
#pragma unroll
              for (int m = 0; m < kTiles; ++m) multiply_add<T>(acc[m], half[m][d0 + d][i], b);
            }
          }
        }
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const int row_at = m * 16 + lane / 4 + r / 2 * 8, n = n0 + lane % 4 * 2 + r % 2;
            mine[row_at * stride + n] = acc[m][r];
          }
        }
      }
    } else {
      for (int n0 = 0; n0 < count; n0 += kTogether) {
        float x[kTogether][D];
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          const T* row = n0 + i < count ? source(n0 + i) : nullptr;
#pragma unroll
          for (int d = 0; d < D; ++d) {
            const int k = (warp * D + d) * 32 + lane;
            x[i][d] = 0.0f;
            if (row == nullptr || k >= depth) continue;
            x[i][d] = to_float(Reader::template read<T, 1>(row + k).at[0]);
          }
        }
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          float sums[R];
#pragma unroll
          for (int row = 0; row < R; ++row) {
            sums[row] = 0.0f;
#pragma unroll
            for (int d = 0; d < D; ++d) sums[row] += full[row][d] * x[i][d];
          }
          const float sum = sum_of_own_row(sums, lane);
          if (lane % (32 / R) == 0 && n0 + i < count) {
            mine[lane / (32 / R) * stride + n0 + i] = sum;
          }
        }
      }
    }
  }

  // Sums over the lanes, of which lane l gets that of row l / (32 / R).
  template <int N>
  __device__ __forceinline__ static float sum_of_own_row(float (&value)[N], int lane) {
    constexpr int kStep = 16 * N / R;  // lanes that differ by it share the rows that are left
    if constexpr (N == 1) {
      float total[1] = {value[0]};
      for (int step = 16 / R; step > 0; step /= 2) {
        float other[1];
        from_lane_across(total, step, other);
        total[0] += other[0];
      }
      return total[0];
    } else {
      const bool upper = (lane & kStep) != 0;
      float kept[N / 2], sent[N / 2], got[N / 2];
#pragma unroll
      for (int i = 0; i < N / 2; ++i) {
        kept[i] = upper ? value[i + N / 2] : value[i];
        sent[i] = upper ? value[i] : value[i + N / 2];
      }
      from_lane_across(sent, kStep, got);
#pragma unroll
      for (int i = 0; i < N / 2; ++i) kept[i] += got[i];
      return sum_of_own_row(kept, lane);
    }
  }
};

}  // namespace lmfast::gpu
