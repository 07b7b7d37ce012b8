// Arguments and declarations of the products with few rows (linear_few_rows.cpp). No torch header.
#pragma once

#include "../dispatch.h"
#include "../dtype.h"

namespace lmfast {

constexpr int64_t kFewRows = 32;         // the most that one call takes
constexpr int64_t kFewRowsColumns = 16;  // a unit of work

// out = act(x weight^T + bias)
struct LinearFewRowsArgs {
  DType dtype;  // of weight, bias and out; not fp64
  int64_t rows, columns, depth;
  const float* x;  // rows of `depth` floats
  int64_t x_stride;
  const void* weight;  // element (n, k) is at n * stride + k, or with by_columns at k * stride + n
  bool by_columns;
  int64_t stride;
  const void* bias;  // (columns) or null
  bool relu;
  void* out;  // (rows, columns), contiguous
};

LMFAST_DECLARE_KERNEL(linear_few_rows, LinearFewRowsArgs)  // range: units of columns

}  // namespace lmfast
