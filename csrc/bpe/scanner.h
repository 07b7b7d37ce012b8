// Pre-splitting: where the pieces of a text begin and end.
#pragma once
#include <cstddef>
#include <cstdint>

namespace lmfast::bpe {

// The order is the numbering of SCANNERS in lmfast/tokenizer/patterns.py, which also holds the
// regular expression of each.
enum class Pattern : int { kNone, kWords, kLines, kWhitespace, kGpt2, kCl100k, kLlama3, kO200k };
constexpr int kPatterns = 8;

struct Piece {
  size_t start, end;  // end == start: no piece is left
};

// The first piece at or after `pos`, where `pos` is a piece boundary and `n` the end of the text.
// kWords and kLines leave out the separators; for every other pattern start == pos.
// Reads bytes [pos, n) only and accepts any bytes. Cost is linear in the run of whitespace or the
// piece, whichever is longer. This scalar scanner is also the twin the vector scanners are tested
// against, and takes over from them at the end of a text and for pieces longer than a block.
Piece next_piece(Pattern pattern, const uint8_t* text, size_t pos, size_t n);

// Whether text[pos, n) is whitespace only.
bool all_space(const uint8_t* text, size_t pos, size_t n);

}  // namespace lmfast::bpe
