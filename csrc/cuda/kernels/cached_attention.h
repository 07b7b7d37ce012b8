// Arguments of the attention of new tokens on a cache, and how the launcher cuts the work.
#pragma once

#include <cstdint>

namespace lmfast::gpu {

constexpr int kCacheThreads = 128;
constexpr int kCacheMaxRows = 4;   // query rows (tokens x heads of a group) of one block
constexpr int kAppendMaxRows = 8;  // and of the blocks that share a key head, appending
constexpr int kCacheMaxHeadDim = 256;
constexpr int kCacheKeysAtOnce = 4;  // per group of lanes, loads under way together
constexpr int kTableBlock = 64;      // keys that one entry of a table stands for

// New tokens that are stored on the way; k null: none, the cache holds them already.
struct CacheAppend {
  const void* k;
  const void* v;        // (B, Hkv, T, D), of q's type
  const float* cos;     // null: nothing is rotated
  const float* sin;     // (table_rows, rotary / 2)
  int64_t k_stride[3];  // batch, head, token
  int64_t v_stride[3];
  int64_t table_rows;
  int rotary;
  bool interleaved;
};

struct CachedAttention {
  const void* q;
  void* keys;
  void* values;
  void* out;
  const int64_t* lengths;  // (B,), the new tokens included
  const int* table;        // (B, blocks); null: storage row b
  float* key_scales;       // int8 only
  float* value_scales;
  const float* sinks;  // (H,) or null
  const float* alibi;
  float* parts;                                        // (B H T, splits, D); null: one split
  float* sums;                                         // (B H T, splits, 2): maximum and sum
  int64_t q_stride[3], out_stride[3];                  // batch, head, token
  int64_t key_stride[3], value_stride[3];              // storage row, head, column
  int64_t key_scale_stride[2], value_scale_stride[2];  // storage row, head
  int64_t table_stride;
  int heads, kv_heads, tokens, head_dim, capacity, stored_rows;
  int window;  // 0: none
  int splits;  // parts of the keys, side by side
  int lanes;   // threads that share a key: a power of two, up to 32
  float softcap, scale;
  CacheAppend append;
};

// Threads that share a key of `head_dim` elements read in vectors of `vector`.
inline int cache_lanes(int head_dim, int vector) {
  int lanes = 1;
  while (lanes < 32 && lanes * vector < head_dim) lanes *= 2;
  return lanes;
}

// Parts of the keys for `blocks` pairs of batch row and key head: enough to fill the
// multiprocessors twice, none for less than 256 keys, and no more than the join can hold.
inline int cache_splits(int64_t blocks, int multiprocessors, int capacity) {
  const int64_t wanted = (2 * multiprocessors + blocks - 1) / blocks;
  const int64_t useful = (capacity + 255) / 256;
  int64_t splits = wanted < useful ? wanted : useful;
  if (splits > 128) splits = 128;
  return splits < 1 ? 1 : static_cast<int>(splits);
}

}  // namespace lmfast::gpu
