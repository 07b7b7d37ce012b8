// Rows of any storage type as fp32 rows, for the attention kernels that compute in fp32.
#pragma once

#include "../gemm_f32.h"
#include "attention_stored.h"

namespace lmfast::LMFAST_ISA {
namespace {

// fp32 rows of a tensor: where they are, or a copy.
struct FloatRows {
  const float* data;
  int64_t stride;
};

template <class T>
FloatRows float_rows(const AttentionTensor& x, int64_t b, int64_t head, Span rows, int64_t width,
                     float* copy) {
  const T* first = row_of<T>(x, b, head, 0);
  if constexpr (sizeof(T) == sizeof(float)) {
    // Rows far apart share few sets of the first-level cache.
    if (x.row == width) return {reinterpret_cast<const float*>(first), width};
  }
  for (int64_t j = rows.lo; j < rows.hi; ++j) {
    to_float_row(first + j * x.row, width, copy + (j - rows.lo) * width);
  }
  return {copy - rows.lo * width, width};
}

// The same for rows of keys or values, wherever and as whatever they are stored.
LMFAST_INLINE FloatRows stored_rows(const AttentionArgs& a, const StoredTensor& t, int64_t b,
                                    int64_t head, Span rows, float* copy) {
  const int64_t width = a.head_dim;
  const bool there = a.stored.type == Stored::kF32 && a.stored.table == nullptr;
  if (there && t.x.row == width) return {row_of<float>(t.x, b, head, 0), width};
  copy_stored(a, t, b, head, rows, copy, width);
  return {copy - rows.lo * width, width};
}

// Products over the head size that are added in one chain: longer ones would round more than
// PyTorch's, which multiplies few rows by dot products, in parts. It depends on the call alone:
// scores come out the same to the last bit with keys as rows, in the forward, and with queries as
// rows, in the backward. Otherwise the error of a score would be one of its probability, also of
// one near 1.
LMFAST_INLINE int64_t chain_of(const AttentionArgs& a) { return a.length < 8 ? 16 : 128; }

// Rows times lanes over the head size, C (rows x lanes, kLanes apart).
LMFAST_INLINE void multiply_heads(int64_t rows, int64_t lanes, int64_t width, const float* a,
                                  int64_t a_stride, const float* b, float* c, int64_t chain) {
  gemm_f32<false, false>(rows, lanes, width < chain ? width : chain, a, a_stride, b, kLanes, c,
                         kLanes);
  for (int64_t d = chain; d < width; d += chain) {
    gemm_f32<false, true>(rows, lanes, width - d < chain ? width - d : chain, a + d, a_stride,
                          b + d * kLanes, kLanes, c, kLanes);
  }
}

}  // namespace
}  // namespace lmfast::LMFAST_ISA
