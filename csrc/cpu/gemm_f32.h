// Small fp32 matrix products inside fused kernels: C = A B or C += A B, by register tiles of 6 rows
// by 4 vectors (2 where there are 16 registers).
//
// B and C have rows of lanes, a multiple of the vector width; A is read one number at a time and
// broadcast, so it may lie in either order and its edges need no padding: most operands are used
// where they are. A 6 x 4 tile reads 10 operands for 24 multiply-adds; from L1 or L2 it reaches 80
// to 90 % of the peak of two FMA units (8 x 3 was equal, 12 x 2 with panels that stay in L1 2 to 15
// % slower).
#pragma once

#include "simd.h"

namespace lmfast::LMFAST_ISA {
namespace {

constexpr int kGemmRows = 6;
#if defined(__AVX512F__)
constexpr int kGemmVecs = 4;
#else
constexpr int kGemmVecs = 2;
#endif

// What a tile asks for while it multiplies: lines that are needed later, some before each
// kGemmSegment of its depth, because more of them than the core has places for misses hold up the
// loads of the product itself. Gradients of weights, 88 lines to a tile: 512 by 128 of depth 3840
// on one core of Zen 4 5.3 -> 5.0 ms. Segments of 16 cost as much as they gain where there is
// little to ask for.
constexpr int64_t kGemmSegment = 32;

// Where a tile is in its depth: A's next numbers (of its first row), and the tile of C.
template <int kRows, int kVecs>
struct GemmPlace {
  int64_t k, depth;
  const float* a;
  int64_t a_stride;
  float* c;
  int64_t c_stride;

  // The rows of C, which are written at the end: two at a time, in a small depth all at once.
  LMFAST_INLINE void ask_for_c() const {
    const int64_t each = depth < kGemmSegment * kRows / 2 ? kRows : 2;
    const int64_t first = k / kGemmSegment * each;
    for (int64_t m = first; m < first + each && m < kRows; ++m) {
      for (int i = 0; i < kVecs * VecF::kWidth; i += 16)
        __builtin_prefetch(c + m * c_stride + i, 1);
    }
  }
  // As much of the next rows of A, whose rows are contiguous.
  LMFAST_INLINE void ask_for_next_a() const {
    const float* next = a + kRows * a_stride;
    for (int m = 0; m < kRows; ++m, next += a_stride) {
      for (int64_t i = 0; i < kGemmSegment; i += 16) __builtin_prefetch(next + i);
    }
  }
};

struct AskNothing {
  static constexpr bool kAsks = false;
  template <class Place>
  LMFAST_INLINE void operator()(const Place&) const {}
};

// For operands that come from beyond L2: C, or C and rows of A.
struct AskForC {
  static constexpr bool kAsks = true;
  template <class Place>
  LMFAST_INLINE void operator()(const Place& place) const {
    place.ask_for_c();
  }
};
struct AskForBoth {
  static constexpr bool kAsks = true;
  template <class Place>
  LMFAST_INLINE void operator()(const Place& place) const {
    place.ask_for_c();
    place.ask_for_next_a();
  }
};

// With kAdd the products are summed before `added` is, which is C or, with a stride of zero, one
// row for all of C: short chains of additions round less.
//
// A[m][k] is at a[m * stride + k], or with kColumns at a[k * stride + m].
template <int kRows, int kVecs, bool kColumns, bool kAdd, class Ask>
inline __attribute__((noinline)) void gemm_tile(const float* a, int64_t a_stride, const float* b,
                                                int64_t b_stride, int64_t depth, float* c,
                                                int64_t c_stride, const float* added,
                                                int64_t added_stride, const Ask& ask) {
  constexpr int W = VecF::kWidth;
  VecF sum[kRows][kVecs];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sum[m][v] = VecF::zero();
  }
  for (int64_t k = 0; k < depth;) {
    ask(GemmPlace<kRows, kVecs>{k, depth, a, a_stride, c, c_stride});
    const int64_t past = !Ask::kAsks || depth - k < kGemmSegment ? depth : k + kGemmSegment;
    for (; k < past; ++k) {
      VecF row[kVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) row[v] = VecF::load(b + v * W);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        const VecF x = VecF::set1(kColumns ? a[m] : a[m * a_stride]);
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) sum[m][v] = fmadd(x, row[v], sum[m][v]);
      }
      a += kColumns ? a_stride : 1;
      b += b_stride;
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      float* p = c + m * c_stride + v * W;
      // Added last: a chain of additions is as long as `depth`, not as all products into C.
      if constexpr (kAdd) sum[m][v] = sum[m][v] + VecF::load(added + m * added_stride + v * W);
      sum[m][v].store(p);
    }
  }
}

