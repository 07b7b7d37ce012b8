// The loop over pieces: key, hash, prefetch; then probe and emit. Included once per instruction
// set.
//
// Bound: about 12 cycles for a piece of 4.3 bytes; instructions, not memory, while the table stays
// in L2. Measured on prose: two loops instead of one +10 to 26 %; one branch for everything that is
// not a plain hit; the ids are stored as 16 bytes whatever their number. A sub-batch of 32 to 512
// pieces makes no difference.
#pragma once
#include <cstring>

#include "hash.h"
#include "kernels.h"

namespace lmfast::bpe {
namespace {

// Byte masks and length bytes of a key by min(size, 16): entry 16 is for longer pieces, whose
// length byte matches no entry of the cache.
struct KeyMasks {
  alignas(64) uint8_t bytes[17][16];
  alignas(64) uint8_t length[17][16];
  constexpr KeyMasks() : bytes(), length() {
    for (int n = 0; n <= 16; ++n) {
      for (int i = 0; i < 15; ++i) bytes[n][i] = i < n ? 255 : 0;
      length[n][15] = n > 15 ? 255 : static_cast<uint8_t>(n);
    }
  }
};
constexpr KeyMasks kKeyMasks;

// The key of a piece; 16 bytes are read. `at` is 16 * min(size, 16).
inline PieceKey piece_key_at(const uint8_t* piece, size_t at) {
  PieceKey key, mask, length;
  std::memcpy(&key, piece, 16);
  std::memcpy(&mask, &kKeyMasks.bytes[0][0] + at, 16);
  std::memcpy(&length, &kKeyMasks.length[0][0] + at, 16);
  key.low = (key.low & mask.low) | length.low;
  key.high = (key.high & mask.high) | length.high;
  return key;
}

inline PieceKey piece_key(const uint8_t* piece, size_t size) {
  return piece_key_at(piece, 16 * (size < 16 ? size : 16));
}

template <class Ops>
void keys_loop(const CountTable& table, const uint8_t* text, PieceSpans pieces, PieceKey* keys,
               uint32_t* hashes) {
  for (size_t i = 0; i < pieces.count; ++i) {
    const size_t size = static_cast<size_t>(pieces.end[i] - pieces.start[i]);
    hashes[i] = Ops::key(text + pieces.start[i], 16 * (size < 16 ? size : 16), keys + i);
    __builtin_prefetch(table.buckets + (hashes[i] & table.mask));
  }
}

// Which of the three words it is, is not predictable: bit 2 * way of the match says it without a
// branch. With one comparison of the whole line 16 MB of code are counted in 26.8 instead of 29.5
// ms.
template <class Ops>
size_t find_words_loop(const CountTable& table, const PieceKey* keys, const uint32_t* hashes,
                       size_t n, uint32_t* words) {
  for (size_t i = 0; i < n; ++i) {
    const CountBucket& bucket = table.buckets[hashes[i] & table.mask];
    const uint32_t match = Ops::match(bucket, keys[i]);
    if (__builtin_expect(match == 0, 0)) return i;
    words[i] = bucket.word[static_cast<uint32_t>(__builtin_ctz(match)) / 2];
  }
  return n;
}

// Pieces of 16 bytes and more in a batch: their hashes, and the lines of their records on the way.
inline void prepare_longs(const LongIndex& longs, const uint8_t* text, PieceSpans pieces,
                          const uint16_t* rows, PieceKey* keys) {
  uint8_t at[256];
  size_t count = 0;
  for (size_t i = 0; i < pieces.count; ++i) {
    at[count] = static_cast<uint8_t>(i);
    count += rows[i] >> 8;
  }
  for (size_t k = 0; k < count; ++k) {
    const size_t i = at[k];
    keys[i].low =
        hash_bytes(text + pieces.start[i], static_cast<size_t>(pieces.end[i] - pieces.start[i]));
    __builtin_prefetch(longs.slots + (keys[i].low >> longs.shift));
  }
  for (size_t k = 0; k < count; ++k) {
    const uint64_t slot = longs.slots[keys[at[k]].low >> longs.shift];
    if (slot == 0) continue;
    const uint8_t* const record = longs.records + LongIndex::offset(slot);
    __builtin_prefetch(record);
    __builtin_prefetch(record + 64);
  }
}

template <class Ops>
uint32_t* encode_loop(const EncodeContext& context, const uint8_t* text, PieceSpans pieces,
                      uint32_t* out) {
  constexpr size_t kBatch = 128;
  alignas(64) PieceKey keys[kBatch];
  alignas(64) uint16_t rows[kBatch];
  uint32_t offsets[kBatch];
  const char* const buckets = reinterpret_cast<const char*>(context.buckets);
  const uint32_t mask = context.bucket_mask;
  for (size_t done = 0; done < pieces.count; done += kBatch) {
    const size_t count = pieces.count - done < kBatch ? pieces.count - done : kBatch;
    const uint16_t* start = pieces.start + done;
    const uint16_t* end = pieces.end + done;
    uint16_t any = 0;
    for (size_t i = 0; i < count; ++i) {
      const uint16_t size = static_cast<uint16_t>(end[i] - start[i]);
      rows[i] = static_cast<uint16_t>((size < 16 ? size : 16) << 4);
      any |= rows[i];
    }
    for (size_t i = 0; i < count; ++i) {
      offsets[i] = Ops::key(text + start[i], rows[i], &keys[i]) & mask;
      __builtin_prefetch(buckets + offsets[i]);
    }
    if (any & 256) prepare_longs(*context.longs, text, {start, end, count}, rows, keys);
    for (size_t i = 0; i < count; ++i) {
      const CacheBucket& bucket = *reinterpret_cast<const CacheBucket*>(buckets + offsets[i]);
      const uint32_t ids = Ops::probe(bucket, keys[i], out);
      if (__builtin_expect(ids == 0, 0)) {
        // The probe left the entry in `out`, or zeros: 5 % of the pieces of code are runs of spaces
        // with more than four ids.
        if (out[3] == context.arena->generation && out[2] <= kArenaCopied) {
          const uint32_t more = out[2];
          std::memcpy(out, context.arena->ids + out[1], kArenaCopied * sizeof(uint32_t));
          out += more;
          continue;
        }
        const size_t size = static_cast<size_t>(end[i] - start[i]);
        out = context.slow(context.owner, text + start[i], size, keys[i], offsets[i], out);
        continue;
      }
      out += ids;
    }
  }
  return out;
}

}  // namespace
}  // namespace lmfast::bpe
