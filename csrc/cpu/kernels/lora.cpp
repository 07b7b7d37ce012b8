// The low-rank part of a LoRA layer, beside the product of its matrix.
//
// Floor: 2 R (K + N) operations per row forward, 4 R (K + N) backward, in fp32 whatever the storage
// type; x and dy are read once, once more for the gradients of the factors, y and dx are read and
// written. At R = 8 operations and bytes cost about the same: 2048 x 288 to 288 is 57 M
// multiply-adds, 0.25 ms on two cores that do one of 16 lanes per cycle. Measured on two Zen 4
// cores: 0.14 + 0.26 ms in fp32, PyTorch's products 0.43 + 0.91; in bf16 0.16 + 0.28 against 0.17 +
// 0.46, where half of the time is reading and rounding bf16. From 16 ranks on (bf16: 8) PyTorch's
// products are as fast.
//
// Products with a factor (R rows of `depth` floats) are dot products: a tile of rows times four or
// eight ranks stays in registers, so that a load of x serves all ranks. What is added to y is a
// small matrix product of whose tile of y every element is rounded once, whatever R. Gradients of
// factors are sums over rows: a strip of columns stays in the first-level cache while its rows go
// by, in blocks whose sums are added up one after the other: short chains, and columns are
// independent, so results do not depend on the number of threads.
//
// Formula: Hu et al. 2021, https://arxiv.org/abs/2106.09685.
#include "lora.h"

#include "../lane_sums.h"
#include "../simd.h"

namespace lmfast::LMFAST_ISA {
namespace {

// Rows whose sums make one link of the chain over all rows.
constexpr int64_t kRowBlock = 32;

// to += scale * acc, rounded once; the last vector of a row has `last` elements.
template <class V, class T, int kRows, int kColumns, bool kPartial>
LMFAST_INLINE void add_scaled(const V (&acc)[kRows][kColumns], V scale, T* to, int64_t stride,
                              int last) {
  for (int i = 0; i < kRows; ++i) {
    for (int c = 0; c < kColumns; ++c) {
      T* at = to + i * stride + c * V::kWidth;
      if constexpr (kPartial) {
        fmadd(acc[i][c], scale, V::load(at, last)).store(at, last);
      } else {
        fmadd(acc[i][c], scale, V::load(at)).store(at);
      }
    }
  }
}

// kRows rows of x times kRanks rows of a factor.
template <class T, int kRows, int kRanks>
LMFAST_INLINE void project_tile(const T* x, int64_t x_stride, const AccOf<T>* factor, int64_t depth,
                                AccOf<T> scale, AccOf<T>* inner, int64_t rank) {
  using V = VecOf<T>;
  V acc[kRows][kRanks];
  for (int i = 0; i < kRows; ++i)
    for (int r = 0; r < kRanks; ++r) acc[i][r] = V::zero();
  int64_t k = 0;
  for (; k + V::kWidth <= depth; k += V::kWidth) {
    V rows[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) rows[i] = V::load(x + i * x_stride + k);
#pragma GCC unroll 8
    for (int r = 0; r < kRanks; ++r) {
      const V f = V::load(factor + r * depth + k);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) acc[i][r] = fmadd(rows[i], f, acc[i][r]);
    }
  }
  if (k < depth) {
    const int n = static_cast<int>(depth - k);
#pragma GCC unroll 8
    for (int r = 0; r < kRanks; ++r) {
      const V f = V::load(factor + r * depth + k, n);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i)
        acc[i][r] = fmadd(V::load(x + i * x_stride + k, n), f, acc[i][r]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    AccOf<T> sums[kRanks];
    if constexpr (V::kWidth == 1) {
      for (int r = 0; r < kRanks; ++r) sums[r] = sum(acc[i][r]);
    } else {
      sum_lanes<kRanks>(acc[i], 1, sums);
    }
    for (int r = 0; r < kRanks; ++r) inner[i * rank + r] = scale * sums[r];
  }
}

template <class T, int kRows>
LMFAST_INLINE void project(const LoraRowsArgs& a, const T* x, AccOf<T>* inner) {
  const auto* factor = static_cast<const AccOf<T>*>(a.x_factor);
  const auto scale = static_cast<AccOf<T>>(a.inner_scale);
  int64_t r = 0;
  // Eight accumulators per row fit 32 registers with two rows, 16 with one.
  for (; r + 8 <= a.rank; r += 8)
    project_tile<T, kRows, 8>(x, a.x_stride, factor + r * a.depth, a.depth, scale, inner + r,
                              a.rank);
  for (; r + 4 <= a.rank; r += 4)
    project_tile<T, kRows, 4>(x, a.x_stride, factor + r * a.depth, a.depth, scale, inner + r,
                              a.rank);
  for (; r < a.rank; ++r)
    project_tile<T, kRows, 1>(x, a.x_stride, factor + r * a.depth, a.depth, scale, inner + r,
                              a.rank);
}

// kColumns vectors of kRows rows of out; the last vector has `last` elements.
template <class T, int kRows, int kColumns, bool kPartial>
LMFAST_INLINE void add_tile(const LoraRowsArgs& a, const AccOf<T>* inner, T* out,
                            const AccOf<T>* factor, int last) {
  using V = VecOf<T>;
  const V scale = V::set1(static_cast<AccOf<T>>(a.out_scale));
  V acc[kRows][kColumns];
  for (int i = 0; i < kRows; ++i)
    for (int c = 0; c < kColumns; ++c) acc[i][c] = V::zero();
  for (int64_t r = 0; r < a.rank; ++r) {
    V f[kColumns];
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) {
      const AccOf<T>* from = factor + r * a.width + c * V::kWidth;
      f[c] = kPartial ? V::load(from, last) : V::load(from);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const V s = V::set1(inner[i * a.rank + r]);
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) acc[i][c] = fmadd(s, f[c], acc[i][c]);
    }
  }
  add_scaled<V, T, kRows, kColumns, kPartial>(acc, scale, out, a.out_stride, last);
}

