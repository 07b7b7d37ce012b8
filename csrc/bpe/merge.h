// Applying the merges of a vocabulary to the symbols of one piece.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "dropout.h"
#include "kernels.h"
#include "vocabulary.h"

namespace lmfast::bpe {

// Encodes pieces by the rule "lowest rank first, leftmost first"; keeps its working memory.
//
// Up to kMergeSymbols symbols the kernels merge. A longer piece is cut into windows of that size
// which overlap and are stitched where they agree, so that all of it stays in L1 and takes time in
// proportion to its length: random letters 83 -> 16 ns a byte, 10 MB of them 250 -> 20.
class Merger {
 public:
  Merger(const Vocabulary& vocabulary, const Kernels& kernels)
      : vocabulary_(vocabulary), kernels_(kernels) {}

  // Writes the ids of a piece and returns their end; `out` has room for max_symbols(size).
  uint32_t* encode(const uint8_t* piece, size_t size, uint32_t* out);
  // The same, but in every step each possible merge is left out with some probability: they are
  // asked in order, and the first that is not left out is done. Ends when all were left out.
  uint32_t* encode_dropout(const uint8_t* piece, size_t size, Dropout* dropout, uint32_t* out);

 private:
  // The symbols of a piece: its bytes, or the ids that the characters mode made of them.
  struct Symbols {
    const uint8_t* bytes;
    const uint32_t* ids;
  };
  // The tokens of a stretch of symbols: ids, and which symbol each begins at.
  struct Window {
    size_t size = 0, count = 0;
    std::vector<uint32_t> ids, starts;
    size_t end_of(size_t token) const { return token + 1 < count ? starts[token + 1] : size; }
  };
  struct Node {
    uint32_t at, next;
  };
  static constexpr uint32_t kEnd = 0xFFFFFFFFu;
  static constexpr size_t kKeptSymbols = 1u << 18;  // working memory beyond this is given back

  // The tokens of n <= kMergeSymbols symbols: bits of their starts, ids at their starts.
  uint64_t merge_few(Symbols symbols, size_t n, uint32_t* ids) const;
  uint32_t* merge_windows(Symbols symbols, size_t n, uint32_t* out);
  void merge_window(Symbols symbols, size_t n, Window* window);
  uint32_t* merge_all(Symbols symbols, size_t n, uint32_t* out);
  static Symbols from(Symbols symbols, size_t at) {
    return {symbols.bytes ? symbols.bytes + at : nullptr, symbols.ids ? symbols.ids + at : nullptr};
  }

  // On lists of symbols linked in both directions, of any length.
  void link(Symbols symbols, size_t n);
  void merge_by_rank();
  void merge_by_heap();
  void merge_with_dropout(Dropout* dropout);
  // heap_ holds the pairs as rank << 32 | place; those that changed since are passed over.
  void fill_heap();
  void push(uint64_t entry);
  uint64_t pop();
  void push_pair(uint32_t at) {
    if (at != kEnd && rank_[at] != kNoRank) push(static_cast<uint64_t>(rank_[at]) << 32 | at);
  }
  bool valid(uint64_t entry) const { return rank_[static_cast<uint32_t>(entry)] == entry >> 32; }
  uint32_t rank_at(uint32_t at) const {
    return next_[at] == kEnd ? kNoRank : vocabulary_.rank(ids_[at], ids_[next_[at]]);
  }
  void join(uint32_t at);
  void note(uint32_t rank, uint32_t at);
  uint32_t* take_links(uint32_t* out);
  void trim();

  const Vocabulary& vocabulary_;
  const Kernels& kernels_;
  Window window_, next_window_;
  std::vector<uint32_t> ids_, next_, previous_, rank_;  // per symbol; rank of the pair it begins
  std::vector<uint32_t> list_;                          // per rank: its last node, a circular list
  std::vector<Node> nodes_;
  std::vector<uint32_t> ranks_;  // heap of the ranks that have a list, smallest first
  std::vector<uint32_t> positions_;
  std::vector<uint64_t> heap_, left_out_;
};

}  // namespace lmfast::bpe
