// Arguments and declarations of the matrix product on AMX tiles (linear_amx.cpp). No torch header.
#pragma once

#include "../dispatch.h"

namespace lmfast {

// A matrix of which either the rows or the columns are contiguous.
struct LinearOperand {
  const float* data;
  bool by_columns;  // element (i, k) is at i + k * stride; otherwise at i * stride + k
  int64_t stride;
};

// out = act(a b^T + bias) over a chunk of the depth; what chunks before gave is in out.
struct LinearAmxArgs {
  int parts;                     // bf16 numbers per factor: 1, or 3 for fp32's accuracy
  int64_t rows, columns, depth;  // of out, and of the whole sum
  int64_t first, steps;          // the chunk: where it begins, its length in 32s
  int64_t block;                 // rows of out per unit of work, a multiple of 32
  LinearOperand a, b;            // (rows, depth), (columns, depth)
  int64_t hot_steps;             // of 32 columns of b that stay in the first-level cache

  char* packed_b;     // panels of 32 columns, kPanelStep * parts * steps bytes
  const float* bias;  // (columns) or null
  bool relu;
  bool is_first, is_last;  // chunk
  float* out;
  void* scratch;  // of the thread: a block of a and 4 KB
};

// Bytes of one step of 32 of 32 rows of a or b, and part: two tiles.
constexpr int64_t kPanelStep = 2048;
constexpr int64_t kLinearTileBytes = 4096;

LMFAST_DECLARE_KERNEL(linear_amx_pack, LinearAmxArgs)      // range: panels of 32 columns
LMFAST_DECLARE_KERNEL(linear_amx_multiply, LinearAmxArgs)  // range: blocks of rows

}  // namespace lmfast
