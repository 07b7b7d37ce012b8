// Remembers the ids of pieces. Bounded: it grows while new pieces keep driving out others, and
// never beyond a maximum.
//
// Pieces of up to 15 bytes are in two-way buckets of one cache line: 8 MB at first (4 MB is 4 %
// slower on English), up to 32 MB. Ids that do not fit their entry go to an arena of 16 MB.
// Longer pieces: see long_cache.h.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "long_cache.h"
#include "merge.h"
#include "vocabulary.h"

namespace lmfast::bpe {

class WordCache {
 public:
  // An entry that a cache begins with.
  struct Seed {
    PieceKey key;
    uint32_t ids[4];
  };
  // The tokens that the pattern leaves in one piece, each really merged: some vocabularies have
  // tokens that merging cannot reach. With them a first text meets a warm cache: 210-260 -> 360-440
  // MB/s on a first pass.
  static std::vector<Seed> seeds_of(const Vocabulary& vocabulary, const Kernels& kernels);

  WordCache(const Vocabulary& vocabulary, const Kernels& kernels, const std::vector<Seed>& seeds);
  ~WordCache();
  WordCache(const WordCache&) = delete;
  WordCache& operator=(const WordCache&) = delete;

  // For some kilobytes of text: asked for again, it may be of a larger table.
  EncodeContext context();

  // Appends the ids of any piece; `out` has room for max_symbols(size) + 16.
  uint32_t* encode_piece(const uint8_t* piece, size_t size, uint32_t* out);
  // As Merger's: nothing is remembered.
  uint32_t* encode_dropout(const uint8_t* piece, size_t size, Dropout* dropout, uint32_t* out) {
    return merger_.encode_dropout(piece, size, dropout, out);
  }

 private:
  static constexpr uint32_t kLeastBuckets = 1u << 17, kMostBuckets = 1u << 19;
  static constexpr size_t kArenaIds = 4u << 20;

  static uint32_t* slow_entry(void* owner, const uint8_t* piece, size_t size, PieceKey key,
                              uint32_t offset, uint32_t* out) {
    WordCache* self = static_cast<WordCache*>(owner);
    return size <= kShortPiece
               ? self->short_miss(piece, size, key, offset / sizeof(CacheBucket), out)
               : self->long_piece(piece, size, key.low, out);
  }
  uint32_t* short_miss(const uint8_t* piece, size_t size, PieceKey key, size_t bucket,
                       uint32_t* out);
  uint32_t* emit(const uint32_t* entry, uint32_t* out) const;
  bool stale(const uint32_t* entry) const;
  void pack(const uint32_t* ids, size_t count, uint32_t* entry);
  void store(PieceKey key, size_t bucket, const uint32_t* entry);
  uint32_t* long_piece(const uint8_t* piece, size_t size, uint64_t hash, uint32_t* out);
  uint32_t mask() const { return (count_ - 1) * static_cast<uint32_t>(sizeof(CacheBucket)); }
  size_t bucket_of(PieceKey key) const {
    return (kernels_.hash(key) & mask()) / sizeof(CacheBucket);
  }
  void grow();

  const Vocabulary& vocabulary_;
  const Kernels& kernels_;
  Merger merger_;
  uint32_t count_ = kLeastBuckets;
  CacheBucket* buckets_;
  uint32_t turn_ = 0;     // which entry is driven out next
  uint32_t evicted_ = 0;  // entries driven out since the table grew
  std::vector<uint32_t> arena_ids_;
  size_t arena_used_ = 0;
  Arena arena_ = {nullptr, 1};
  LongCache longs_;
};

}  // namespace lmfast::bpe
