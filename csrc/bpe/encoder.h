// Text to ids: pieces, cache, special tokens, and the memory the ids are written to.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "buffer.h"
#include "kernels.h"
#include "specials.h"
#include "vocabulary.h"
#include "word_cache.h"

namespace lmfast::bpe {

// Piece boundaries found elsewhere: ascending ends, the last one the size of the text.
struct GivenEnds {
  const int64_t* ends;
  size_t count;
};

struct TextView {
  const uint8_t* text;
  size_t size;
};

// Where ids go: appended to a buffer, or only counted, the buffer being what one chunk needs.
class IdSink {
 public:
  IdSink(IdBuffer* buffer, bool keep) : buffer_(buffer), keep_(keep) {}
  uint32_t* room(size_t count) { return buffer_->room(count); }
  void set_end(const uint32_t* end) {
    buffer_->set_end(end);
    if (keep_) return;
    counted_ += buffer_->size();
    buffer_->set_end(buffer_->data());
  }
  size_t counted() const { return counted_; }

 private:
  IdBuffer* buffer_;
  bool keep_;
  size_t counted_ = 0;
};

class Encoder {
 public:
  Encoder(const Vocabulary& vocabulary, const Kernels& kernels);
  ~Encoder();
  Encoder(const Encoder&) = delete;
  Encoder& operator=(const Encoder&) = delete;

  // Appends the ids of text[0, n); safe from any number of threads at once and after fork().
  void encode(const uint8_t* text, size_t n, const Specials& specials, IdBuffer* out);
  // How many ids encode() gives; they are not kept.
  size_t count(const uint8_t* text, size_t n, const Specials& specials);
  // With BPE-dropout; `pieces` null: by the vocabulary's pattern.
  void encode_dropout(const uint8_t* text, size_t n, const Specials& specials,
                      const GivenEnds* pieces, Dropout* dropout, IdBuffer* out);
  void encode_given(const uint8_t* text, size_t n, GivenEnds pieces, IdBuffer* out);
  // Texts [first, last) one after the other with one cache; ends[i] gets the size of `out` after
  // text i.
  template <class View>
  void encode_many(size_t first, size_t last, View view, const Specials& specials, int64_t* ends,
                   IdBuffer* out) {
    Lease lease(*this);
    IdSink sink(out, true);
    for (size_t i = first; i < last; ++i) {
      const TextView text = view(i);
      encode_with(lease.cache(), text.text, text.size, specials, &sink);
      ends[i] = static_cast<int64_t>(out->size());
    }
  }

 private:
  // A cache taken out of the pool for one call. Caches are handed over by atomic exchange: there is
  // no lock that a fork could leave held.
  class Lease {
   public:
    explicit Lease(Encoder& encoder);
    ~Lease();
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    WordCache& cache() { return *cache_; }

   private:
    Encoder& encoder_;
    WordCache* cache_ = nullptr;
  };

  void encode_with(WordCache& cache, const uint8_t* text, size_t n, const Specials& specials,
                   IdSink* out) const;
  void encode_text(WordCache& cache, const uint8_t* text, size_t n, IdSink* out) const;
  void encode_piece(WordCache& cache, const uint8_t* piece, size_t size, IdSink* out) const;

  static constexpr size_t kPooled = 64;
  const Vocabulary& vocabulary_;
  const Kernels& kernels_;
  const std::vector<WordCache::Seed> seeds_;
  std::atomic<WordCache*> pool_[kPooled];
};

}  // namespace lmfast::bpe
