// Portable kernels: the scalar scanner and 64-bit arithmetic.
#include "encode_loop.h"
#include "lines.h"
#include "merge_loop.h"

namespace lmfast::bpe {
namespace {

uint32_t hash_key(PieceKey key) {
  // Both halves of a 128-bit product. Two products xor-ed spread worse: 3.8 times the conflicts.
  const uint64_t a = key.low ^ 0x9E3779B97F4A7C15ull, b = key.high ^ 0xD6E8FEB86659FD93ull;
  return static_cast<uint32_t>(fold_product(a, b));
}

template <class Unit>
size_t narrow(const Unit* units, size_t n, uint8_t* out) {
  constexpr size_t kBlock = 16;
  size_t done = 0;
  for (; done + kBlock <= n; done += kBlock) {
    Unit any = 0;
    for (size_t i = 0; i < kBlock; ++i) any |= units[done + i];
    if (any >= 0x80) break;
    for (size_t i = 0; i < kBlock; ++i) out[done + i] = static_cast<uint8_t>(units[done + i]);
  }
  return done;
}

// The keys of a merge in memory.
struct ArrayKeys {
  uint32_t keys[kMergeSymbols];
  size_t n;
  static constexpr bool kAhead = false;
  uint32_t smallest() const {
    uint32_t least = kNoRank;
    for (size_t i = 0; i < n; ++i) least = keys[i] < least ? keys[i] : least;
    return least;
  }
  void set(size_t at, uint32_t key) { keys[at] = key; }
};

struct DefaultOps {
  static uint32_t find(const RankTable& table, uint32_t left, uint32_t right) {
    return find_rank(table, left, right);
  }

  static uint32_t key(const uint8_t* piece, size_t row, PieceKey* key) {
    *key = piece_key_at(piece, row);
    return hash_key(*key);
  }

  static uint32_t probe(const CacheBucket& bucket, const PieceKey& key, uint32_t* out) {
    const auto differ = [&key](const PieceKey& k) {
      return (k.low ^ key.low) | (k.high ^ key.high);
    };
    // Arithmetic, not conditions: which way holds a piece is random.
    const uint32_t second = differ(bucket.key[1]) == 0;
    const uint32_t hit = second | static_cast<uint32_t>(differ(bucket.key[0]) == 0);
    const uint32_t* ids = bucket.ids[second];
    std::memcpy(out, ids, 16);
    const uint32_t count = out[0] >> 24;
    out[0] &= 0xFFFFFF;
    out[3] &= 0u - hit;
    return count & (0u - hit);
  }

  static uint32_t match(const CountBucket& bucket, const PieceKey& key) {
    const auto is = [&](size_t way) -> uint32_t {
      return ((bucket.key[way].low ^ key.low) | (bucket.key[way].high ^ key.high)) == 0;
    };
    return is(0) | is(1) << 2 | is(2) << 4;
  }
};

size_t scan_default(Pattern pattern, const uint8_t* text, size_t n, uint16_t* starts,
                    uint16_t* ends) {
  size_t count = 0;
  if (pattern == Pattern::kNone || pattern == Pattern::kLines) return 0;
  const size_t limit = n + kPadding / 2;
  const bool maybe_open = text[limit - 1] <= ' ' || text[limit - 1] >= 0x80;
  for (size_t pos = 0; pos < n;) {
    const Piece piece = next_piece(pattern, text, pos, limit);
    if (piece.start >= n) break;
    // A piece that reaches the limit may go on, and how whitespace is cut depends on its end.
    if (piece.end + 8 >= limit || (maybe_open && all_space(text, piece.start, limit))) {
      starts[count++] = static_cast<uint16_t>(piece.start);
      break;
    }
    starts[count] = static_cast<uint16_t>(piece.start);
    if (ends) ends[count] = static_cast<uint16_t>(piece.end);
    ++count;
    pos = piece.end;
  }
  return count;
}

uint32_t* encode_default(const EncodeContext& context, const uint8_t* text, PieceSpans pieces,
                         uint32_t* out) {
  return encode_loop<DefaultOps>(context, text, pieces, out);
}

uint64_t merge_default(const RankTable& table, const uint8_t* bytes, uint32_t* ids, size_t n) {
  ArrayKeys keys;
  keys.n = n;
  first_keys<DefaultOps>(table, bytes, ids, n, n, keys.keys);
  return merge_loop<DefaultOps>(table, ids, keys, n);
}

}  // namespace

const Kernels kDefaultKernels = {
    "default", narrow<uint16_t>, narrow<uint32_t>,      leading_spaces_of,           copy_line_to,
    hash_key,  scan_default,     keys_loop<DefaultOps>, find_words_loop<DefaultOps>, merge_default,
    nullptr,   encode_default};

}  // namespace lmfast::bpe
