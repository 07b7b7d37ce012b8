// Arguments and declarations of the linear recurrence kernels. No torch header.
#pragma once

#include "../dispatch.h"
#include "../dtype.h"

namespace lmfast {

constexpr int64_t kScanWidth = 256;  // columns of a unit: their state stays in L1

// All arrays contiguous, float or double: (B, T, H), and (B, H) for states.
struct LinearRecurrenceArgs {
  DType dtype;
  int64_t steps, width;
  const void *a, *b, *state;  // state may be null: zeros
  void* y;

  // Backward: dy and y given, da and db and dstate (null: not wanted) filled.
  const void *dy, *states;
  void *da, *db, *dstate;
};

// Range: (row, block of kScanWidth columns).
LMFAST_DECLARE_KERNEL(linear_recurrence_fwd, LinearRecurrenceArgs)
LMFAST_DECLARE_KERNEL(linear_recurrence_bwd, LinearRecurrenceArgs)

}  // namespace lmfast
