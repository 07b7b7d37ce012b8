// How the forward of attention is divided over the threads.
#include <memory>

#include "attention_binding.h"
#include "scratch.h"

namespace lmfast {
namespace {

// The division depends on shapes and lengths only, never on the number of threads, and so does the
// result.
constexpr int64_t kUnits = 64;  // that let threads even out
constexpr int64_t kFewUnits = 16;

// Whether rows are taken one by one (attention_decode.cpp) or as lanes of blocks. At 2048 keys of
// 64 the first is faster up to 12 rows in fp32, and up to 5 where AMX multiplies the blocks.
bool is_decoding(const AttentionArgs& a) {
  if (a.sum != nullptr) return false;
  const bool amx = a.dtype == DType::kBF16 && current_isa() == Isa::kAmx &&
                   (a.stored.type == Stored::kBF16 || a.stored.type == Stored::kI8);
  return attention_rows(a) <= (amx ? 5 : kAttentionDecodeRows);
}

// Ranges of query rows: each repeats the packing of the keys, so not too short.
int64_t query_ranges(const AttentionArgs& a) {
  constexpr int64_t kRowsPerRange = 256;
  const int64_t pairs = std::max<int64_t>(1, a.batch * a.kv_heads);
  return std::max<int64_t>(1, std::min(kUnits / pairs, attention_rows(a) / kRowsPerRange));
}

// Splits of the keys. Each repeats the packing of the queries and leaves a part of the result to be
// added: 4 splits of 512 keys cost 10 % more than one of 2048 for 4 rows to a head, 30 % for 64.
void set_splits(AttentionArgs& a, int64_t longest) {
  const int64_t units = a.batch * a.kv_heads * a.ranges;
  const int64_t least = units < kFewUnits ? 1024 : 4096;
  const int64_t most = std::max<int64_t>(1, kUnits / units);
  const int64_t wanted = std::max<int64_t>(1, std::min(most, longest / least));
  a.keys_per_split = std::max<int64_t>(64, round_up((longest + wanted - 1) / wanted, 64));
  a.splits = std::max<int64_t>(1, (longest + a.keys_per_split - 1) / a.keys_per_split);
}

}  // namespace

void run_attention(AttentionArgs& a) {
  const int64_t pairs = a.batch * a.kv_heads, rows = attention_rows(a);
  if (pairs == 0 || rows == 0) return;
  const bool decoding = is_decoding(a);
  const int64_t longest = *std::max_element(a.lengths, a.lengths + a.batch);
  a.ranges = decoding ? 1 : query_ranges(a);
  set_splits(a, longest);
  const int64_t records = rows * attention_record_size(a) * static_cast<int64_t>(sizeof(float));
  const bool parts = a.splits > 1;
  const ScratchMemory partial = allocate_scratch(parts ? pairs * a.splits * records : 0);
  a.partial = parts ? static_cast<float*>(partial.get()) : nullptr;
  // The thread that finishes the last unit of a pair adds its parts, in order.
  std::unique_ptr<std::atomic<int64_t>[]> left;
  if (parts) {
    left = std::make_unique<std::atomic<int64_t>[]>(static_cast<size_t>(pairs));
    for (int64_t i = 0; i < pairs; ++i) left[i] = a.ranges * a.splits;
  }
  const auto kernel = decoding ? attention_decode_kernel() : attention_fwd_kernel();
  const auto combine = attention_combine_kernel();
  const int64_t per_pair = a.ranges * a.splits;
  const int64_t scratch = decoding ? records : attention_fwd_scratch_bytes(a);
  const int64_t work = std::min(longest, a.keys_per_split) * a.head_dim * rows / a.ranges;
  for_each_unit(
      pairs * per_pair, scratch,
      [&](void* memory, int64_t unit) {
        AttentionArgs mine = a;
        mine.scratch = memory;
        if (decoding && !parts) mine.partial = static_cast<float*>(memory);
        kernel(mine, unit, unit + 1);
        const int64_t pair = unit / per_pair;
        if (parts ? left[pair].fetch_sub(1) == 1 : decoding) {
          combine(mine, pair * rows, (pair + 1) * rows);
        }
      },
      grain_size(work));
}

}  // namespace lmfast
