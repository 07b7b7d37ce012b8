// Arguments and declarations of the fp32 linear cross-entropy kernels (linear_cross_entropy.cpp).
// No torch header.
#pragma once

#include "../dispatch.h"
#include "../dtype.h"

namespace lmfast {

// What one call computes; shared by the fp32 kernels and the AMX ones.
struct LceProblem {
  DType hidden_dtype, weight_dtype;
  int64_t tokens;   // rows that are not ignored
  int64_t width;    // E
  int64_t classes;  // V
  const void* hidden;
  int64_t hidden_stride;      // of rows; elements are neighbours
  const int64_t* row;         // token -> row of hidden and dhidden
  const int64_t* target;      // token -> class
  const float* scale;         // token -> incoming gradient of its loss
  const void* weight;         // [V, E]
  int64_t weight_row_stride;  // of classes; one of the two strides is 1
  int64_t weight_column_stride;
  const float* bias;         // (V,) or null
  const float* mean_weight;  // (E,) mean over classes; only with smoothing
  double mean_bias;
  float smoothing, z_loss, softcap;  // 0: none; no smoothing together with a cap
  double* loss;                      // token -> its loss
  void* dhidden;                     // (rows, E) contiguous, hidden's dtype; null: not wanted
};

// Lanes and columns are padded to whole groups of this many, at every instruction-set level.
constexpr int64_t kLceGroup = 16;

// One block of tokens at a time; `lanes` tokens side by side are the vector dimension.
struct LceBlockArgs {
  LceProblem p;
  int64_t first_token, tokens, lanes;  // tokens <= lanes; the lanes behind are padding
  int64_t slices;                      // of the vocabulary, for threads
  bool redo;                           // centers are the largest logits, not the targets'
  float* hidden_t;                     // [E][lanes]
  float* target_logit;                 // [lanes]
  float* target_slope;                 // [lanes]: of the cap at the target's logit
  float* center;     // [lanes]: subtracted from logits before they are exponentiated
  bool* overflow;    // [lanes / kLceGroup]: some sum is not finite or nearly so
  float* probs;      // [V][lanes]: exp(logit - center), 0 at the target; null: not kept
  float* sums;       // [slices][lanes]: of probs; from lce_block_max: largest logits
  float* dhidden_t;  // [slices][dhidden_rows][lanes]: sums of weight rows, weighted by probs, or
  int64_t dhidden_rows;  // null; E or more
  bool dhidden_panels;   // it is [slices][lanes / 16][dhidden_rows][16]
  // What lce_block_finish leaves for the weight gradient (dweight or dbias is wanted):
  float* hidden_scaled;    // [lanes][padded_width]: hidden * coefficient
  int64_t padded_width;    // E in whole groups
  float* coefficient;      // [lanes]: gradient by a logit, per unit of probs
  float* target_gradient;  // [lanes]: gradient by the target's logit, without `uniform`
  float* dweight;          // [V][padded_width]; null: not wanted
  float* dbias;            // [V]; null: not wanted
  bool accumulate;         // dweight and dbias hold the sums of earlier blocks
  const float* uniform;    // (padded_width,) weight gradient of every class (smoothing), or null
  float uniform_bias;
  // In the place of hidden_t, probs and hidden_scaled where products are in bf16; words are pairs
  // of bf16, the panels of dots_bf16.h.
  char* hidden_pairs;  // [lanes / 16][padded_width / 2][16 words]: pairs of columns
  char* probs_rows;    // [V in whole blocks][lanes] bf16; null: not kept
  char* scaled_pairs;  // [padded_width / 16][lanes / 2][16 words]: pairs of tokens
  char* scratch;       // lce_bf16_layout().bytes of the thread
};

// Classes at a time where products are in bf16, and the block of them and of lanes whose logits are
// exponentiated at once.
constexpr int64_t kLceBf16Chunk = 256;
constexpr int64_t kLceBf16Block = 32;

// A thread's memory for a chunk, in bytes: weight rounded to bf16, as rows and as pairs of rows,
// and the chunk's probs as pairs of classes.
struct LceBf16Layout {
  int64_t rows, columns;          // of weight as it lies in memory, padded
  int64_t row_bytes, pair_bytes;  // not powers of two: rows would meet in one cache set
  int64_t pairs, probs, bytes;    // where they begin; rows are first
};
inline LceBf16Layout lce_bf16_layout(const LceBlockArgs& a) {
  const bool transposed = a.p.weight_column_stride != 1;
  const int64_t width = (a.padded_width + 31) / 32 * 32;
  LceBf16Layout at;
  at.rows = transposed ? a.padded_width : kLceBf16Chunk;
  at.columns = transposed ? kLceBf16Chunk : width;
  at.row_bytes = 2 * at.columns + 64;
  at.pair_bytes = 4 * at.columns + 64;
  at.pairs = at.rows * at.row_bytes;
  at.probs = at.pairs + at.rows / 2 * at.pair_bytes;
  at.bytes = at.probs + kLceBf16Chunk / 2 * a.lanes * 4;
  return at;
}

// dweight in fp32 [V][padded_width] -> the weight's dtype and strides.
struct LceConvertArgs {
  DType dtype;
  int64_t width, padded_width;
  const float* from;
  void* to;
  int64_t row_stride, column_stride;
};

// out = factor * sum over tokens of scale * hidden: the gradient that smoothing gives every class.
struct LceHiddenSumArgs {
  LceProblem p;
  float factor;
  float* out;  // whole groups
};

LMFAST_DECLARE_KERNEL(lce_block_pack, LceBlockArgs)     // range: groups of lanes
LMFAST_DECLARE_KERNEL(lce_block_max, LceBlockArgs)      // range: slices
LMFAST_DECLARE_KERNEL(lce_block_center, LceBlockArgs)   // range: groups of lanes
LMFAST_DECLARE_KERNEL(lce_block_forward, LceBlockArgs)  // range: slices
LMFAST_DECLARE_KERNEL(lce_block_finish, LceBlockArgs)   // range: groups of lanes
LMFAST_DECLARE_KERNEL(lce_block_dweight, LceBlockArgs)  // range: slices
// bf16 products (linear_cross_entropy_bf16.cpp), in the places of those above; lce_block_pack,
// lce_block_center and lce_block_finish serve both.
LMFAST_DECLARE_KERNEL(lce_bf16_pack, LceBlockArgs)       // range: groups of columns of hidden
LMFAST_DECLARE_KERNEL(lce_bf16_max, LceBlockArgs)        // range: slices
LMFAST_DECLARE_KERNEL(lce_bf16_forward, LceBlockArgs)    // range: slices
LMFAST_DECLARE_KERNEL(lce_bf16_scale, LceBlockArgs)      // range: groups of columns of hidden
LMFAST_DECLARE_KERNEL(lce_bf16_dweight, LceBlockArgs)    // range: slices
LMFAST_DECLARE_KERNEL(lce_hidden_sum, LceHiddenSumArgs)  // range: groups of columns
LMFAST_DECLARE_KERNEL(lce_convert, LceConvertArgs)       // range: classes

}  // namespace lmfast
