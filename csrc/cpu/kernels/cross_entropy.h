// Arguments and declaration of the cross-entropy kernel on given logits (cross_entropy.cpp). No
// torch header.
#pragma once

#include "../dispatch.h"
#include "../dtype.h"

namespace lmfast {

struct CrossEntropyArgs {
  DType dtype;                       // of logits and dlogits
  int64_t classes, stride, dstride;  // strides of rows
  const void* logits;
  const int64_t* targets;
  int64_t ignore_index;
  double smoothing, z_loss;
  double* loss;         // per row, 0 where ignored
  void* dlogits;        // may be logits; null: not wanted
  const double* scale;  // per row: incoming gradient
};

LMFAST_DECLARE_KERNEL(cross_entropy_rows, CrossEntropyArgs)  // range: rows

}  // namespace lmfast
