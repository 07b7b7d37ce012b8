// Sigmoid and tanh of the gates.
//
// The gates of an LSTM count beside its products when H is small. On AVX-512 they avoid the
// division (16 cycles for 16 floats): a 14-bit reciprocal and one Newton step is good to 1 ulp. On
// AVX2 a division costs less than its replacement, and 2^n little where it needs no subnormals: an
// LSTM's five exponentials of 8 units took 200 cycles with `exp2`.
#pragma once

#include "../simd.h"
#include "../simd_exp.h"
#include "../simd_tanh.h"

namespace lmfast::LMFAST_ISA {
namespace {

// 1 / x for 1 <= x < 2^126.
LMFAST_INLINE VecF reciprocal(VecF x) {
#if defined(__AVX512F__)
  const VecF r{_mm512_rcp14_ps(x.v)};
  return fmadd(r, fmadd(VecF::zero() - x, r, VecF::set1(1.0f)), r);
#else
  return VecF::set1(1.0f) / x;
#endif
}

// e^(kFactor x), on AVX2 as 2^n times the power of a rest, so that a sum with it takes one
// instruction. NaN stays; for kFactor x = -inf it is NaN or e^-87.
struct GatePower {
#if defined(__FMA__) && !defined(__AVX512F__)
  VecF power, fraction;
  LMFAST_INLINE VecF value() const { return power * fraction; }
  LMFAST_INLINE VecF plus(VecF x) const { return fmadd(power, fraction, x); }
#else
  VecF whole;
  LMFAST_INLINE VecF value() const { return whole; }
  LMFAST_INLINE VecF plus(VecF x) const { return whole + x; }
#endif
};

// For |kFactor x| < 87, above inf or a large number, below e^-87 or less. The product x log2(e) is
// kept in two parts: one float of it is wrong by |x| / 2 ulp of the result.
template <int kFactor>
LMFAST_INLINE GatePower gate_power(VecF x) {
  const VecF limit = VecF::set1(87.0f / kFactor);
  // Second operand when one is NaN, so NaN must come second.
  x = kFactor > 0 ? min(limit, x) : max(limit, x);
#if defined(__FMA__)
  const VecF scale = VecF::set1(kFactor * 1.44269502f), low = VecF::set1(kFactor * 1.92596303e-8f);
#endif
#if defined(__FMA__) && !defined(__AVX512F__)
  x = kFactor > 0 ? max(VecF::zero() - limit, x) : min(VecF::zero() - limit, x);
  // A sum with 1.5 * 2^23 has the nearest integer in its lowest bits, here with the exponent's
  // bias.
  const VecF shift = VecF::set1(12582912.0f + 127.0f), shifted = fmadd(x, scale, shift);
  const VecF rest = fmadd(x, low, fmadd(x, scale, shift - shifted));
  const VecF power{_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(shifted.v), 23))};
  // 2^r for |r| <= 1/2, minimax: 3e-9, which leaves the rounding.
  VecF p = VecF::set1(1.54614449e-4f);
  p = fmadd(p, rest, VecF::set1(1.3400428e-3f));
  p = fmadd(p, rest, VecF::set1(9.61805694e-3f));
  p = fmadd(p, rest, VecF::set1(5.55032715e-2f));
  p = fmadd(p, rest, VecF::set1(2.40226507e-1f));
  p = fmadd(p, rest, VecF::set1(6.93147182e-1f));
  return {power, fmadd(p, rest, VecF::set1(1.0f))};
#elif defined(__FMA__)
  const VecF z = x * scale;
  const VecF rest = fmadd(x, low, fmadd(x, scale, VecF::zero() - z));
  const VecF e = exp2<6>(z);
  return {fmadd(e * VecF::set1(0.693147181f), rest, e)};
#else
  return {exp(VecF::set1(static_cast<float>(kFactor)) * x)};
#endif
}

// e^(kFactor x), see above.
template <int kFactor>
LMFAST_INLINE VecF gate_exp(VecF x) {
  return gate_power<kFactor>(x).value();
}

// Within 2 ulp; NaN stays. Not below e^-87.
LMFAST_INLINE VecF gate_sigmoid(VecF x) {
  const VecF finite = min(VecF::set1(110.0f), x);
  return reciprocal(gate_power<-1>(finite).plus(VecF::set1(1.0f)));
}

// Within 1.5 ulp, on AVX-512 2.3 where e^2|x| passes 2^24; NaN stays. 1 - 2 / (e^2|x| + 1) cancels
// near zero, where an odd polynomial (minimax on |x| < 0.625) takes over. With a reciprocal instead
// of a division it is a quotient, corrected by its remainder: an Elman state that is 1.5 ulp off
// in the mean instead doubles the error of a whole layer.
LMFAST_INLINE VecF gate_tanh(VecF x) {
  const VecF one = VecF::set1(1.0f);
  const VecF square = x * x;
  VecF p = VecF::set1(-5.70498872745e-3f);
  p = fmadd(p, square, VecF::set1(2.06390887954e-2f));
  p = fmadd(p, square, VecF::set1(-5.37397155531e-2f));
  p = fmadd(p, square, VecF::set1(1.33314422036e-1f));
  p = fmadd(p, square, VecF::set1(-3.33332819422e-1f));
  const VecF near = fmadd(p * square, x, x);
  const GatePower e = gate_power<2>(magnitude(x));
  const VecF bottom = e.plus(one);
#if defined(__AVX512F__)
  const VecF top = e.plus(VecF::set1(-1.0f)), inverse = reciprocal(bottom);
  const VecF quotient = top * inverse;
  const VecF far = fmadd(fmadd(VecF::zero() - quotient, bottom, top), inverse, quotient);
#else
  const VecF far = one - VecF::set1(2.0f) / bottom;
#endif
  return select_less(square, VecF::set1(0.390625f), near, with_sign_of(far, x));
}

}  // namespace
}  // namespace lmfast::LMFAST_ISA
