#include "encoder.h"

#include <stdexcept>
#include <string>

#include "split.h"

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
  const EncodeContext context = cache.context();
  split_text(
      kernels_, vocabulary_.pattern(), text, n,
      [&](const uint8_t* chunk, const PieceSpans& pieces) {
        uint32_t* const to = out->room(2 * (kChunk + kPadding) + 16);
        out->set_end(kernels_.encode(context, chunk, pieces, to));
      },
      [&](const uint8_t* piece, size_t size) { encode_long(cache, piece, size, out); });
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
  // About what English needs, at once instead of by growing.
  if (n > kChunk) out->room(n / 4);
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
