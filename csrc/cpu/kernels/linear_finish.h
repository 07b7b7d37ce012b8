// From sums to results: the end of every product with few rows.
#pragma once

#include "../simd.h"

namespace lmfast::LMFAST_ISA {
namespace {

// out[c] = act(scaled(sums[c], c, n) + bias[c]), where n of a vector's lanes count; bias may be
// null.
template <class T, class Scaled>
LMFAST_INLINE void finish_row(T* out, const float* sums, const T* bias, bool relu, int columns,
                              const Scaled& scaled) {
  constexpr int W = VecF::kWidth;
  for (int c = 0; c < columns; c += W) {
    const int n = columns - c < W ? columns - c : W;
    VecF y = scaled(VecF::load(sums + c, n), c, n);
    if (bias != nullptr) y = y + VecF::load(bias + c, n);
    // The second operand comes out when one is NaN.
    if (relu) y = max(VecF::zero(), y);
    if (n == W) {
      y.store(out + c);
    } else {
      y.store(out + c, n);
    }
  }
}

}  // namespace
}  // namespace lmfast::LMFAST_ISA
