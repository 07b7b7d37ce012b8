// The ids of pieces longer than fifteen bytes.
//
// An index of 8-byte slots over records that lie one behind the other: two cache lines for a piece
// of a usual size, which the encoding loop prefetches for a batch of pieces at once: 200,000
// distinct words of 29 bytes take 8 ms instead of the 188 of a hash map. Bounded: when the records
// are full the cache is emptied, and no search looks at more than kProbes slots.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace lmfast::bpe {

class LongCache {
 public:
  LongCache() { clear(); }
  LongCache(const LongCache&) = delete;
  LongCache& operator=(const LongCache&) = delete;

  // Where a batch of pieces can be prefetched; stays valid, its contents change.
  const LongIndex* index() const { return &index_; }

  // Appends the ids of a piece, or returns null when they are not known. Up to 16 ids more than
  // that may be written over.
  uint32_t* find(uint64_t hash, const uint8_t* piece, size_t size, uint32_t* out) const;
  void insert(uint64_t hash, const uint8_t* piece, size_t size, const uint32_t* ids, size_t count);

 private:
  static constexpr size_t kLeastSlots = 1u << 10, kMostSlots = 1u << 21;
  static constexpr size_t kMostBytes = 32u << 20;
  static constexpr size_t kProbes = 16;
  static constexpr size_t kCopied = 64;  // bytes copied at once from behind a record's start

  struct Record {
    uint32_t size, count;  // then the bytes, up to a multiple of 4, and the ids
  };
  static size_t ids_at(size_t size) { return sizeof(Record) + (size + 3) / 4 * 4; }

  void clear();
  void grow();
  void place(uint64_t slot);

  LongIndex index_ = {};
  std::vector<uint64_t> slots_;
  std::vector<uint8_t> records_;
  size_t pieces_ = 0, used_ = 0;  // of slots, of bytes
};

}  // namespace lmfast::bpe
