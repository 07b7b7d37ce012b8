// Rows of x as floats, in the order in which the products with few rows read them. No torch header.
#pragma once

#include "../dispatch.h"
#include "../dtype.h"

namespace lmfast {

struct LinearRowsArgs {
  DType dtype;  // not fp64
  bool apart;   // even numbers first, then odd ones
  int64_t depth;
  const void* x;
  int64_t stride;
  float* out;  // rows of `depth`
};

LMFAST_DECLARE_KERNEL(linear_rows, LinearRowsArgs)  // range: rows

}  // namespace lmfast
