// Walks the rows of a RowLayout. For kernels only: in the namespace of the level, as simd.h
// explains.
#pragma once

#include "rows.h"

namespace lmfast::LMFAST_ISA {
namespace {

// The element offset of a row in each of N operands; next() costs an addition in the usual case.
template <int N>
class RowCursor {
 public:
  RowCursor(const RowLayout& layout, int64_t row) : layout_(layout) {
    for (int n = 0; n < N; ++n) offset_[n] = 0;
    for (int d = layout.ndim - 1; d >= 0; --d) {
      index_[d] = row % layout.size[d];
      row /= layout.size[d];
      for (int n = 0; n < N; ++n) offset_[n] += index_[d] * layout.stride[n][d];
    }
  }

  int64_t operator[](int operand) const { return offset_[operand]; }

  void next() {
    for (int d = layout_.ndim - 1; d >= 0; --d) {
      for (int n = 0; n < N; ++n) offset_[n] += layout_.stride[n][d];
      if (++index_[d] < layout_.size[d]) return;
      for (int n = 0; n < N; ++n) offset_[n] -= layout_.size[d] * layout_.stride[n][d];
      index_[d] = 0;
    }
  }

 private:
  const RowLayout& layout_;
  int64_t index_[kMaxRowDims];
  int64_t offset_[N];
};

}  // namespace
}  // namespace lmfast::LMFAST_ISA
