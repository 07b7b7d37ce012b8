// What the forward and the backward of additive attention share: lists of visible keys, dot
// products of one row with several, and weighted sums of rows.
#pragma once

#include "../simd.h"
#include "additive_attention.h"

namespace lmfast::LMFAST_ISA {
namespace {

// Rows that the inner loops take at once, as many independent chains hide the latency of tanh.
constexpr int kTogether = 4;

// The keys of [begin, end) that sequence b sees, in order; returns how many.
LMFAST_INLINE int64_t list_visible(const AdditiveAttentionArgs& a, int64_t b, int64_t begin,
                                   int64_t end, int32_t* list) {
  const uint8_t* mask = a.mask == nullptr ? nullptr : a.mask + b * a.keys;
  int64_t n = 0;
  for (int64_t s = begin; s < end; ++s) {
    list[n] = static_cast<int32_t>(s);
    n += mask == nullptr || mask[s] != 0 ? 1 : 0;
  }
  return n;
}

// Rows `list[0..]` (or 0, 1, ... where list is null) of a matrix.
template <class T>
struct Rows {
  const T* base;
  int64_t stride;
  const int32_t* list;
  LMFAST_INLINE const T* operator[](int64_t i) const {
    return base + (list == nullptr ? i : static_cast<int64_t>(list[i])) * stride;
  }
};

template <int kVectors, class T>
LMFAST_INLINE VecF load_part(const T* p, int lanes) {
  return kVectors > 1 || lanes >= VecF::kWidth ? VecF::load(p) : VecF::load(p, lanes);
}

// out[r][d .. d + lanes) = sum over i < count of factor[r * row_step + at(i) * step] * rows[i][d],
// where at(i) is i or list[i].
template <class T, class Out, int R, int kVectors>
LMFAST_INLINE void weighted_part(const float* factor, int64_t row_step, int64_t step,
                                 const int32_t* at, const Rows<T>& rows, int64_t count, int64_t d,
                                 int lanes, Out* const* out) {
  constexpr int W = VecF::kWidth;
  VecF sum[R][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) sum[r][j] = VecF::zero();
  }
  for (int64_t i = 0; i < count; ++i) {
    const T* p = rows[i] + d;
    const float* f = factor + (at == nullptr ? i : static_cast<int64_t>(at[i])) * step;
    VecF x[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) x[j] = load_part<kVectors>(p + j * W, lanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const VecF w = VecF::set1(f[r * row_step]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sum[r][j] = fmadd(w, x[j], sum[r][j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      lanes >= W ? sum[r][j].store(out[r] + d + j * W) : sum[r][j].store(out[r] + d, lanes);
    }
  }
}

// The sums above over the whole width, for R rows of results.
template <class T, class Out, int R>
LMFAST_INLINE void weighted_rows(const float* factor, int64_t row_step, int64_t step,
                                 const int32_t* at, const Rows<T>& rows, int64_t count,
                                 int64_t width, Out* const* out) {
  constexpr int W = VecF::kWidth, kWide = R > 1 ? 2 : 4;
  int64_t d = 0;
  for (; d + kWide * W <= width; d += kWide * W) {
    weighted_part<T, Out, R, kWide>(factor, row_step, step, at, rows, count, d, W, out);
  }
  for (; d < width; d += W) {
    const int lanes = static_cast<int>(width - d < W ? width - d : W);
    weighted_part<T, Out, R, 1>(factor, row_step, step, at, rows, count, d, lanes, out);
  }
}

}  // namespace
}  // namespace lmfast::LMFAST_ISA
