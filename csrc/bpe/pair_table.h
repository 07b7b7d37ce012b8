// (left id, right id) -> rank of the merge, an open-addressing table of 8-byte entries.
//
// GPT-2's 50,000 merges take 1 MB at a load below 1/2, so that the table stays in a 2 MB L2 beside
// the hot part of the word cache.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace lmfast::bpe {

constexpr uint32_t kNoRank = 0xFFFFFFFFu;
constexpr uint32_t kMaxIds = 1u << 21;  // ids fit 21 bits, ranks 22
constexpr uint32_t kMaxRanks = (1u << 22) - 1;

class PairTable {
 public:
  explicit PairTable(size_t pairs) {
    size_t size = 16;
    while (size < 2 * pairs + 2) size *= 2;
    slots_.assign(size, kEmpty);
    shift_ = 64;
    for (size_t s = size; s > 1; s /= 2) --shift_;
  }

  // False when the pair is already there.
  bool insert(uint32_t left, uint32_t right, uint32_t rank) {
    const uint64_t key = key_of(left, right);
    size_t at = slot_of(key);
    for (; slots_[at] != kEmpty; at = (at + 1) & (slots_.size() - 1)) {
      if (slots_[at] >> 22 == key) return false;
    }
    slots_[at] = key << 22 | rank;
    return true;
  }

  uint32_t find(uint32_t left, uint32_t right) const {
    const uint64_t key = key_of(left, right);
    for (size_t at = slot_of(key);; at = (at + 1) & (slots_.size() - 1)) {
      const uint64_t slot = slots_[at];
      if (slot >> 22 == key) return static_cast<uint32_t>(slot & kMaxRanks);
      if (slot == kEmpty) return kNoRank;
    }
  }

 private:
  static constexpr uint64_t kEmpty = ~0ull;  // both ids 2^21-1 and rank 2^22-1: never stored
  static uint64_t key_of(uint32_t left, uint32_t right) {
    return static_cast<uint64_t>(left) << 21 | right;
  }
  size_t slot_of(uint64_t key) const { return key * 0x9E3779B97F4A7C15ull >> shift_; }

  std::vector<uint64_t> slots_;
  int shift_;
};

}  // namespace lmfast::bpe
