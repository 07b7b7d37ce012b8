// 2^x in the precision its user needs, log2 (AVX-512), and a choice between two vectors. For
// kernels only.
//
// 2^x = 2^floor(x) * p(x - floor(x)) with p a polynomial on [0, 1], p(0) = 1 and p(1) = 2 exactly.
// Largest relative error of p as evaluated in float: degree 2: 2.7e-3, 3: 1.0e-4, 4: 3.4e-6,
// 5: 1.5e-7, 6: 6.3e-8 (half a unit in the last place). A probability that is rounded to bf16
// (4e-3) needs degree 3. Cost on AVX-512 at degree 3, 4, 5: 3.4, 5.0, 5.4 cycles for 16 values.
// -inf gives 0, +inf gives inf, NaN stays.
#pragma once

#include "simd.h"

namespace lmfast::LMFAST_ISA {
namespace {

// p(r) = 1 + r (c1 + r (c2 + ...)), highest power first; minimax in relative error.
template <int kDegree>
struct Exp2Poly;
template <>
struct Exp2Poly<2> {
  static constexpr float c[] = {0.339766026f, 0.660233974f};
};
template <>
struct Exp2Poly<3> {
  static constexpr float c[] = {0.0782679692f, 0.226307675f, 0.695424318f};
};
template <>
struct Exp2Poly<4> {
  static constexpr float c[] = {0.0135557475f, 0.0520323701f, 0.241379768f, 0.693032146f};
};
template <>
struct Exp2Poly<5> {
  static constexpr float c[] = {0.00187931862f, 0.00899099465f, 0.0558186769f, 0.240159273f,
                                0.693151712f};
};
template <>
struct Exp2Poly<6> {
  static constexpr float c[] = {0.000217150257f, 0.0012440877f, 0.00967806391f,
                                0.0554841533f,   0.240229517f,  0.693147004f};
};

template <int kDegree>
LMFAST_INLINE VecF exp2_fraction(VecF r) {
  VecF p = VecF::set1(Exp2Poly<kDegree>::c[0]);
#pragma GCC unroll 8
  for (int i = 1; i < kDegree; ++i) p = fmadd(p, r, VecF::set1(Exp2Poly<kDegree>::c[i]));
  return fmadd(p, r, VecF::set1(1.0f));
}

#if defined(__AVX512F__)

template <int kDegree>
LMFAST_INLINE VecF exp2(VecF x) {
  // vreduceps with rounding down is x - floor(x) (0 for infinities); vscalefps takes floor itself.
  constexpr int kFloor = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  const VecF p = exp2_fraction<kDegree>({_mm512_reduce_ps(x.v, kFloor)});
  return scale_by_power_of_two(p, x);
}

// log2(x) for x > 0 and finite: exponent, and log2 of the mantissa m in [0.75, 1.5) as an odd
// series in (m - 1) / (m + 1), |.| <= 1/5. Absolute error below 1e-7.
LMFAST_INLINE VecF log2(VecF x) {
  const VecF m{_mm512_getmant_ps(x.v, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src)};
  const VecF e{_mm512_getexp_ps((x / m).v)};
  const VecF one = VecF::set1(1.0f), z = (m - one) / (m + one), zz = z * z;
  VecF p = VecF::set1(0.32059889798f);  // 2 log2(e) / (2 i + 1)
  p = fmadd(p, zz, VecF::set1(0.41219858311f));
  p = fmadd(p, zz, VecF::set1(0.57707801635f));
  p = fmadd(p, zz, VecF::set1(0.96179669393f));
  p = fmadd(p, zz, VecF::set1(2.88539008178f));
  return fmadd(p, z, e);
}

// a < b ? x : y, lane by lane; y where a or b is NaN.
LMFAST_INLINE VecF select_less(VecF a, VecF b, VecF x, VecF y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
// Whether a < b in any lane.
LMFAST_INLINE bool any_less(VecF a, VecF b) {
  return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ) != 0;
}

#else

template <int kDegree>
LMFAST_INLINE VecF exp2(VecF x) {
  // Beyond these 2^x is 0 or inf; max and min return their second operand when one is NaN.
  const VecF clamped = min(VecF::set1(130.0f), max(VecF::set1(-152.0f), x));
  // The nearest integer to x - 1/2 is floor(x), or x - 1 for some integers x; then r is 1.
  const VecF n = round_to_int(clamped - VecF::set1(0.5f));
  return scale_by_power_of_two(exp2_fraction<kDegree>(clamped - n), n);
}

#if defined(__AVX2__)
LMFAST_INLINE VecF select_less(VecF a, VecF b, VecF x, VecF y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
LMFAST_INLINE bool any_less(VecF a, VecF b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)) != 0;
}
#else
LMFAST_INLINE VecF select_less(VecF a, VecF b, VecF x, VecF y) { return {a.v < b.v ? x.v : y.v}; }
LMFAST_INLINE bool any_less(VecF a, VecF b) {
  const auto less = a.v < b.v;
  bool any = false;
  for (int i = 0; i < VecF::kWidth; ++i) any |= less[i] != 0;
  return any;
}
#endif

#endif

}  // namespace
}  // namespace lmfast::LMFAST_ISA
