// Arguments and declarations of the additive attention kernels. No torch header.
#pragma once

#include "../dispatch.h"
#include "../dtype.h"

namespace lmfast {

constexpr int64_t kAdditiveRows = 8;       // query rows of a forward unit
constexpr int64_t kAdditiveKeyBlock = 64;  // keys summed up before they join a longer sum

// Queries (B, T, A), v (A,), weights and their gradients are float and contiguous. Keys (B, S, A),
// values (B, S, D) and what has their shape are of `dtype` with unit stride in the last dimension.
struct AdditiveAttentionArgs {
  DType dtype;  // not kF64
  int64_t batch, queries, keys, score_dim, value_dim;
  const float* query;
  const void* key;
  int64_t key_batch, key_row;
  const void* value;
  int64_t value_batch, value_row;
  const float* v;
  const uint8_t* mask;  // (B, S), 0 hides a key; null: every key is seen
  float* weights;       // (B, T, S)
  void* context;        // (B, T, D), contiguous
  float* scratch;       // forward: kAdditiveRows x padded S; backward: 2 T x A and 2 A
  int32_t* visible;     // S

  // Backward.
  const void* dcontext;  // (B, T, D)
  int64_t dcontext_batch, dcontext_row;
  const float* dweights;  // (B, T, S) or null
  float* dscores;         // (B, T, S)
  int64_t blocks;         // parts the keys of a sequence are split into
  float* dquery;          // (B, blocks, T, A), contiguous
  float* dv;              // (B, blocks, A)
  void *dkey, *dvalue;    // (B, S, A) and (B, S, D), contiguous
};

// Range: (sequence, block of kAdditiveRows query rows). Scratch of a unit is the caller's.
LMFAST_DECLARE_KERNEL(additive_attention_fwd, AdditiveAttentionArgs)
// The gradients of the scores. Range: (sequence, query row).
LMFAST_DECLARE_KERNEL(additive_attention_bwd_scores, AdditiveAttentionArgs)
// Everything else from them. Range: (sequence, block of keys).
LMFAST_DECLARE_KERNEL(additive_attention_bwd, AdditiveAttentionArgs)

}  // namespace lmfast
