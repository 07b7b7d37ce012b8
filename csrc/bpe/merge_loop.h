// Merging up to 64 symbols, with what differs between instruction sets left to Ops.
//
// Symbols stay where they are: `alive` has a bit for each that begins a token. A key is rank << 6 |
// index of the pair that a symbol begins, so that the smallest key is the next merge: lowest rank,
// leftmost first.
#pragma once
#include "kernels.h"
#include "rank_table.h"

namespace lmfast::bpe {
namespace {

inline uint32_t merge_key(uint32_t rank, size_t at) {
  return rank == kNoRank ? kNoRank : rank << 6 | static_cast<uint32_t>(at);
}

// Symbols and keys of n symbols; keys[n - 1, padded) become kNoRank.
template <class Ops>
void first_keys(const RankTable& table, const uint8_t* bytes, uint32_t* ids, size_t n,
                size_t padded, uint32_t* keys) {
  for (size_t i = n - 1; i < padded; ++i) keys[i] = kNoRank;
  if (bytes != nullptr) {
    for (size_t i = 0; i < n; ++i) ids[i] = table.byte_symbols[bytes[i]];
    for (size_t i = 0; i + 1 < n; ++i) {
      keys[i] = table.byte_pairs[bytes[i] << 8 | bytes[i + 1]] | static_cast<uint32_t>(i);
    }
    return;
  }
  for (size_t i = 0; i + 1 < n; ++i) keys[i] = merge_key(Ops::find(table, ids[i], ids[i + 1]), i);
}

// Fetches what merging that pair would look up, if its neighbours stay what they are: the ranks of
// GPT-2's merges do not stay in an L2 of 1 MB. First passes on a Zen 4: English 7.6 -> 7.1 ms,
// 200,000 words of random letters 54.9 -> 52.8 ms.
inline void fetch(const RankTable& table, const uint32_t* ids, uint64_t alive, uint32_t key) {
  if (key == kNoRank) return;
  const size_t at = key & 63;
  const uint32_t id = table.id(key >> 6);
  uint64_t after = alive & (~1ull << at);
  after &= after - 1;
  const size_t right = after == 0 ? at : static_cast<size_t>(__builtin_ctzll(after));
  const uint64_t before = alive & ~(~0ull << at);
  const size_t left = before == 0 ? at : 63 - static_cast<size_t>(__builtin_clzll(before));
  __builtin_prefetch(table.slots + kLineSlots * line_of(table, pair_key(id, ids[right])));
  __builtin_prefetch(table.slots + kLineSlots * line_of(table, pair_key(ids[left], id)));
}

// `Keys` holds the keys: smallest(), set(at, key) and, if kAhead, smallest_above(key).
template <class Ops, class Keys>
uint64_t merge_loop(const RankTable& table, uint32_t* ids, Keys& keys, size_t n) {
  uint64_t alive = n == 64 ? ~0ull : (1ull << n) - 1;
  for (;;) {
    const uint32_t key = keys.smallest();
    if (key == kNoRank) return alive;
    if constexpr (Keys::kAhead) fetch(table, ids, alive, keys.smallest_above(key));
    const size_t at = key & 63;
    const uint32_t id = table.id(key >> 6);
    ids[at] = id;
    uint64_t after = alive & (~1ull << at);
    const size_t gone = static_cast<size_t>(__builtin_ctzll(after));
    after &= after - 1;
    alive &= ~(1ull << gone);
    keys.set(gone, kNoRank);
    const uint32_t right = after == 0 ? kNoRank : Ops::find(table, id, ids[__builtin_ctzll(after)]);
    keys.set(at, merge_key(right, at));
    const uint64_t before = alive & ~(~0ull << at);
    if (before != 0) {
      const size_t left = 63 - static_cast<size_t>(__builtin_clzll(before));
      keys.set(left, merge_key(Ops::find(table, ids[left], id), left));
    }
  }
}

}  // namespace
}  // namespace lmfast::bpe
