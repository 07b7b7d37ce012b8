// tanh of a vector of floats. For kernels only.
#pragma once

#include "simd.h"
#include "simd_exp.h"

namespace lmfast::LMFAST_ISA {
namespace {

// Relative error below 3 ulp. Near zero, where 1 - 2 / (e^2x + 1) would cancel, an odd polynomial
// (Cephes' tanhf, |x| < 0.625); NaN stays.
LMFAST_INLINE VecF tanh(VecF x) {
  const VecF one = VecF::set1(1.0f), two = VecF::set1(2.0f);
  const VecF square = x * x;
  VecF p = VecF::set1(-5.70498872745e-3f);
  p = fmadd(p, square, VecF::set1(2.06390887954e-2f));
  p = fmadd(p, square, VecF::set1(-5.37397155531e-2f));
  p = fmadd(p, square, VecF::set1(1.33314422036e-1f));
  p = fmadd(p, square, VecF::set1(-3.33332819422e-1f));
  const VecF near = fmadd(p * square, x, x);
  const VecF far = one - two / (exp(two * x) + one);
  return select_less(square, VecF::set1(0.390625f), near, far);
}

}  // namespace
}  // namespace lmfast::LMFAST_ISA
