// Driving a scanner over a whole text.
#pragma once
#include <cstring>

#include "kernels.h"
#include "scanner.h"

namespace lmfast::bpe {

// Calls many(text, spans) for runs of pieces that lie in one chunk, with kPadding readable bytes
// behind them, and one(piece, size) for the others, in order. `kernels` and `pattern` as
// everywhere.
template <class Many, class One>
void split_text(const Kernels& kernels, Pattern pattern, const uint8_t* text, size_t n, Many many,
                One one) {
  constexpr size_t kLeast = kChunk + kPadding;
  uint16_t starts[kLeast + kPadding], word_ends[kLeast + kPadding];
  const bool words = pattern == Pattern::kWords;
  const uint16_t* const ends = words ? word_ends : starts + 1;
  uint16_t* const scanned_ends = words ? word_ends : nullptr;
  size_t pos = 0;
  while (n - pos >= kLeast) {
    const size_t count = kernels.scan(pattern, text + pos, kChunk, starts, scanned_ends);
    if (count < 2) {
      const Piece piece = next_piece(pattern, text, pos, n);
      if (piece.end > piece.start) one(text + piece.start, piece.end - piece.start);
      pos = piece.end;
      continue;
    }
    many(text + pos, PieceSpans{starts, ends, count - 1});
    pos += starts[count - 1];
  }
  text += pos;
  n -= pos;
  if (n == 0) return;
  // The rest is copied to where reading beyond it is harmless. Spaces follow it, so that pieces
  // which end before the trailing whitespace are final; the others are left to next_piece, which
  // knows where the text ends.
  uint8_t padded[kLeast + 2 * kPadding];
  std::memcpy(padded, text, n);
  std::memset(padded + n, ' ', 2 * kPadding);
  size_t solid = n;
  while (solid > 0 && padded[solid - 1] <= ' ') --solid;
  size_t count = kernels.scan(pattern, padded, n, starts, scanned_ends);
  count -= count > 0;
  while (count > 0 && ends[count - 1] > solid) --count;
  if (count > 0) many(padded, PieceSpans{starts, ends, count});
  for (pos = count == 0 ? 0 : ends[count - 1]; pos < n;) {
    const Piece piece = next_piece(pattern, padded, pos, n);
    if (piece.end > piece.start) one(padded + piece.start, piece.end - piece.start);
    pos = piece.end;
  }
}

}  // namespace lmfast::bpe
