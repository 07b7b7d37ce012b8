// Rows of any storage type as fp32 rows, for the attention kernels that compute in fp32.
#pragma once

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

}  // namespace
}  // namespace lmfast::LMFAST_ISA
