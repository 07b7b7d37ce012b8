#include "word_counter.h"

#include <cstring>
#include <stdexcept>

#include "encode_loop.h"

namespace lmfast::bpe {

WordCounter::WordCounter(Pattern pattern, const Kernels& kernels)
    : pattern_(pattern), kernels_(kernels), slots_(1u << 12) {}

uint32_t WordCounter::next_order() {
  if (order_ == 0xFFFFFFFFu) throw std::length_error("more than 4294967295 distinct words");
  return order_++;
}

void WordCounter::grow() {
  std::vector<Slot> old(2 * slots_.size());
  old.swap(slots_);
  const size_t mask = slots_.size() - 1;
  for (const Slot& slot : old) {
    if (slot.key.high == 0) continue;
    size_t at = kernels_.hash(slot.key) & mask;
    while (slots_[at].key.high != 0) at = (at + 1) & mask;
    slots_[at] = slot;
  }
}

void WordCounter::add_key(PieceKey key, uint64_t count) {
  const size_t mask = slots_.size() - 1;
  for (size_t at = kernels_.hash(key) & mask;; at = (at + 1) & mask) {
    Slot& slot = slots_[at];
    if (slot.key.low == key.low && slot.key.high == key.high) {
      slot.count += count;
      return;
    }
    if (slot.key.high != 0) continue;
    slot = {key, count, next_order()};
    if (++used_ * 2 > slots_.size()) grow();
    return;
  }
}

void WordCounter::add_word(const uint8_t* word, size_t size, uint64_t count) {
  if (size == 0 || count == 0) return;
  if (size <= kShortPiece) {
    uint8_t padded[16] = {};
    std::memcpy(padded, word, size);
    add_key(piece_key(padded, size), count);
    return;
  }
  const auto [found, fresh] =
      long_.try_emplace(std::string(reinterpret_cast<const char*>(word), size), LongWord{0, 0});
  if (fresh) found->second.order = next_order();
  found->second.count += count;
}

void WordCounter::add_pieces(const uint8_t* text, PieceSpans pieces) {
  for (size_t i = 0; i < pieces.count; ++i) {
    const uint8_t* piece = text + pieces.start[i];
    const size_t size = static_cast<size_t>(pieces.end[i] - pieces.start[i]);
    if (size <= kShortPiece) {
      add_key(piece_key(piece, size), 1);
    } else {
      add_word(piece, size, 1);
    }
  }
}

void WordCounter::add_text(const uint8_t* text, size_t n) {
  uint16_t starts[kChunk + kPadding], word_ends[kChunk + kPadding];
  const bool words = pattern_ == Pattern::kWords;
  const uint16_t* const ends = words ? word_ends : starts + 1;
  size_t pos = 0;
  while (n - pos >= kChunk + kPadding) {
    const size_t count =
        kernels_.scan(pattern_, text + pos, kChunk, starts, words ? word_ends : nullptr);
    if (count < 2) {
      const Piece piece = next_piece(pattern_, text, pos, n);
      add_word(text + piece.start, piece.end - piece.start, 1);
      pos = piece.end;
      continue;
    }
    add_pieces(text + pos, {starts, ends, count - 1});
    pos += starts[count - 1];
  }
  add_tail(text + pos, n - pos);
}

// As Encoder::encode_tail: spaces after the text, and next_piece where its end matters.
void WordCounter::add_tail(const uint8_t* text, size_t n) {
  if (n == 0) return;
  uint8_t padded[kChunk + 3 * kPadding];
  std::memcpy(padded, text, n);
  std::memset(padded + n, ' ', 2 * kPadding);
  size_t solid = n;
  while (solid > 0 && padded[solid - 1] <= ' ') --solid;
  uint16_t starts[kChunk + 2 * kPadding], word_ends[kChunk + 2 * kPadding];
  const bool words = pattern_ == Pattern::kWords;
  const uint16_t* const ends = words ? word_ends : starts + 1;
  const size_t count = kernels_.scan(pattern_, padded, n, starts, words ? word_ends : nullptr);
  size_t pieces = count == 0 ? 0 : count - 1;
  while (pieces > 0 && ends[pieces - 1] >= solid) --pieces;
  add_pieces(padded, {starts, ends, pieces});
  for (size_t pos = pieces == 0 ? 0 : ends[pieces - 1]; pos < n;) {
    const Piece piece = next_piece(pattern_, padded, pos, n);
    add_word(padded + piece.start, piece.end - piece.start, 1);
    pos = piece.end;
  }
}

void WordCounter::add(const WordCounter& other) {
  for (const Word& word : other.words()) {
    add_word(reinterpret_cast<const uint8_t*>(word.bytes.data()), word.bytes.size(), word.count);
  }
}

std::vector<WordCounter::Word> WordCounter::words() const {
  std::vector<Word> all(order_);
  for (const Slot& slot : slots_) {
    if (slot.key.high == 0) continue;
    const char* bytes = reinterpret_cast<const char*>(&slot.key);
    all[slot.order] = {{bytes, static_cast<size_t>(slot.key.high >> 56)}, slot.count};
  }
  for (const auto& [word, entry] : long_) all[entry.order] = {word, entry.count};
  return all;
}

}  // namespace lmfast::bpe