template <class T, int kRows>
LMFAST_INLINE void add_rows(const LoraRowsArgs& a, const AccOf<T>* inner, T* out) {
  constexpr int W = VecOf<T>::kWidth;
  const auto* factor = static_cast<const AccOf<T>*>(a.out_factor);
  int64_t c = 0;
  for (; c + 2 * W <= a.width; c += 2 * W)
    add_tile<T, kRows, 2, false>(a, inner, out + c, factor + c, W);
  for (; c + W <= a.width; c += W) add_tile<T, kRows, 1, false>(a, inner, out + c, factor + c, W);
  if (c < a.width)
    add_tile<T, kRows, 1, true>(a, inner, out + c, factor + c, static_cast<int>(a.width - c));
}

template <class T>
void rows_typed(const LoraRowsArgs& a, int64_t begin, int64_t end) {
  constexpr int kTile = VecOf<T>::kWidth == 16 ? 2 : 1;
  const auto* x = static_cast<const T*>(a.x);
  auto* inner = static_cast<AccOf<T>*>(a.inner);
  auto* out = static_cast<T*>(a.out);
  // Blocks of rows whose x, inner and out stay in the first-level cache in between.
  for (int64_t row = begin; row < end; row += 4) {
    const int64_t past = row + 4 < end ? row + 4 : end;
    int64_t i = row;
    for (; i + kTile <= past; i += kTile)
      project<T, kTile>(a, x + i * a.x_stride, inner + i * a.rank);
    for (; i < past; ++i) project<T, 1>(a, x + i * a.x_stride, inner + i * a.rank);
    if (out == nullptr) continue;
    if (past - row == 4) {
      add_rows<T, 4>(a, inner + row * a.rank, out + row * a.out_stride);
      continue;
    }
    for (i = row; i < past; ++i) add_rows<T, 1>(a, inner + i * a.rank, out + i * a.out_stride);
  }
}

