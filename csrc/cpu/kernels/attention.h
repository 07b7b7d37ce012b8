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

// What keys and values are stored as; a cache may keep them in another type than the queries'.
enum class Stored : int { kF32, kBF16, kF16, kI8 };

// Keys that one entry of a cache's table stands for.
constexpr int64_t kAttentionTableBlock = 64;

// Where a cache differs from a plain tensor.
struct AttentionStorage {
  Stored type;
  // (B, table_row): keys [64 j, 64 j + 64) of batch row b lie in row table[b][j] of k and v, at the
  // same positions; null: in row b.
  const int32_t* table;
  int64_t table_row;
  // (rows, Hkv, keys), last dimension contiguous: what int8 numbers are to be multiplied by.
  const float *key_scales, *value_scales;
  int64_t key_scale_stride[2], value_scale_stride[2];
};

struct AttentionArgs {
  DType dtype;  // of q, out, dout, dq, dk, dv
  AttentionStorage stored;
  int64_t batch, heads, kv_heads, length, keys, head_dim;
  AttentionTensor q, k, v, out;
  // (B, H, T) each, or null: a reference value m of the row's scores (without options, of its
  // products alone), and the sum of e^(score - m); inf and 1 where a row sees no key. As one
  // number, m + log(sum), its rounding would be most of the gradients' error (3e-7 of every
  // probability at 10), and all of it for a mask of -1e9.
  float *reference, *sum;

  // What a query sees: query t of batch row b is at position p = offsets[b] + t; of the first
  // lengths[b] keys it sees those up to p when causal, and those nearer than `window` to p.
  const int64_t* offsets;
  const int64_t* lengths;
  bool causal;
  int64_t window;  // 0: none
  // (B, T, 2) first and past-the-end key that a mask of runs shows, both growing with t; or null.
  const int64_t* runs;
  int64_t runs_batch;  // stride of B; 0 where broadcast

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
  // Of the forward: each range again by `splits` of the keys, which leave their parts in `partial`
  // for attention_combine: (B, Hkv, splits, rows, attention_record_size).
  int64_t splits, keys_per_split;
  float* partial;
};

static inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Query rows of a key/value head.
static inline int64_t attention_rows(const AttentionArgs& a) {
  return a.heads / a.kv_heads * a.length;
}
// What a split leaves per query row: its unnormalised output, padded, its maximum and its sum.
static inline int64_t attention_record_size(const AttentionArgs& a) {
  return round_up(a.head_dim, 32) + 2;
}

// A mask whose last dimension is contiguous; one for all heads.
struct AttentionMaskArgs {
  MaskKind kind;
  const void* mask;
  int64_t length, keys, batch_stride, row_stride;
  int64_t* runs;  // (rows, 2) first and past-the-end key of the row's run; first < 0: not one run
};

struct AttentionBwdArgs {
  AttentionArgs fwd;
  AttentionTensor dout, dq, dk, dv;
  // When ranges > 1, this range's part of dQ, (H / Hkv, dq_rows, dq_width), unscaled; else null.
  float* dq_partial;
  int64_t dq_rows, dq_width;
};

// Parts of dQ of one (batch row, key/value head).
struct AttentionPartsArgs {
  AttentionBwdArgs bwd;
  int64_t pair;
  float* total;
  const float* part;
};

constexpr int64_t kAttentionLanes = 64;  // query rows (forward) or keys (backward) of a block
constexpr int64_t kAttentionChunk = 64;  // rows of scores kept at a time

constexpr int64_t kAttentionDecodeRows = 12;  // most query rows that decoding takes

// Upper bounds on what a unit takes from its scratch.
static inline int64_t attention_fwd_scratch_bytes(const AttentionArgs& a) {
  const int64_t most = a.keys < a.keys_per_split ? a.keys : a.keys_per_split;
  const int64_t keys = round_up(most, 32) + 32, width = round_up(a.head_dim, 32);
  const int64_t lanes = kAttentionLanes, chunk = kAttentionChunk;
  return 2 * keys * width * 4 + lanes * (4 * width + 4 * chunk) * 4 + 96 * 1024;
}
static inline int64_t attention_bwd_scratch_bytes(const AttentionArgs& a) {
  const int64_t width = round_up(a.head_dim, 32), lanes = kAttentionLanes;
  const int64_t rows = round_up(a.length, 32) + 32, keys = round_up(a.keys, lanes) + lanes;
  return rows * (width * 3 * 4 + 3 * 4) + keys * width * 3 * 4 +
         lanes * (4 * width + 5 * kAttentionChunk) * 4 + 160 * 1024;
}

// Ranges: units, (B, Hkv, ranges); the forward's (B, Hkv, ranges, splits), and decoding's (B, Hkv,
// splits). Combining: query rows, (B, H, T). Masks: their rows, (B, T). Adding a part to the total:
// its numbers; storing the total: the heads of its group.
// Where bf16_products.h says so, the _amx kernels take bf16 queries with bf16 or int8 storage, and
// attention_decode_pairs all of them in bf16; attention_decode_bytes takes int8 storage and
// at the AVX-512 levels needs AVX512-VNNI.
LMFAST_DECLARE_KERNEL(attention_fwd, AttentionArgs)
LMFAST_DECLARE_KERNEL(attention_fwd_amx, AttentionArgs)
LMFAST_DECLARE_KERNEL(attention_decode, AttentionArgs)
LMFAST_DECLARE_KERNEL(attention_decode_pairs, AttentionArgs)
LMFAST_DECLARE_KERNEL(attention_decode_bytes, AttentionArgs)
LMFAST_DECLARE_KERNEL(attention_mask_runs, AttentionMaskArgs)
LMFAST_DECLARE_KERNEL(attention_combine, AttentionArgs)
LMFAST_DECLARE_KERNEL(attention_bwd, AttentionBwdArgs)
LMFAST_DECLARE_KERNEL(attention_bwd_amx, AttentionBwdArgs)
LMFAST_DECLARE_KERNEL(attention_add_part, AttentionPartsArgs)
LMFAST_DECLARE_KERNEL(attention_store_parts, AttentionPartsArgs)

}  // namespace lmfast