template <int kVecs, bool kColumns, bool kAdd, class Ask>
LMFAST_INLINE void gemm_rows(int64_t rows, int64_t depth, const float* a, int64_t a_stride,
                             const float* b, int64_t b_stride, float* c, int64_t c_stride,
                             const float* added, int64_t added_stride, const Ask& ask) {
  const int64_t step = kColumns ? 1 : a_stride;
  int64_t m = 0;
  for (; m + kGemmRows <= rows; m += kGemmRows) {
    gemm_tile<kGemmRows, kVecs, kColumns, kAdd>(a + m * step, a_stride, b, b_stride, depth,
                                                c + m * c_stride, c_stride,
                                                added + m * added_stride, added_stride, ask);
  }
  const float* rest = a + m * step;
  c += m * c_stride;
  added += m * added_stride;
  switch (rows - m) {
    case 5:
      gemm_tile<5, kVecs, kColumns, kAdd>(rest, a_stride, b, b_stride, depth, c, c_stride, added,
                                          added_stride, ask);
      break;
    case 4:
      gemm_tile<4, kVecs, kColumns, kAdd>(rest, a_stride, b, b_stride, depth, c, c_stride, added,
                                          added_stride, ask);
      break;
    case 3:
      gemm_tile<3, kVecs, kColumns, kAdd>(rest, a_stride, b, b_stride, depth, c, c_stride, added,
                                          added_stride, ask);
      break;
    case 2:
      gemm_tile<2, kVecs, kColumns, kAdd>(rest, a_stride, b, b_stride, depth, c, c_stride, added,
                                          added_stride, ask);
      break;
    case 1:
      gemm_tile<1, kVecs, kColumns, kAdd>(rest, a_stride, b, b_stride, depth, c, c_stride, added,
                                          added_stride, ask);
      break;
    default:
      break;
  }
}

// C (rows x lanes) = A (rows x depth) B (depth x lanes), or that and what is `added`. `lanes` is a
// multiple of VecF::kWidth; strides are in floats.
template <bool kColumns, bool kAdd, class Ask = AskNothing>
inline void gemm_f32(int64_t rows, int64_t lanes, int64_t depth, const float* a, int64_t a_stride,
                     const float* b, int64_t b_stride, float* c, int64_t c_stride,
                     const float* added, int64_t added_stride, const Ask& ask = {}) {
  constexpr int W = VecF::kWidth;
  if constexpr (!kAdd) {  // not read, and null in some calls
    added = c;
    added_stride = c_stride;
  }
  int64_t n = 0;
  for (; n + kGemmVecs * W <= lanes; n += kGemmVecs * W) {
    gemm_rows<kGemmVecs, kColumns, kAdd>(rows, depth, a, a_stride, b + n, b_stride, c + n, c_stride,
                                         added + n, added_stride, ask);
  }
  const int64_t left = (lanes - n) / W;
  if constexpr (kGemmVecs > 2) {
    if (left == 3) {
      gemm_rows<3, kColumns, kAdd>(rows, depth, a, a_stride, b + n, b_stride, c + n, c_stride,
                                   added + n, added_stride, ask);
    }
    if (left == 2) {
      gemm_rows<2, kColumns, kAdd>(rows, depth, a, a_stride, b + n, b_stride, c + n, c_stride,
                                   added + n, added_stride, ask);
    }
  }
  if (left == 1) {
    gemm_rows<1, kColumns, kAdd>(rows, depth, a, a_stride, b + n, b_stride, c + n, c_stride,
                                 added + n, added_stride, ask);
  }
}

// The same with C itself as what is added.
template <bool kColumns, bool kAdd>
LMFAST_INLINE void gemm_f32(int64_t rows, int64_t lanes, int64_t depth, const float* a,
                            int64_t a_stride, const float* b, int64_t b_stride, float* c,
                            int64_t c_stride) {
  gemm_f32<kColumns, kAdd>(rows, lanes, depth, a, a_stride, b, b_stride, c, c_stride, c, c_stride);
}

}  // namespace
}  // namespace lmfast::LMFAST_ISA
