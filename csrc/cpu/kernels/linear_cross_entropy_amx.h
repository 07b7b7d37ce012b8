// Arguments and declarations of the AMX linear cross-entropy kernels
// (linear_cross_entropy_amx.cpp). No torch header. The levels below have empty ones, which the
// binding does not call.
#pragma once

#include "linear_cross_entropy.h"

namespace lmfast {

constexpr int64_t kLceLanes = 64;  // tokens, or classes, side by side: four tiles
constexpr int64_t kLceMaxChunk = 256;

struct LceAmxArgs {
  LceProblem p;
  int64_t parts;      // bf16 numbers that a factor is split into: 1, or 3 for fp32 accuracy
  int64_t depth;      // E in whole tile rows of 32
  int64_t row_bytes;  // of a packed stream row
  int64_t out_tiles;  // of 16 accumulator rows, even: E, and the bias gradient's behind it
  int64_t chunk;      // stream rows at a time
  int64_t groups;     // of kLceLanes lanes
  int64_t workers;    // share the groups evenly
  int64_t groups_at_once;
  char* scratch;  // worker_bytes each
  int64_t worker_bytes;
  const float* target_rows;  // [E][padded_tokens]: the weight row of each token's target
  int64_t padded_tokens;
  bool want_product;  // dhidden in the pass over tokens
  // From the pass over tokens to the one over classes, per token:
  float* center;           // subtracted from the logits: their logsumexp, or near it
  float* weight;           // gradient by a logit, per unit of exp(logit - center)
  float* target_gradient;  // gradient by the target's logit
  // The pass over classes:
  char* packed;  // hidden as stream chunks, packed_bytes each
  int64_t packed_bytes;
  float shared_weight;  // that of all tokens; 0: they differ and are multiplied into the packing
  const int64_t* by_group;     // tokens, sorted by their target's group
  const int64_t* group_begin;  // groups + 1 positions in by_group
  void* dweight;               // in the weight's dtype; null: not wanted
  int64_t dweight_row_stride, dweight_column_stride;
  float* dbias;          // null: not wanted
  const float* uniform;  // (E,) weight gradient of every class (smoothing), or null
  float uniform_bias;
};

// Where things lie in a packed chunk and in a worker's scratch, in bytes.
struct LceAmxLayout {
  int64_t columns, add, chunk;                            // of a chunk; its end
  int64_t probs, logits, rows, groups;                    // of scratch, behind a chunk
  int64_t group_acc, group_add, group_sums, group_bytes;  // of a group in scratch
};
inline LceAmxLayout lce_amx_layout(const LceAmxArgs& a) {
  constexpr int64_t kTile = 1024;
  LceAmxLayout at;
  at.columns = a.parts * a.chunk * a.row_bytes;
  at.add = at.columns + a.chunk / 32 * a.out_tiles * a.parts * kTile;
  at.chunk = at.add + a.chunk * 4;
  at.probs = at.chunk;
  at.logits = at.probs + a.chunk / 32 * 4 * a.parts * kTile;
  at.rows = at.logits + 2 * 16 * kLceLanes * 4;
  at.groups = at.rows + 16 * a.depth * 4;
  at.group_acc = a.depth / 32 * 4 * a.parts * kTile;
  at.group_add = at.group_acc + a.out_tiles * 16 * kLceLanes * 4;
  at.group_sums = at.group_add + kLceLanes * 4;
  at.group_bytes = at.group_sums + kLceLanes * 4;
  return at;
}

LMFAST_DECLARE_KERNEL(lce_amx_target_rows, LceAmxArgs)  // range: 16 columns of weight
LMFAST_DECLARE_KERNEL(lce_amx_tokens, LceAmxArgs)       // range: workers
LMFAST_DECLARE_KERNEL(lce_amx_pack, LceAmxArgs)         // range: chunks of tokens
LMFAST_DECLARE_KERNEL(lce_amx_classes, LceAmxArgs)      // range: workers

}  // namespace lmfast
