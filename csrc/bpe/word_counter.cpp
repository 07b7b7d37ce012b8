#include "word_counter.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "encode_loop.h"
#include "split.h"

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

void WordCounter::add_key(PieceKey key, uint32_t hash, uint64_t count) {
  const size_t mask = slots_.size() - 1;
  for (size_t at = hash & mask;; at = (at + 1) & mask) {
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
    const PieceKey key = piece_key(padded, size);
    add_key(key, kernels_.hash(key), count);
    return;
  }
  const auto [found, fresh] =
      long_.try_emplace(std::string(reinterpret_cast<const char*>(word), size), LongWord{0, 0});
  if (fresh) found->second.order = next_order();
  found->second.count += count;
}

// Keys first, so that the slots are on their way to the cache when they are needed.
void WordCounter::add_pieces(const uint8_t* text, PieceSpans pieces) {
  constexpr size_t kBatch = 64;
  PieceKey keys[kBatch];
  uint32_t hashes[kBatch];
  for (size_t done = 0; done < pieces.count; done += kBatch) {
    const size_t count = std::min(kBatch, pieces.count - done);
    const PieceSpans batch = {pieces.start + done, pieces.end + done, count};
    kernels_.keys(text, batch, keys, hashes);
    for (size_t i = 0; i < count; ++i) {
      __builtin_prefetch(slots_.data() + (hashes[i] & (slots_.size() - 1)));
    }
    for (size_t i = 0; i < count; ++i) {
      const size_t size = static_cast<size_t>(batch.end[i] - batch.start[i]);
      if (size <= kShortPiece) {
        add_key(keys[i], hashes[i], 1);
      } else {
        add_word(text + batch.start[i], size, 1);
      }
    }
  }
}

void WordCounter::add_text(const uint8_t* text, size_t n) {
  split_text(
      kernels_, pattern_, text, n,
      [this](const uint8_t* chunk, const PieceSpans& pieces) { add_pieces(chunk, pieces); },
      [this](const uint8_t* piece, size_t size) { add_word(piece, size, 1); });
}

// Whether the pieces of joined_ followed by the text are the pieces of both.
bool WordCounter::joins(const uint8_t* text, size_t n) const {
  const auto blank = [](uint8_t c) { return c == ' ' || (c >= 9 && c <= 13); };
  const auto solid = [&](uint8_t c) { return c > ' ' && c < 0x7F; };
  const size_t size = joined_.size();
  if (pattern_ == Pattern::kWords) return blank(joined_.back()) || blank(text[0]);
  if (pattern_ != Pattern::kGpt2) return false;
  // A space before a word begins a piece, whatever whitespace comes before it; a lone line end is
  // one.
  if (text[0] == ' ') return n > 1 && solid(text[1]);
  return solid(text[0]) && joined_.back() == '\n' && (size == 1 || solid(joined_[size - 2]));
}

void WordCounter::add_line(const uint8_t* text, size_t n) {
  constexpr size_t kLine = 2048, kJoined = 1u << 15;
  if (n == 0) return;
  if (n > kLine || joined_.size() > kJoined || (!joined_.empty() && !joins(text, n))) flush();
  if (n > kLine) {
    add_text(text, n);
  } else {
    joined_.insert(joined_.end(), text, text + n);
  }
}

void WordCounter::flush() {
  add_text(joined_.data(), joined_.size());
  joined_.clear();
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
