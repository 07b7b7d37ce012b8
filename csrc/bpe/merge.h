// Applying the merges of a vocabulary to the symbols of one piece.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "vocabulary.h"

namespace lmfast::bpe {

// Merges `ids` in place by the rule "lowest rank first, leftmost first"; keeps its working memory.
class Merger {
 public:
  explicit Merger(const Vocabulary& vocabulary) : vocabulary_(vocabulary) {}

  // Returns the new count. O(n^2) moves up to kShort symbols, where that is fastest, else
  // O(n log n) in the worst case and nearly linear for ordered vocabularies.
  size_t merge(uint32_t* ids, size_t n);

 private:
  static constexpr size_t kShort = 48;

  size_t merge_short(uint32_t* ids, size_t n) const;
  size_t merge_by_rank(uint32_t* ids, size_t n);
  size_t merge_by_heap(uint32_t* ids, size_t n);
  void link(const uint32_t* ids, size_t n);
  size_t unlink(uint32_t* ids) const;
  uint32_t rank_at(const uint32_t* ids, uint32_t at) const {
    return next_[at] == kEnd ? kNoRank : vocabulary_.rank(ids[at], ids[next_[at]]);
  }
  void join(uint32_t* ids, uint32_t at);
  void note(uint32_t rank, uint32_t at);

  static constexpr uint32_t kEnd = 0xFFFFFFFFu;
  struct Node {
    uint32_t at, next;
  };

  const Vocabulary& vocabulary_;
  std::vector<uint32_t> next_, previous_, rank_;  // per symbol; rank of the pair it begins
  std::vector<uint32_t> list_;                    // per rank: its last node, a circular list
  std::vector<Node> nodes_;
  std::vector<uint32_t> ranks_;  // heap of the ranks that have a list, smallest first
  std::vector<uint32_t> positions_;
  std::vector<uint64_t> heap_;
};

}  // namespace lmfast::bpe
