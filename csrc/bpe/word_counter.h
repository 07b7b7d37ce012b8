// Distinct pieces of a corpus with their counts and the place where each was first seen.
//
// Counters of parts of a corpus add up to the counter of the whole, whoever counted which part.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "buffer.h"
#include "kernels.h"

namespace lmfast::bpe {

class WordCounter {
 public:
  WordCounter(Pattern pattern, const Kernels& kernels);

  // Splits text[0, n) and counts its pieces. `place` is where the text begins in the corpus: any
  // numbers that ascend, by n at least.
  void add_text(const uint8_t* text, size_t n, uint64_t place);
  // The same for a short text that may be one of many. Texts that follow each other are joined
  // where no piece could reach over the seam: each end of a text costs as much as twenty pieces.
  // flush() at last.
  void add_line(const uint8_t* text, size_t n, uint64_t place);
  void flush();
  static constexpr size_t kLine = 2048;  // a longer text is not joined, nor copied
  // Whether texts are joined as a rule, and how many bytes are.
  static bool joins_lines(Pattern pattern);
  size_t joined() const { return joined_.size(); }
  void add_word(const uint8_t* word, size_t size, uint64_t count, uint64_t place);
  void add(const WordCounter& other);

  size_t size() const { return words_.size(); }
  struct Word {
    std::string_view bytes;
    uint64_t count;
  };
  // All words by first appearance. The views live as long as the counter is not changed; 16 bytes
  // can be read at each, however short.
  std::vector<Word> words() const;

 private:
  // A word of more than kShortPiece bytes has kLong in the length byte of its key, and the number
  // of bytes below; its bytes are in long_bytes_ at key.low.
  struct Entry {
    PieceKey key;
    uint64_t place;
    uint64_t hash;
  };
  struct Blank {
    PieceKey key;
    uint32_t word;
  };
  static constexpr uint64_t kLong = 0xFFull << 56;

  bool joins(const uint8_t* text, size_t n) const;
  size_t add_blank_start(const uint8_t* text, size_t n, uint64_t place);
  size_t add_unusual_blank(const uint8_t* text, size_t n, uint64_t place);
  void add_pieces(const uint8_t* text, PieceSpans pieces, uint64_t place);
  // These give the number of the word.
  uint32_t add_short(PieceKey key, uint32_t hash, uint64_t count, uint64_t place);
  uint32_t add_piece(const uint8_t* word, size_t size, uint64_t count, uint64_t place);
  uint32_t add_long(const uint8_t* word, size_t size, uint64_t count, uint64_t place);
  uint32_t append(PieceKey key, uint64_t hash, uint64_t count, uint64_t place);
  uint32_t count_again(uint32_t word, uint64_t count, uint64_t place);
  CountTable table() const { return {short_.data(), short_.size() - 1}; }
  void grow_short();
  void grow_long();
  std::string_view bytes_of(const Entry& word) const;

  Pattern pattern_;
  const Kernels& kernels_;
  // Words by first appearance here, and beside them what changes with every piece.
  Buffer<Entry> words_;
  Buffer<uint64_t> counts_;
  std::vector<CountBucket> short_;  // a full bucket goes on in the next one
  size_t short_words_ = 0;
  std::vector<uint32_t> long_;  // open addressing, number of the word + 1
  size_t long_words_ = 0;
  Buffer<uint8_t> long_bytes_;
  Buffer<uint8_t> joined_;
  uint64_t joined_place_ = 0, joined_end_ = 0;
  static constexpr size_t kBlanks = 64;
  Blank blanks_[kBlanks] = {};  // the last words of whitespace that lines began with, by hash
  // Number + 1 of the word of so many spaces, and at 0 of the line end: most of that whitespace.
  static constexpr size_t kUsualBlanks = 128;
  uint32_t usual_blanks_[kUsualBlanks] = {};
};

}  // namespace lmfast::bpe
