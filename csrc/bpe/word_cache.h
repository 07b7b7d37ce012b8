// Remembers the ids of pieces. Bounded by construction: nothing is ever rehashed beyond a maximum.
//
// Three levels by size: up to 15 bytes in two-way buckets of one cache line (4 MB: measured best on
// prose, 2 MB -25 %, 8 MB equal), up to 31 bytes in 64-byte entries that grow to 32 MB, everything
// else in 8 MB that are emptied when full. Ids that do not fit their entry go to an arena of 16 MB.
#pragma once
#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "kernels.h"
#include "merge.h"
#include "vocabulary.h"

namespace lmfast::bpe {

class WordCache {
 public:
  WordCache(const Vocabulary& vocabulary, const Kernels& kernels);
  WordCache(const Vocabulary& vocabulary, const Kernels& kernels, const WordCache& seeded);
  ~WordCache();
  WordCache(const WordCache&) = delete;
  WordCache& operator=(const WordCache&) = delete;

  EncodeContext context() { return {buckets_, kMask, this, &slow_entry}; }

  // Appends the ids of any piece; `out` has room for max_symbols(size) + 16.
  uint32_t* encode_piece(const uint8_t* piece, size_t size, uint32_t* out);
  // Enters every token that the pattern leaves in one piece, so that a first text meets a warm
  // cache: 210-260 -> 360-440 MB/s on a first pass.
  void seed();

 private:
  static constexpr uint32_t kBuckets = 1u << 16;
  static constexpr uint32_t kMask = (kBuckets - 1) * sizeof(CacheBucket);
  static constexpr size_t kMediumPiece = 31, kMediumIds = 8;
  static constexpr size_t kMediumStart = 1u << 10, kMediumMost = 1u << 19;
  static constexpr size_t kArenaIds = 4u << 20, kLongBytes = 8u << 20;

  struct alignas(64) MediumEntry {
    uint8_t key[32];  // bytes, zeros, the length in the last byte; length 0 is an empty entry
    uint32_t ids[kMediumIds];
  };
  struct LongEntry {
    size_t bytes, size, ids, count;
  };

  static uint32_t* slow_entry(void* owner, const uint8_t* piece, size_t size, PieceKey key,
                              uint32_t offset, uint32_t* out) {
    WordCache* self = static_cast<WordCache*>(owner);
    return size <= kShortPiece
               ? self->short_miss(piece, size, key, offset / sizeof(CacheBucket), out)
               : self->long_piece(piece, size, out);
  }
  uint32_t* merge_piece(const uint8_t* piece, size_t size, uint32_t* out);
  uint32_t* short_miss(const uint8_t* piece, size_t size, PieceKey key, size_t bucket,
                       uint32_t* out);
  uint32_t* emit(const uint32_t* entry, uint32_t* out) const;
  bool stale(const uint32_t* entry) const;
  void pack(const uint32_t* ids, size_t count, size_t most, uint32_t* entry);
  void store(PieceKey key, size_t bucket, const uint32_t* ids, size_t count);
  uint32_t* long_piece(const uint8_t* piece, size_t size, uint32_t* out);
  uint32_t* medium_piece(const uint8_t* piece, size_t size, uint32_t* out);
  uint32_t* arena_piece(const uint8_t* piece, size_t size, uint32_t* out);
  void grow_medium();

  const Vocabulary& vocabulary_;
  const Kernels& kernels_;
  Merger merger_;
  CacheBucket* buckets_;
  uint32_t turn_ = 0;  // which entry is evicted next
  std::vector<uint32_t> arena_;
  uint32_t generation_ = 1;
  std::vector<MediumEntry> medium_;
  size_t medium_used_ = 0;
  std::unordered_map<uint64_t, LongEntry> long_;
  std::vector<uint8_t> long_bytes_;
  std::vector<uint32_t> long_ids_;
};

}  // namespace lmfast::bpe
