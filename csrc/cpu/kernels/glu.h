// Arguments and declarations of the gated linear units' kernels (glu.cpp). No torch header.
#pragma once

#include "../dispatch.h"
#include "../dtype.h"
#include "../rows.h"

namespace lmfast {

enum class GluActivation : int { kSilu, kGeluTanh, kGeluErf };

// A unit of work is `block` columns of one row (fewer at its end).
struct GluSplit {
  int64_t width, block, blocks_per_row;
};

struct GluFwdArgs {
  DType dtype;
  GluActivation activation;
  RowLayout rows;  // operands: y, gate, up
  GluSplit split;
  const void* gate;
  const void* up;
  void* y;
};

struct GluBwdArgs {
  DType dtype;
  GluActivation activation;
  RowLayout rows;  // operands: dgate and dup, gate, up, dy
  GluSplit split;
  const void* gate;
  const void* up;
  const void* dy;
  void* dgate;
  void* dup;
};

LMFAST_DECLARE_KERNEL(glu_fwd, GluFwdArgs)  // range: units
LMFAST_DECLARE_KERNEL(glu_bwd, GluBwdArgs)  // range: units

}  // namespace lmfast
