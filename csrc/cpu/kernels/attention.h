// Arguments and declarations of the attention kernels (attention_*.cpp). No torch header.
#pragma once

#include "../dispatch.h"
#include "../dtype.h"

namespace lmfast {

// A (B, heads, length, D) tensor whose last dimension is contiguous; strides in elements.
struct AttentionTensor {
  const void* data;
  int64_t batch, head, row;
};

enum class MaskKind : int { kNone, kBool, kF32, kBF16, kF16 };

struct AttentionArgs {
  DType dtype;  // of q, k, v, out, dout, dq, dk, dv
  int64_t batch, heads, kv_heads, length, keys, head_dim;
  AttentionTensor q, k, v, out;
  float* lse;  // (B, H, T) log2 of the sum of e^score; inf where a row sees no key

  // What a query sees: query t of batch row b is at position p = offsets[b] + t; of the first
  // lengths[b] keys it sees those up to p when causal, and those nearer than `window` to p.
  const int64_t* offsets;
  const int64_t* lengths;
  bool causal;
  int64_t window;  // 0: none

  float scale;
  float softcap;       // 0: none; else score -> softcap * tanh(score / softcap)
  const float* alibi;  // (H) slopes, or null: score += slope * (key - p)
  const float* sinks;  // (H) logits of a key without value, or null
  MaskKind mask_kind;
  const void* mask;
  int64_t mask_stride[4];  // of B, H, T, S; 0 where broadcast

  // Of the participating thread, `scratch_bytes` as computed below, 64-byte aligned.
  void* scratch;
  // Units of one (batch row, key/value head): ranges of query rows (forward) or keys (backward).
  int64_t ranges;
};

struct AttentionBwdArgs {
  AttentionArgs fwd;
  AttentionTensor dout, dq, dk, dv;
  // (B, Hkv, ranges, H / Hkv, T, dq_width) float partial sums when ranges > 1; else null.
  float* dq_partial;
  int64_t dq_width;
};

struct AttentionReduceArgs {
  AttentionBwdArgs bwd;
};

// Partial results of decoding: every split of the keys leaves, per query row, its maximum, sum and
// unnormalised output; attention_combine adds them in order.
struct AttentionDecodeArgs {
  AttentionArgs fwd;
  int64_t splits, keys_per_split;
  float* partial;  // (B, Hkv, splits, rows, head_dim rounded up to 16, and 2)
};

constexpr int64_t kAttentionLanes = 64;  // query rows (forward) or keys (backward) of a block
constexpr int64_t kAttentionChunk = 64;  // rows of scores kept at a time

constexpr int64_t kAttentionDecodeRows = 8;  // query rows that decoding takes at once

static inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Upper bounds on what a unit takes from its scratch.
static inline int64_t attention_fwd_scratch_bytes(const AttentionArgs& a) {
  const int64_t keys = round_up(a.keys, 32) + 32, width = round_up(a.head_dim, 32);
  const int64_t lanes = kAttentionLanes, chunk = kAttentionChunk;
  return 2 * keys * width * 4 + lanes * (4 * width + 4 * chunk) * 4 + 96 * 1024;
}
static inline int64_t attention_bwd_scratch_bytes(const AttentionArgs& a) {
  const int64_t width = round_up(a.head_dim, 32), lanes = kAttentionLanes;
  const int64_t rows = round_up(a.length, 32) + 32, keys = round_up(a.keys, lanes) + lanes;
  return rows * (width * 3 * 4 + 2 * 4) + keys * width * 3 * 4 +
         lanes * (4 * width + 5 * kAttentionChunk) * 4 + 160 * 1024;
}

LMFAST_DECLARE_KERNEL(attention_fwd, AttentionArgs)            // range: units, (B, Hkv, ranges)
LMFAST_DECLARE_KERNEL(attention_bwd, AttentionBwdArgs)         // range: units, (B, Hkv, ranges)
LMFAST_DECLARE_KERNEL(attention_reduce, AttentionReduceArgs)   // range: query rows, (B, H, T)
LMFAST_DECLARE_KERNEL(attention_decode, AttentionDecodeArgs)   // range: units, (B, Hkv, splits)
LMFAST_DECLARE_KERNEL(attention_combine, AttentionDecodeArgs)  // range: query rows, (B, H, T)

}  // namespace lmfast
