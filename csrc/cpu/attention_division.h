// How the forward of attention is divided: by shapes and lengths only, never by the number of
// threads, and so neither is the result.
#pragma once

#include <algorithm>

#include "bf16_products.h"
#include "kernels/attention.h"

namespace lmfast {

constexpr int64_t kAttentionUnits = 64;  // that let threads even out
constexpr int64_t kFewAttentionUnits = 16;

// Whether blocks are multiplied as tiles of bf16 (attention_fwd_amx.cpp).
inline bool on_tiles(const AttentionArgs& a) {
  const Isa isa = current_isa();
  return a.dtype == DType::kBF16 &&
         (a.stored.type == Stored::kBF16 || a.stored.type == Stored::kI8) &&
         (isa == Isa::kAmx || (isa == Isa::kAvx512 && has_bf16_products()));
}

// Whether rows are taken one by one (attention_decode.cpp) or as lanes of blocks. At 2048 keys of
// 64 the first is faster up to 12 rows in fp32, and up to 5 where AMX multiplies the blocks.
inline bool is_decoding(const AttentionArgs& a) {
  if (a.sum != nullptr) return false;  // a backward recomputes the scores as blocks have them
  const bool amx = on_tiles(a) && current_isa() == Isa::kAmx;
  return attention_rows(a) <= (amx ? 5 : kAttentionDecodeRows);
}

inline attention_decode_fn decode_kernel(const AttentionArgs& a) {
  const bool pairs = on_tiles(a) && a.stored.type == Stored::kBF16;
  if (pairs) return attention_decode_pairs_kernel();
  const bool bytes = a.stored.type == Stored::kI8 && has_byte_products();
  return bytes ? attention_decode_bytes_kernel() : attention_decode_kernel();
}

// Ranges of query rows: each repeats the packing of the keys, so not too short.
inline int64_t query_ranges(const AttentionArgs& a) {
  constexpr int64_t kRowsPerRange = 256;
  const int64_t pairs = std::max<int64_t>(1, a.batch * a.kv_heads);
  return std::max<int64_t>(1, std::min(kAttentionUnits / pairs, attention_rows(a) / kRowsPerRange));
}

// Splits of the keys. Each repeats the packing of the queries and leaves a part of the result to be
// added: 4 splits of 512 keys cost 10 % more than one of 2048 for 4 rows to a head, 30 % for 64.
inline void set_splits(AttentionArgs& a, int64_t longest) {
  const int64_t units = a.batch * a.kv_heads * a.ranges;
  const int64_t least = units < kFewAttentionUnits ? 1024 : 4096;
  const int64_t most = std::max<int64_t>(1, kAttentionUnits / units);
  const int64_t wanted = std::max<int64_t>(1, std::min(most, longest / least));
  a.keys_per_split = std::max<int64_t>(64, round_up((longest + wanted - 1) / wanted, 64));
  a.splits = std::max<int64_t>(1, (longest + a.keys_per_split - 1) / a.keys_per_split);
}

}  // namespace lmfast
