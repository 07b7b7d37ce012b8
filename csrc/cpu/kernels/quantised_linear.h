// Arguments and declaration of the product with a matrix of 8 or 4 bits (quantised_linear.cpp). No
// torch header.
#pragma once

#include "../dispatch.h"
#include "../dtype.h"

namespace lmfast {

constexpr int64_t kQuantisedColumns = 16;  // a unit of work

// out = x (scale * code)^T + bias
struct QuantisedLinearArgs {
  DType dtype;       // of bias and out; not fp64
  DType scale_type;  // not fp64
  bool nibbles;      // two codes in a byte, plus 8; one int8 otherwise
  int64_t rows, columns, depth;
  const float* x;  // rows of `depth` floats; with nibbles the even ones, then the odd ones
  int64_t x_stride;
  const void* codes;  // rows of `depth` or depth / 2 bytes
  int64_t stride;
  const void* scales;  // (columns), or rows of depth / group
  int64_t scales_stride, group;
  const void* bias;  // (columns) or null
  void* out;         // (rows, columns), contiguous
};

LMFAST_DECLARE_KERNEL(quantised_linear, QuantisedLinearArgs)  // range: units of columns

}  // namespace lmfast
