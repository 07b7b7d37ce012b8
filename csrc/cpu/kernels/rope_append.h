// Arguments and declaration of the kernel that rotates new queries and keys and stores the keys and
// values in a cache (rope_append.cpp). No torch header.
#pragma once

#include "../dispatch.h"
#include "../dtype.h"

namespace lmfast {

// (B, heads, T, D), any strides of B, heads and T (in elements), D contiguous.
struct NewTokens {
  const void* data;
  int64_t heads;
  int64_t stride[3];
};

// (rows, heads, columns, D), any strides of the first three (in elements), D contiguous.
struct CacheStorage {
  void* data;
  int64_t stride[3];
  float* scales;  // (rows, heads, columns) of int8 storage, one per vector; null otherwise
  int64_t scale_stride[3];
};

constexpr int64_t kMaxAppendHeadDim = 1024;  // of int8 storage, which gathers a vector first

struct RopeAppendArgs {
  DType dtype;       // of q, k and v
  DType storage;     // of keys and values, unless `quantised`
  bool quantised;    // int8 with scales
  bool rotated;      // cos and sin are given
  bool fp64_tables;  // cos and sin are double (kF64 only); float otherwise
  bool interleaved;  // pairs (2p, 2p+1); otherwise (p, p + rotary/2)
  int64_t length, head_dim, rotary;
  int64_t q_vectors;  // batch * T * heads of q; 0 when there is nothing to rotate
  const void* cos;    // (positions, rotary / 2), contiguous
  const void* sin;
  // The position of token t of row b is offset + t, starts[b] + t, or positions[b * length + t].
  int64_t offset;
  const int64_t* starts;
  const int64_t* positions;
  // Entry n of `slots` is where token tokens[n], or n, counted as b * length + t, goes: row *
  // columns + column.
  const int64_t* slots;
  const int64_t* tokens;
  int64_t columns;
  NewTokens q, k, v;  // q is overwritten
  CacheStorage keys, values;
};

// Range: the vectors of q, then for each slot the kv heads of k and v, (k, v) after (k, v).
LMFAST_DECLARE_KERNEL(rope_append, RopeAppendArgs)

}  // namespace lmfast
