// Arguments and declaration of the rotary-embedding kernel (rope.cpp). No torch header.
#pragma once

#include "../dispatch.h"
#include "../dtype.h"

namespace lmfast {

// One of q and k: (B, heads, T, D), any strides of B, heads and T (in elements), D contiguous.
struct RopeTensor {
  const void* in;
  void* out;  // may equal `in`
  int64_t heads;
  int64_t in_stride[3];
  int64_t out_stride[3];
};

struct RopeArgs {
  DType dtype;
  bool fp64_tables;  // cos and sin are double (kF64 only); float otherwise
  bool interleaved;  // pairs (2p, 2p+1); otherwise (p, p + rotary/2)
  bool inverse;      // rotate by the negative angle: the backward
  int64_t batch, length, head_dim, rotary;
  const void* cos;  // (positions, rotary / 2), contiguous
  const void* sin;
  // The position of token t of row b is offset + t, starts[b] + t, or positions[b * length + t].
  int64_t offset;
  const int64_t* starts;
  const int64_t* positions;
  RopeTensor q, k;
  bool heads_innermost;  // walk heads within a token (B, T, H, D in memory) or tokens within a head
};

LMFAST_DECLARE_KERNEL(rope, RopeArgs)  // range: batch * (q heads + k heads) * length vectors

}  // namespace lmfast
