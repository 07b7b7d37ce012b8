// How the forward of attention is divided over the threads.
#include <memory>

#include "attention_binding.h"
#include "attention_division.h"
#include "scratch.h"

namespace lmfast {

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
  const auto kernel = decoding      ? decode_kernel(a)
                      : on_tiles(a) ? attention_fwd_amx_kernel()
                                    : attention_fwd_kernel();
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
