// Masks that show every query one run of keys: causal, windows, padding, prefixes, documents packed
// into one row. Such a mask is read once, here, into two numbers per query, and the kernels then
// skip what it hides instead of computing and hiding it.
//
// Floor: the bytes of the mask. Blocks of 64 elements that are all seen or all hidden, which nearly
// all are, take a counting loop that the compiler vectorises; a mask of 1024 x 1024 bool takes
// about as long as half a head of attention.
#include "attention_block.h"

namespace lmfast::LMFAST_ISA {
namespace {

struct BoolElement {
  using type = uint8_t;
  static LMFAST_INLINE bool seen(uint8_t x) { return x != 0; }
  static LMFAST_INLINE bool hidden(uint8_t x) { return x == 0; }
};
// Floating-point masks are added: zero shows a key; -inf and the lowest number hide it.
template <class Bits, Bits kInfinite>
struct AddedElement {
  using type = Bits;
  static constexpr Bits kAbs = static_cast<Bits>(~Bits{0}) >> 1;
  static LMFAST_INLINE bool seen(Bits x) { return (x & kAbs) == 0; }
  static LMFAST_INLINE bool hidden(Bits x) {
    return x == kInfinite || x == static_cast<Bits>(kInfinite - 1);
  }
};

// Whether the row shows one run of keys, or none (lo == hi == 0).
template <class E>
bool find_run(const typename E::type* p, int64_t keys, int64_t* lo, int64_t* hi) {
  constexpr int kBlock = 64;
  enum { kBefore, kInside, kAfter } state = kBefore;
  *lo = *hi = 0;
  const auto step = [&](bool seen, int64_t from, int64_t to) {
    if (seen) {
      if (state == kAfter) return false;
      if (state == kBefore) *lo = from;
      state = kInside;
      *hi = to;
    } else if (state == kInside) {
      state = kAfter;
    }
    return true;
  };
  for (int64_t i = 0; i < keys; i += kBlock) {
    const int n = static_cast<int>(keys - i < kBlock ? keys - i : kBlock);
    int seen = 0, hidden = 0;
    for (int j = 0; j < n; ++j) {
      seen += E::seen(p[i + j]);
      hidden += E::hidden(p[i + j]);
    }
    if (seen + hidden != n) return false;
    if (seen == n || hidden == n) {
      if (!step(seen == n, i, i + n)) return false;
      continue;
    }
    for (int j = 0; j < n; ++j) {
      if (!step(E::seen(p[i + j]), i + j, i + j + 1)) return false;
    }
  }
  return true;
}

}  // namespace

void attention_mask_runs(const AttentionMaskArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row / a.length * a.batch_stride + row % a.length * a.row_stride;
    int64_t lo = 0, hi = 0;
    bool run = false;
    switch (a.kind) {
      case MaskKind::kBool:
        run = find_run<BoolElement>(static_cast<const uint8_t*>(a.mask) + at, a.keys, &lo, &hi);
        break;
      case MaskKind::kF32:
        run = find_run<AddedElement<uint32_t, 0xff800000u>>(
            static_cast<const uint32_t*>(a.mask) + at, a.keys, &lo, &hi);
        break;
      case MaskKind::kBF16:
        run = find_run<AddedElement<uint16_t, 0xff80>>(static_cast<const uint16_t*>(a.mask) + at,
                                                       a.keys, &lo, &hi);
        break;
      case MaskKind::kF16:
        run = find_run<AddedElement<uint16_t, 0xfc00>>(static_cast<const uint16_t*>(a.mask) + at,
                                                       a.keys, &lo, &hi);
        break;
      case MaskKind::kNone:
        break;
    }
    a.runs[2 * row] = run ? lo : -1;
    a.runs[2 * row + 1] = hi;
  }
}

}  // namespace lmfast::LMFAST_ISA