// Adds the products of `rows` rows, kRanks columns of inner times kColumns vectors of x, to sums.
template <class T, int kRanks, int kColumns, bool kPartial>
LMFAST_INLINE void sums_tile(const LoraSumsArgs& a, const AccOf<T>* inner, const T* x, int64_t rows,
                             AccOf<T>* sums, int last) {
  using V = VecOf<T>;
  V acc[kRanks][kColumns];
  for (int r = 0; r < kRanks; ++r)
    for (int c = 0; c < kColumns; ++c) acc[r][c] = V::zero();
  for (int64_t i = 0; i < rows; ++i) {
    V v[kColumns];
#pragma GCC unroll 2
    for (int c = 0; c < kColumns; ++c) {
      const T* from = x + i * a.x_stride + c * V::kWidth;
      v[c] = kPartial ? V::load(from, last) : V::load(from);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRanks; ++r) {
      const V s = V::set1(inner[i * a.rank + r]);
#pragma GCC unroll 2
      for (int c = 0; c < kColumns; ++c) acc[r][c] = fmadd(s, v[c], acc[r][c]);
    }
  }
  const V scale = V::set1(static_cast<AccOf<T>>(a.scale));
  add_scaled<V, AccOf<T>, kRanks, kColumns, kPartial>(acc, scale, sums, a.width, last);
}

template <class T, int kColumns, bool kPartial>
LMFAST_INLINE void sums_columns(const LoraSumsArgs& a, int64_t row, int64_t rows, int64_t column,
                                int last) {
  const auto* inner = static_cast<const AccOf<T>*>(a.inner) + row * a.rank;
  const T* x = static_cast<const T*>(a.x) + row * a.x_stride + column;
  auto* sums = static_cast<AccOf<T>*>(a.sums) + column;
  int64_t r = 0;
  if constexpr (VecOf<T>::kWidth == 16) {  // 32 registers
    for (; r + 8 <= a.rank; r += 8)
      sums_tile<T, 8, kColumns, kPartial>(a, inner + r, x, rows, sums + r * a.width, last);
  }
  for (; r + 4 <= a.rank; r += 4)
    sums_tile<T, 4, kColumns, kPartial>(a, inner + r, x, rows, sums + r * a.width, last);
  for (; r < a.rank; ++r)
    sums_tile<T, 1, kColumns, kPartial>(a, inner + r, x, rows, sums + r * a.width, last);
}

template <class T>
void sums_typed(const LoraSumsArgs& a, int64_t begin, int64_t end) {
  constexpr int W = VecOf<T>::kWidth;
  auto* sums = static_cast<AccOf<T>*>(a.sums);
  for (int64_t r = 0; r < a.rank; ++r)
    for (int64_t c = begin; c < end; ++c) sums[r * a.width + c] = 0;
  for (int64_t row = 0; row < a.rows; row += kRowBlock) {
    const int64_t rows = row + kRowBlock < a.rows ? kRowBlock : a.rows - row;
    int64_t c = begin;
    for (; c + 2 * W <= end; c += 2 * W) sums_columns<T, 2, false>(a, row, rows, c, W);
    for (; c + W <= end; c += W) sums_columns<T, 1, false>(a, row, rows, c, W);
    if (c < end) sums_columns<T, 1, true>(a, row, rows, c, static_cast<int>(end - c));
  }
}

}  // namespace

void lora_rows(const LoraRowsArgs& a, int64_t begin, int64_t end) {
  LMFAST_DISPATCH_DTYPE(a.dtype, scalar_t, rows_typed<scalar_t>(a, begin, end))
}

void lora_sums(const LoraSumsArgs& a, int64_t begin, int64_t end) {
  LMFAST_DISPATCH_DTYPE(a.dtype, scalar_t, sums_typed<scalar_t>(a, begin, end))
}

}  // namespace lmfast::LMFAST_ISA
