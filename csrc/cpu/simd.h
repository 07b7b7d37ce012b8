// A small vector type per instruction-set level, for kernels/*.cpp only.
//
// VecF holds kWidth floats (16 AVX-512, 8 AVX2, 4 otherwise) and loads and stores float, bf16 and
// f16, always computing in float. VecD is one double with the same interface: fp64 exists for
// checking gradients, not for speed. VecOf<T> names the right one for a storage type.
//
// Everything lives in the namespace of the level (LMFAST_ISA) and in an anonymous one inside it:
// an inline function that two levels shared could be linked in the wider one's version and stop a
// narrower machine with an illegal instruction. For the same reason no standard-library header is
// included here beyond the C ones.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "dtype.h"

#ifndef LMFAST_ISA
#error "simd.h is for kernels compiled once per level; CMake defines LMFAST_ISA"
#endif

#define LMFAST_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#else
#include "simd_generic.h"
#endif

namespace lmfast::LMFAST_ISA {
namespace {

struct VecD {
  static constexpr int kWidth = 1;
  using scalar = double;
  double v;
  static LMFAST_INLINE VecD zero() { return {0.0}; }
  static LMFAST_INLINE VecD set1(double x) { return {x}; }
  static LMFAST_INLINE VecD load(const double* p) { return {*p}; }
  static LMFAST_INLINE VecD load(const float* p) { return {static_cast<double>(*p)}; }
  template <class T>
  static LMFAST_INLINE VecD load(const T* p, int n) {
    return n > 0 ? load(p) : zero();
  }
  LMFAST_INLINE void store(double* p) const { *p = v; }
  LMFAST_INLINE void store(float* p) const { *p = static_cast<float>(v); }
  template <class T>
  LMFAST_INLINE void store(T* p, int n) const {
    if (n > 0) store(p);
  }
};
LMFAST_INLINE VecD operator+(VecD a, VecD b) { return {a.v + b.v}; }
LMFAST_INLINE VecD operator-(VecD a, VecD b) { return {a.v - b.v}; }
LMFAST_INLINE VecD operator*(VecD a, VecD b) { return {a.v * b.v}; }
LMFAST_INLINE VecD operator/(VecD a, VecD b) { return {a.v / b.v}; }
LMFAST_INLINE VecD fmadd(VecD a, VecD b, VecD c) { return {a.v * b.v + c.v}; }
LMFAST_INLINE VecD max(VecD a, VecD b) { return {a.v > b.v ? a.v : b.v}; }
LMFAST_INLINE VecD min(VecD a, VecD b) { return {a.v < b.v ? a.v : b.v}; }
LMFAST_INLINE double sum(VecD a) { return a.v; }
LMFAST_INLINE double hmax(VecD a) { return a.v; }
LMFAST_INLINE VecD exp(VecD a) { return {::exp(a.v)}; }

// The vector that computes on storage type T.
template <class T>
struct VecOfImpl {
  using type = VecF;
};
template <>
struct VecOfImpl<double> {
  using type = VecD;
};
template <class T>
using VecOf = typename VecOfImpl<T>::type;

// The type sums over T are kept in: float, or double for double.
template <class T>
using AccOf = typename VecOf<T>::scalar;

LMFAST_INLINE double square_root(double x) { return __builtin_sqrt(x); }
LMFAST_INLINE float square_root(float x) { return __builtin_sqrtf(x); }

// e^x, relative error below 2 ulp on the normal range; 0 below -104, inf above 88.73, NaN stays.
// n = round(x log2 e); e^x = 2^n e^r with |r| <= ln2/2 and a degree-6 polynomial for e^r.
LMFAST_INLINE VecF exp(VecF x) {
  const VecF lo = VecF::set1(-105.0f), hi = VecF::set1(89.0f);
  // max and min return their second operand when one is NaN, so NaN must come second.
  const VecF clamped = min(hi, max(lo, x));
  const VecF n = round_to_int(clamped * VecF::set1(1.44269504088896341f));
  VecF r = fmadd(n, VecF::set1(-0.693359375f), clamped);
  r = fmadd(n, VecF::set1(2.12194440e-4f), r);
  VecF p = VecF::set1(1.9875691500e-4f);
  p = fmadd(p, r, VecF::set1(1.3981999507e-3f));
  p = fmadd(p, r, VecF::set1(8.3334519073e-3f));
  p = fmadd(p, r, VecF::set1(4.1665795894e-2f));
  p = fmadd(p, r, VecF::set1(1.6666665459e-1f));
  p = fmadd(p, r, VecF::set1(5.0000001201e-1f));
  p = fmadd(p, r * r, r + VecF::set1(1.0f));
  return scale_by_power_of_two(p, n);
}

LMFAST_INLINE VecF sigmoid(VecF x) {
  const VecF one = VecF::set1(1.0f);
  return one / (one + exp(VecF::zero() - x));
}

}  // namespace
}  // namespace lmfast::LMFAST_ISA
