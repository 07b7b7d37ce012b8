// The rotation of one vector by the angles of one position, for the kernels that rotate. Reads one
// type and writes the same or another; `x` and `y` may be the same memory.
#pragma once

#include "../simd.h"

namespace lmfast::LMFAST_ISA {
namespace {

// (x1, x2) -> (x1 c - x2 s, x2 c + x1 s); x1 and x2 are the halves of the rotated part.
template <class T, class U>
LMFAST_INLINE void rotate_half(const T* x, U* y, const float* c, const float* s, int64_t half,
                               VecF sign) {
  constexpr int W = VecF::kWidth;
  int64_t i = 0;
  for (; i + W <= half; i += W) {
    const VecF cv = VecF::load(c + i), sv = VecF::load(s + i) * sign;
    const VecF x1 = VecF::load(x + i), x2 = VecF::load(x + half + i);
    const VecF minus = VecF::zero() - sv;
    fmadd(x2, minus, x1 * cv).store(y + i);
    fmadd(x1, sv, x2 * cv).store(y + half + i);
  }
  if (i < half) {
    const int n = static_cast<int>(half - i);
    const VecF cv = VecF::load(c + i, n), sv = VecF::load(s + i, n) * sign;
    const VecF x1 = VecF::load(x + i, n), x2 = VecF::load(x + half + i, n);
    const VecF minus = VecF::zero() - sv;
    const VecF y1 = fmadd(x2, minus, x1 * cv), y2 = fmadd(x1, sv, x2 * cv);
    y1.store(y + i, n);
    y2.store(y + half + i, n);
  }
}

// Pairs lie side by side: y = x * (c, c, ...) -/+ swap(x) * (s, s, ...).
template <class T, class U>
LMFAST_INLINE void rotate_interleaved(const T* x, U* y, const float* c, const float* s,
                                      int64_t half, VecF sign) {
  constexpr int P = VecF::kWidth / 2;
  int64_t p = 0;
  for (; p + P <= half; p += P) {
    const VecF cv = VecF::load_twice(c + p), sv = VecF::load_twice(s + p) * sign;
    const VecF xv = VecF::load(x + 2 * p);
    fmaddsub(xv, cv, swap_pairs(xv) * sv).store(y + 2 * p);
  }
  if (p < half) {
    const int n = static_cast<int>(half - p);
    const VecF cv = VecF::load_twice(c + p, n), sv = VecF::load_twice(s + p, n) * sign;
    const VecF xv = VecF::load(x + 2 * p, 2 * n);
    fmaddsub(xv, cv, swap_pairs(xv) * sv).store(y + 2 * p, 2 * n);
  }
}

template <class Table>
LMFAST_INLINE void rotate_double(const double* x, double* y, const Table* c, const Table* s,
                                 int64_t half, bool interleaved, double sign) {
  for (int64_t p = 0; p < half; ++p) {
    const int64_t first = interleaved ? 2 * p : p, second = interleaved ? 2 * p + 1 : p + half;
    const double cv = c[p], sv = sign * s[p], x1 = x[first], x2 = x[second];
    y[first] = x1 * cv - x2 * sv;
    y[second] = x2 * cv + x1 * sv;
  }
}

}  // namespace
}  // namespace lmfast::LMFAST_ISA
