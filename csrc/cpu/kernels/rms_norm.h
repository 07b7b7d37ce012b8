// Arguments and declarations of the RMSNorm kernels (rms_norm.cpp). No torch header.
#pragma once

#include "../dispatch.h"
#include "../dtype.h"
#include "../rows.h"

namespace lmfast {

struct RmsNormFwdArgs {
  DType dtype;         // of x, residual, y, sum
  DType weight_dtype;  // dtype or kF32
  RowLayout rows;      // operands: x, y, residual, sum
  int64_t width;
  double eps;
  const void* x;
  const void* residual;  // null: plain rms_norm
  const void* weight;    // null: all ones
  void* y;
  void* sum;  // x + residual; null without residual
};

struct RmsNormBwdArgs {
  DType dtype;  // of dy, x, dsum, dx
  DType weight_dtype;
  RowLayout rows;  // operands: x, dy, dx, dsum
  int64_t width;
  double eps;
  const void* x;
  const void* dy;
  const void* dsum;  // gradient that reaches x past the norm; null: none
  const void* weight;
  void* dx;
  int64_t rows_per_block;
  // (blocks, width), float (double for kF64): sums of dy * x / rms over each block's rows.
  // null: the weight needs no gradient.
  void* dweight_blocks;
};

struct RmsNormDweightArgs {
  bool fp64;
  DType weight_dtype;
  int64_t blocks, width;
  const void* dweight_blocks;
  void* dweight;
};

LMFAST_DECLARE_KERNEL(rms_norm_fwd, RmsNormFwdArgs)          // range: rows
LMFAST_DECLARE_KERNEL(rms_norm_bwd, RmsNormBwdArgs)          // range: blocks of rows
LMFAST_DECLARE_KERNEL(rms_norm_dweight, RmsNormDweightArgs)  // range: columns

}  // namespace lmfast
