#include "encoder.h"

#include <stdexcept>
#include <string>

#include "split.h"

namespace lmfast::bpe {
namespace {

void check_piece(size_t size) {
  if (size > 0xFFFFFFF0u) throw std::length_error("a piece of the text is longer than 4 GB");
}

// Calls part(text, size) for the text between special tokens, and writes their ids.
template <class Part>
void each_part(const uint8_t* text, size_t n, const Specials& specials, IdSink* out, Part part) {
  for (size_t pos = 0; pos < n;) {
    const SpecialMatch special = specials.find(text, pos, n);
    part(text + pos, special.start - pos);
    if (special.end > special.start) {
      uint32_t* const to = out->room(1);
      *to = special.id;
      out->set_end(to + 1);
    }
    pos = special.end;
  }
}

template <class One>
void each_given(const uint8_t* text, size_t n, GivenEnds pieces, One one) {
  size_t start = 0;
  for (size_t i = 0; i < pieces.count; ++i) {
    const size_t end = static_cast<size_t>(pieces.ends[i]);
    if (pieces.ends[i] < 0 || end < start || end > n) {
      throw std::invalid_argument("piece end " + std::to_string(pieces.ends[i]) +
                                  " is out of order or outside the text");
    }
    if (end > start) one(text + start, end - start);
    start = end;
  }
}

}  // namespace

Encoder::Lease::Lease(Encoder& encoder) : encoder_(encoder) {
  for (auto& slot : encoder_.pool_) {
    // A plain load first: an exchange on every slot would bounce the line between threads.
    if (slot.load(std::memory_order_relaxed) == nullptr) continue;
    cache_ = slot.exchange(nullptr);
    if (cache_ != nullptr) return;
  }
  cache_ = new WordCache(encoder_.vocabulary_, encoder_.kernels_, encoder_.seeds_);
}

Encoder::Lease::~Lease() {
  for (auto& slot : encoder_.pool_) {
    WordCache* empty = nullptr;
    if (slot.compare_exchange_strong(empty, cache_)) return;
  }
  delete cache_;
}

Encoder::Encoder(const Vocabulary& vocabulary, const Kernels& kernels)
    : vocabulary_(vocabulary), kernels_(kernels), seeds_(WordCache::seeds_of(vocabulary, kernels)) {
  for (auto& slot : pool_) slot.store(nullptr);
}

Encoder::~Encoder() {
  for (auto& slot : pool_) delete slot.load();
}

void Encoder::encode_piece(WordCache& cache, const uint8_t* piece, size_t size, IdSink* out) const {
  check_piece(size);
  uint32_t* const to = out->room(Vocabulary::max_symbols(size) + 16);
  out->set_end(cache.encode_piece(piece, size, to));
}

void Encoder::encode_text(WordCache& cache, const uint8_t* text, size_t n, IdSink* out) const {
  split_text(
      kernels_, vocabulary_.pattern(), text, n,
      [&](const uint8_t* chunk, const PieceSpans& pieces) {
        uint32_t* const to = out->room(2 * (kChunk + kPadding) + 16);
        out->set_end(kernels_.encode(cache.context(), chunk, pieces, to));
      },
      [&](const uint8_t* piece, size_t size) { encode_piece(cache, piece, size, out); });
}

void Encoder::encode_with(WordCache& cache, const uint8_t* text, size_t n, const Specials& specials,
                          IdSink* out) const {
  if (specials.empty()) return encode_text(cache, text, n, out);
  each_part(text, n, specials, out,
            [&](const uint8_t* part, size_t size) { encode_text(cache, part, size, out); });
}

void Encoder::encode(const uint8_t* text, size_t n, const Specials& specials, IdBuffer* out) {
  Lease lease(*this);
  // About what English needs, at once instead of by growing.
  if (n > kChunk) out->room(n / 4);
  IdSink sink(out, true);
  encode_with(lease.cache(), text, n, specials, &sink);
}

size_t Encoder::count(const uint8_t* text, size_t n, const Specials& specials) {
  Lease lease(*this);
  IdBuffer buffer;
  IdSink sink(&buffer, false);
  encode_with(lease.cache(), text, n, specials, &sink);
  return sink.counted();
}

void Encoder::encode_given(const uint8_t* text, size_t n, GivenEnds pieces, IdBuffer* out) {
  Lease lease(*this);
  IdSink sink(out, true);
  each_given(text, n, pieces, [&](const uint8_t* piece, size_t size) {
    encode_piece(lease.cache(), piece, size, &sink);
  });
}

void Encoder::encode_dropout(const uint8_t* text, size_t n, const Specials& specials,
                             const GivenEnds* pieces, Dropout* dropout, IdBuffer* out) {
  Lease lease(*this);
  IdSink sink(out, true);
  const auto one = [&](const uint8_t* piece, size_t size) {
    check_piece(size);
    uint32_t* const to = sink.room(Vocabulary::max_symbols(size));
    sink.set_end(lease.cache().encode_dropout(piece, size, dropout, to));
  };
  const auto many = [&](const uint8_t* chunk, const PieceSpans& spans) {
    for (size_t i = 0; i < spans.count; ++i) {
      one(chunk + spans.start[i], static_cast<size_t>(spans.end[i] - spans.start[i]));
    }
  };
  if (pieces != nullptr) return each_given(text, n, *pieces, one);
  each_part(text, n, specials, &sink, [&](const uint8_t* part, size_t size) {
    split_text(kernels_, vocabulary_.pattern(), part, size, many, one);
  });
}

}  // namespace lmfast::bpe
