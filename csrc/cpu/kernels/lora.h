// Arguments and declarations of the kernels of low-rank updates (lora.cpp). No torch header.
//
// Factors and sums are in the type that T is computed in: float, double for double.
#pragma once

#include "../dispatch.h"
#include "../dtype.h"

namespace lmfast {

// Rows times a factor (R, depth), and those products times another factor (R, width), added to
// other rows. Forward these are x a and y += s (x a) b, backward s dy b^T and dx += (s dy b^T) a^T.
struct LoraRowsArgs {
  DType dtype;
  int64_t rank, depth, width;
  double inner_scale;  // of what `inner` receives
  double out_scale;    // of what is added to `out`
  const void* x;       // rows of `depth`
  int64_t x_stride;
  const void* x_factor;
  void* inner;          // (rows, R), contiguous
  void* out = nullptr;  // rows of `width`, or null: nothing is added
  int64_t out_stride;
  const void* out_factor;
};

// sums (R, width) = scale * inner^T (rows, R) times rows: the gradient of a factor.
struct LoraSumsArgs {
  DType dtype;
  int64_t rank, rows, width;
  double scale;
  const void* inner;
  const void* x;
  int64_t x_stride;
  void* sums;
};

LMFAST_DECLARE_KERNEL(lora_rows, LoraRowsArgs)  // range: rows
LMFAST_DECLARE_KERNEL(lora_sums, LoraSumsArgs)  // range: columns

}  // namespace lmfast
