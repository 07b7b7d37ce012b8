// Rows of strided tensors: the leading dimensions of several operands of one shape. No torch
// header.
#pragma once

#include <cstdint>

namespace lmfast {

constexpr int kMaxRowDims = 6;
constexpr int kMaxRowOperands = 4;

// size[d] and, per operand, stride[d] in elements, outermost dimension first. Bindings merge
// dimensions that every operand steps through evenly, so a contiguous tensor has one.
struct RowLayout {
  int ndim = 0;
  int64_t count = 1;
  int64_t size[kMaxRowDims];
  int64_t stride[kMaxRowOperands][kMaxRowDims];
};

}  // namespace lmfast
