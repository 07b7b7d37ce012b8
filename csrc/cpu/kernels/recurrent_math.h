// Sigmoid and tanh of the gates.
//
// At H = 128 the gates of an LSTM cost a fifth of its products, so both avoid the division (16
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

// Within 2 ulp down to e^-87, the smallest value returned; NaN stays.
LMFAST_INLINE VecF gate_sigmoid(VecF x) {
  // Second operand when one is NaN, so NaN must come second.
  const VecF z = min(VecF::set1(125.0f), VecF::set1(-1.44269504088896341f) * x);
  return reciprocal(exp2<6>(z) + VecF::set1(1.0f));
}

// Within 1.5 ulp; NaN stays. 1 - 2 / (e^2|x| + 1) cancels near zero, where an odd polynomial
// (minimax on |x| < 0.625) takes over; with x in place of |x| its error is 3 ulp below zero.
LMFAST_INLINE VecF gate_tanh(VecF x) {
  const VecF one = VecF::set1(1.0f), zero = VecF::zero();
  const VecF square = x * x;
  VecF p = VecF::set1(-5.70498872745e-3f);
  p = fmadd(p, square, VecF::set1(2.06390887954e-2f));
  p = fmadd(p, square, VecF::set1(-5.37397155531e-2f));
  p = fmadd(p, square, VecF::set1(1.33314422036e-1f));
  p = fmadd(p, square, VecF::set1(-3.33332819422e-1f));
  const VecF near = fmadd(p * square, x, x);
  const VecF z = min(VecF::set1(125.0f), VecF::set1(2.88539008177792681f) * max(x, zero - x));
  const VecF far = fmadd(VecF::set1(-2.0f), reciprocal(exp2<6>(z) + one), one);
  return select_less(square, VecF::set1(0.390625f), near, select_less(x, zero, zero - far, far));
}

}  // namespace
}  // namespace lmfast::LMFAST_ISA
