// SiLU and GELU with their derivatives, in the precision that the storage type can show.
#pragma once

#include "recurrent_math.h"

namespace lmfast::LMFAST_ISA {
namespace {

// An activation and its slope at one point.
template <class V>
struct Activated {
  V value, slope;
};

// e^(-x), x >= -87, for results in fp32 (kNarrow: in 11 bits or fewer, relative error 5e-5).
template <bool kNarrow>
LMFAST_INLINE VecF exp_of_minus(VecF x) {
  if constexpr (kNarrow) return exp2<4>(x * VecF::set1(-1.44269504f));
  return gate_exp<-1>(min(VecF::set1(110.0f), x));  // which is NaN for infinity
}

// s = 1 / (1 + e^-x), and 1 - s without cancellation. Below -87 s is exactly 0, so that x s is 0,
// and NaN for x = -inf as in PyTorch.
template <class V>
struct Logistic {
  V s, rest;
};
template <bool kNarrow>
LMFAST_INLINE Logistic<VecF> logistic(VecF x) {
  const VecF low = VecF::set1(-87.0f);
  // max returns the second operand when one is NaN.
  const VecF e = exp_of_minus<kNarrow>(max(low, x));
  const VecF s = reciprocal(e + VecF::set1(1.0f));
  return {select_less(x, low, VecF::zero(), s), e * s};
}
template <bool kNarrow>
LMFAST_INLINE Logistic<VecD> logistic(VecD x) {
  return {{1.0 / (1.0 + ::exp(-x.v))}, {1.0 / (1.0 + ::exp(x.v))}};
}

// t (c0 + t (c1 + ...)), highest power first.
template <int kTerms>
LMFAST_INLINE VecF polynomial(const float (&c)[kTerms], VecF t) {
  VecF p = VecF::set1(c[0]);
#pragma GCC unroll 16
  for (int i = 1; i < kTerms; ++i) p = fmadd(p, t, VecF::set1(c[i]));
  return p;
}

// Probability that a standard normal number is below x, and its density at x.
//
// The tail is e^(-x^2 / 2) t p(t) with t = 1 / (1 + k |x|), p a minimax fit of relative
// error 2.4e-8 (4.6e-6 for narrow types) before rounding. For fp32 1/2 minus the tail would be off
// by 2 ulp near zero; there the odd part is a polynomial, |x| < 1, absolute error 3e-10.
template <bool kNarrow>
LMFAST_INLINE void normal(VecF x, VecF* below, VecF* density) {
  constexpr float kFine[] = {0.028915396f, -0.12625585f, 0.16929261f,  -0.06862234f, 0.10740036f,
                             0.072239906f, 0.10175926f,  0.107550494f, 0.10772018f};
  constexpr float kCoarse[] = {-0.07392936f, 0.18045099f, 0.015744012f,
                               0.13343014f,  0.1204412f,  0.12386071f};
  constexpr float kNear[] = {-7.664679e-06f, 0.00011351265f, -0.001186353f,
                             0.009973331f,   -0.06649036f,   0.3989423f};
  const VecF zero = VecF::zero(), one = VecF::set1(1.0f), half = VecF::set1(0.5f);
  const VecF square = x * x;
  // min and max return the second operand when one is NaN.
  const VecF magnitude = min(VecF::set1(1e4f), max(zero - x, x));
  const VecF e = exp_of_minus<kNarrow>(min(VecF::set1(87.0f), half * square));
  const VecF t = reciprocal(fmadd(magnitude, VecF::set1(kNarrow ? 0.31f : 0.27f), one));
  if constexpr (kNarrow) {
    const VecF tail = e * (t * polynomial(kCoarse, t));
    *below = select_less(x, zero, tail, one - tail);
  } else {
    const VecF tail = e * (t * polynomial(kFine, t));
    const VecF far = select_less(x, zero, tail, one - tail);
    *below = select_less(square, one, fmadd(polynomial(kNear, square), x, half), far);
  }
  *density = e * VecF::set1(0.3989423f);
}
template <bool kNarrow>
LMFAST_INLINE void normal(VecD x, VecD* below, VecD* density) {
  below->v = 0.5 * ::erfc(-x.v * 0.70710678118654752440);
  density->v = 0.39894228040143267794 * ::exp(-0.5 * x.v * x.v);
}

struct Silu {
  template <bool kNarrow, class V>
  static LMFAST_INLINE V value(V x) {
    return x * logistic<kNarrow>(x).s;
  }
  // s (1 + x (1 - s)) with s = logistic(x)
  template <bool kNarrow, class V>
  static LMFAST_INLINE Activated<V> with_slope(V x) {
    const Logistic<V> l = logistic<kNarrow>(x);
    return {x * l.s, l.s * fmadd(x, l.rest, V::set1(1))};
  }
};

// x (1 + tanh u) / 2 = x logistic(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
struct GeluTanh {
  template <class V>
  static LMFAST_INLINE V inner(V square) {
    using S = typename V::scalar;
    constexpr double kTwice = 1.59576912160573071176;  // 2 sqrt(2 / pi)
    return fmadd(square, V::set1(S(kTwice * 0.044715)), V::set1(S(kTwice)));
  }
  template <bool kNarrow, class V>
  static LMFAST_INLINE V value(V x) {
    return x * logistic<kNarrow>(x * inner(x * x)).s;
  }
  template <bool kNarrow, class V>
  static LMFAST_INLINE Activated<V> with_slope(V x) {
    using S = typename V::scalar;
    constexpr double kTwice = 1.59576912160573071176;
    const V square = x * x;
    const Logistic<V> l = logistic<kNarrow>(x * inner(square));
    const V slope = fmadd(square, V::set1(S(kTwice * 3 * 0.044715)), V::set1(S(kTwice)));
    return {x * l.s, l.s * fmadd(x * l.rest, slope, V::set1(1))};
  }
};

// x P(x), P the normal distribution
struct GeluErf {
  template <bool kNarrow, class V>
  static LMFAST_INLINE V value(V x) {
    V below, density;
    normal<kNarrow>(x, &below, &density);
    return x * below;
  }
  template <bool kNarrow, class V>
  static LMFAST_INLINE Activated<V> with_slope(V x) {
    V below, density;
    normal<kNarrow>(x, &below, &density);
    return {x * below, fmadd(x, density, below)};
  }
};

}  // namespace
}  // namespace lmfast::LMFAST_ISA
