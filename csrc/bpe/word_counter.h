// Distinct pieces of a corpus with their counts, in order of first appearance.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "kernels.h"

namespace lmfast::bpe {

class WordCounter {
 public:
  WordCounter(Pattern pattern, const Kernels& kernels);

  // Splits text[0, n) and counts its pieces.
  void add_text(const uint8_t* text, size_t n);
  // The same for a short text that may be one of many: texts are joined where no piece could reach
  // over the seam, since the end of a text costs as much as 60 of its bytes. Call flush() at last.
  void add_line(const uint8_t* text, size_t n);
  void flush();
  void add_word(const uint8_t* word, size_t size, uint64_t count);
  // Adds another counter's words; those new here follow in its order.
  void add(const WordCounter& other);

  size_t size() const { return order_; }
  struct Word {
    std::string_view bytes;
    uint64_t count;
  };
  // All words by first appearance. The views live as long as the counter is not changed.
  std::vector<Word> words() const;

 private:
  struct Slot {
    PieceKey key;  // key.high == 0: empty
    uint64_t count;
    uint32_t order;
  };
  struct LongWord {
    uint64_t count;
    uint32_t order;
  };

  bool joins(const uint8_t* text, size_t n) const;
  void add_pieces(const uint8_t* text, PieceSpans pieces);
  void add_key(PieceKey key, uint32_t hash, uint64_t count);
  uint32_t next_order();
  void grow();

  Pattern pattern_;
  const Kernels& kernels_;
  std::vector<Slot> slots_;
  size_t used_ = 0;
  std::unordered_map<std::string, LongWord> long_;
  uint32_t order_ = 0;
  std::vector<uint8_t> joined_;
};

}  // namespace lmfast::bpe
