// Sigmoid and tanh of the gates.
//
// The gates of an LSTM count beside its products when H is small, so both avoid the division (16
// cycles for 16 floats on AVX-512): a 14-bit reciprocal and one Newton step is good to 1 ulp.
#pragma once

#include "../simd.h"
#include "../simd_exp.h"

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

// e^(kSign x) for kSign x < 87, inf or a large number above; NaN stays, and kSign x = -inf gives
// NaN. The product x log2(e) is kept in two parts: one float of it is wrong by |x| / 2 ulp of the
// result.
template <int kSign>
LMFAST_INLINE VecF gate_exp(VecF x) {
  // Second operand when one is NaN, so NaN must come second.
  const VecF limit = VecF::set1(kSign * 87.0f);
  x = kSign > 0 ? min(limit, x) : max(limit, x);
#if defined(__FMA__)
  const VecF scale = VecF::set1(kSign * 1.44269502f), low = VecF::set1(kSign * 1.92596303e-8f);
  const VecF z = x * scale;
  const VecF rest = fmadd(x, low, fmadd(x, scale, VecF::zero() - z));
  const VecF e = exp2<6>(z);
  return fmadd(e * VecF::set1(0.693147181f), rest, e);
#else
  return exp(VecF::set1(static_cast<float>(kSign)) * x);
#endif
}

// Within 2 ulp; NaN stays. Not below e^-87.
LMFAST_INLINE VecF gate_sigmoid(VecF x) {
  const VecF finite = min(VecF::set1(110.0f), x);
  return reciprocal(gate_exp<-1>(finite) + VecF::set1(1.0f));
}

// Within 1 ulp; NaN stays. (e^2|x| - 1) / (e^2|x| + 1) cancels near zero, where an odd polynomial
// (minimax on |x| < 0.625) takes over. The quotient is corrected by its remainder: an Elman state
// that is 1.5 ulp off instead doubles the error of a whole layer.
LMFAST_INLINE VecF gate_tanh(VecF x) {
  const VecF one = VecF::set1(1.0f), zero = VecF::zero();
  const VecF square = x * x;
  VecF p = VecF::set1(-5.70498872745e-3f);
  p = fmadd(p, square, VecF::set1(2.06390887954e-2f));
  p = fmadd(p, square, VecF::set1(-5.37397155531e-2f));
  p = fmadd(p, square, VecF::set1(1.33314422036e-1f));
  p = fmadd(p, square, VecF::set1(-3.33332819422e-1f));
  const VecF near = fmadd(p * square, x, x);
  const VecF e = gate_exp<1>(max(x + x, zero - (x + x)));
  const VecF top = e - one, bottom = e + one, inverse = reciprocal(bottom);
  const VecF quotient = top * inverse;
  const VecF far = fmadd(fmadd(zero - quotient, bottom, top), inverse, quotient);
  return select_less(square, VecF::set1(0.390625f), near, select_less(x, zero, zero - far, far));
}

}  // namespace
}  // namespace lmfast::LMFAST_ISA
