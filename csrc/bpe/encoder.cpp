#include "encoder.h"

#include <cstring>
#include <stdexcept>
#include <string>

namespace lmfast::bpe {

Encoder::Lease::Lease(Encoder& encoder) : encoder_(encoder) {
  for (auto& slot : encoder_.pool_) {
    // A plain load first: an exchange on every slot would bounce the line between threads.
    if (slot.load(std::memory_order_relaxed) == nullptr) continue;
    cache_ = slot.exchange(nullptr);
    if (cache_ != nullptr) return;
  }
  cache_ = new WordCache(encoder_.vocabulary_, encoder_.kernels_, encoder_.seeded_);
}

Encoder::Lease::~Lease() {
  for (auto& slot : encoder_.pool_) {
    WordCache* empty = nullptr;
    if (slot.compare_exchange_strong(empty, cache_)) return;
  }
  delete cache_;
}

Encoder::Encoder(const Vocabulary& vocabulary, const Kernels& kernels)
    : vocabulary_(vocabulary), kernels_(kernels), seeded_(vocabulary, kernels) {
  for (auto& slot : pool_) slot.store(nullptr);
  seeded_.seed();
}

Encoder::~Encoder() {
  for (auto& slot : pool_) delete slot.load();
}

void Encoder::encode_long(WordCache& cache, const uint8_t* piece, size_t size,
                          IdBuffer* out) const {
  if (size > 0xFFFFFFF0u) throw std::length_error("a piece of the text is longer than 4 GB");
  uint32_t* const to = out->room(Vocabulary::max_symbols(size) + 16);
  out->set_end(cache.encode_piece(piece, size, to));
}

void Encoder::encode_text(WordCache& cache, const uint8_t* text, size_t n, IdBuffer* out) const {
  uint16_t starts[kChunk + kPadding], word_ends[kChunk + kPadding];
  const bool words = vocabulary_.pattern() == Pattern::kWords;
  const uint16_t* const ends = words ? word_ends : starts + 1;
  const EncodeContext context = cache.context();
  size_t pos = 0;
  while (n - pos >= kChunk + kPadding) {
    const size_t count = kernels_.scan(vocabulary_.pattern(), text + pos, kChunk, starts,
                                       words ? word_ends : nullptr);
    if (count < 2) {
      const Piece piece = next_piece(vocabulary_.pattern(), text, pos, n);
      if (piece.end > piece.start) {
        encode_long(cache, text + piece.start, piece.end - piece.start, out);
      }
      pos = piece.end;
      continue;
    }
    uint32_t* const to = out->room(2 * kChunk + 16);
    out->set_end(kernels_.encode(context, text + pos, {starts, ends, count - 1}, to));
    pos += starts[count - 1];
  }
  encode_tail(cache, text + pos, n - pos, out);
}

// The last bytes of a text, copied to where reading beyond them is harmless. Spaces follow them, so
// that pieces which end before the trailing whitespace are final; the rest is left to next_piece,
// which knows where the text ends.
void Encoder::encode_tail(WordCache& cache, const uint8_t* text, size_t n, IdBuffer* out) const {
  if (n == 0) return;
  const Pattern pattern = vocabulary_.pattern();
  uint8_t padded[kChunk + 3 * kPadding];
  std::memcpy(padded, text, n);
  std::memset(padded + n, ' ', 2 * kPadding);
  size_t solid = n;
  while (solid > 0 && padded[solid - 1] <= ' ') --solid;
  uint16_t starts[kChunk + 2 * kPadding], word_ends[kChunk + 2 * kPadding];
  const bool words = pattern == Pattern::kWords;
  size_t count = kernels_.scan(pattern, padded, n, starts, words ? word_ends : nullptr);
  const uint16_t* const ends = words ? word_ends : starts + 1;
  size_t pieces = count == 0 ? 0 : count - 1;
  while (pieces > 0 && ends[pieces - 1] >= solid) --pieces;
  uint32_t* const to = out->room(2 * n + 16);
  out->set_end(kernels_.encode(cache.context(), padded, {starts, ends, pieces}, to));
  size_t pos = pieces == 0 ? 0 : ends[pieces - 1];
  while (pos < n) {
    const Piece piece = next_piece(pattern, padded, pos, n);
    if (piece.end > piece.start) {
      encode_long(cache, padded + piece.start, piece.end - piece.start, out);
    }
    pos = piece.end;
  }
}

void Encoder::encode_with(WordCache& cache, const uint8_t* text, size_t n, const Specials& specials,
                          IdBuffer* out) const {
  if (specials.empty()) return encode_text(cache, text, n, out);
  for (size_t pos = 0; pos < n;) {
    const SpecialMatch special = specials.find(text, pos, n);
    encode_text(cache, text + pos, special.start - pos, out);
    if (special.end > special.start) {
      uint32_t* const to = out->room(1);
      *to = special.id;
      out->set_end(to + 1);
    }
    pos = special.end;
  }
}

void Encoder::encode(const uint8_t* text, size_t n, const Specials& specials, IdBuffer* out) {
  Lease lease(*this);
  encode_with(lease.cache(), text, n, specials, out);
}

void Encoder::encode_given(const uint8_t* text, size_t n, GivenEnds pieces, IdBuffer* out) {
  Lease lease(*this);
  size_t start = 0;
  for (size_t i = 0; i < pieces.count; ++i) {
    const size_t end = static_cast<size_t>(pieces.ends[i]);
    if (pieces.ends[i] < 0 || end < start || end > n) {
      throw std::invalid_argument("piece end " + std::to_string(pieces.ends[i]) +
                                  " is out of order or outside the text");
    }
    if (end > start) encode_long(lease.cache(), text + start, end - start, out);
    start = end;
  }
}

}  // namespace lmfast::bpe
