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

class Encoder {
 public:
  Encoder(const Vocabulary& vocabulary, const Kernels& kernels);
  ~Encoder();
  Encoder(const Encoder&) = delete;
  Encoder& operator=(const Encoder&) = delete;

  // Appends the ids of text[0, n); safe from any number of threads at once and after fork().
  void encode(const uint8_t* text, size_t n, const Specials& specials, IdBuffer* out);
  void encode_given(const uint8_t* text, size_t n, GivenEnds pieces, IdBuffer* out);
  // Texts [first, last) one after the other with one cache; ends[i] gets the size of `out` after
  // text i.
  template <class View>
  void encode_many(size_t first, size_t last, View view, const Specials& specials, int64_t* ends,
                   IdBuffer* out) {
    Lease lease(*this);
    for (size_t i = first; i < last; ++i) {
      const TextView text = view(i);
      encode_with(lease.cache(), text.text, text.size, specials, out);
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
                   IdBuffer* out) const;
  void encode_text(WordCache& cache, const uint8_t* text, size_t n, IdBuffer* out) const;
  void encode_long(WordCache& cache, const uint8_t* piece, size_t size, IdBuffer* out) const;

  static constexpr size_t kPooled = 64;
  const Vocabulary& vocabulary_;
  const Kernels& kernels_;
  WordCache seeded_;  // never encodes: the image new caches are copied from
  std::atomic<WordCache*> pool_[kPooled];
};

}  // namespace lmfast::bpe
