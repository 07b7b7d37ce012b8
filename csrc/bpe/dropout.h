// The random numbers of BPE-dropout: splitmix64 (Steele, Lea and Flood 2014), which a few lines of
// Python reproduce, so that a seed means the same in both engines.
#pragma once
#include <cstdint>

namespace lmfast::bpe {

struct Dropout {
  double probability;
  uint64_t state;

  // Whether the next possible merge is left out.
  bool leaves_out() {
    uint64_t z = state += 0x9E3779B97F4A7C15ull;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    return static_cast<double>((z ^ z >> 31) >> 11) * 0x1p-53 < probability;
  }
};

}  // namespace lmfast::bpe
