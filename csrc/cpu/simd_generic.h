// VecF on whatever the compiler's vectors of four floats become (SSE2, NEON, scalar code).
#pragma once

namespace lmfast::LMFAST_ISA {
namespace {

typedef float v4f __attribute__((vector_size(16)));
typedef int32_t v4i __attribute__((vector_size(16)));

LMFAST_INLINE float bf16_to_float(bf16 h) {
  const uint32_t bits = static_cast<uint32_t>(h.bits) << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
LMFAST_INLINE bf16 float_to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
LMFAST_INLINE float f16_to_float(f16 h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000) << 16;
  const uint32_t rest = h.bits & 0x7fff;
  uint32_t bits;
  float x;
  if (rest >= 0x7c00) {  // inf, NaN
    bits = sign | 0x7f800000 | ((rest & 0x3ff) << 13);
    memcpy(&x, &bits, 4);
    return x;
  }
  if (rest >= 0x400) {
    bits = sign | ((rest << 13) + 0x38000000);
    memcpy(&x, &bits, 4);
    return x;
  }
  x = static_cast<float>(rest) * 5.9604644775390625e-8f;  // subnormal: units of 2^-24
  return sign != 0 ? -x : x;
}
LMFAST_INLINE f16 float_to_f16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds to inf
  if (magnitude < 0x38800000) {  // subnormal result: let the float adder round to units of 2^-24
    float m;
    memcpy(&m, &magnitude, 4);
    m += 0.5f;
    memcpy(&bits, &m, 4);
    return {static_cast<uint16_t>(sign | (bits - 0x3f000000))};
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13))};
}
LMFAST_INLINE float to_float(float x) { return x; }
LMFAST_INLINE float to_float(bf16 x) { return bf16_to_float(x); }
LMFAST_INLINE float to_float(f16 x) { return f16_to_float(x); }
LMFAST_INLINE void from_float(float x, float* p) { *p = x; }
LMFAST_INLINE void from_float(float x, bf16* p) { *p = float_to_bf16(x); }
LMFAST_INLINE void from_float(float x, f16* p) { *p = float_to_f16(x); }

struct VecF {
  static constexpr int kWidth = 4;
  using scalar = float;
  v4f v;

  static LMFAST_INLINE VecF zero() { return {v4f{0, 0, 0, 0}}; }
  static LMFAST_INLINE VecF set1(float x) { return {v4f{x, x, x, x}}; }
  static LMFAST_INLINE VecF load(const float* p) {
    VecF r;
    memcpy(&r.v, p, 16);
    return r;
  }
  template <class T>
  static LMFAST_INLINE VecF load(const T* p) {
    return {v4f{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
  }
  template <class T>
  static LMFAST_INLINE VecF load(const T* p, int n) {
    VecF r = zero();
    for (int i = 0; i < n && i < 4; ++i) r.v[i] = to_float(p[i]);
    return r;
  }
  static LMFAST_INLINE VecF load_twice(const float* p) { return {v4f{p[0], p[0], p[1], p[1]}}; }
  static LMFAST_INLINE VecF load_twice(const float* p, int n) {
    const float a = n > 0 ? p[0] : 0.0f, b = n > 1 ? p[1] : 0.0f;
    return {v4f{a, a, b, b}};
  }
  LMFAST_INLINE void store(float* p) const { memcpy(p, &v, 16); }
  template <class T>
  LMFAST_INLINE void store(T* p) const {
    for (int i = 0; i < 4; ++i) from_float(v[i], p + i);
  }
  template <class T>
  LMFAST_INLINE void store(T* p, int n) const {
    for (int i = 0; i < n && i < 4; ++i) from_float(v[i], p + i);
  }
};

LMFAST_INLINE VecF operator+(VecF a, VecF b) { return {a.v + b.v}; }
LMFAST_INLINE VecF operator-(VecF a, VecF b) { return {a.v - b.v}; }
LMFAST_INLINE VecF operator*(VecF a, VecF b) { return {a.v * b.v}; }
LMFAST_INLINE VecF operator/(VecF a, VecF b) { return {a.v / b.v}; }
LMFAST_INLINE VecF fmadd(VecF a, VecF b, VecF c) { return {a.v * b.v + c.v}; }
LMFAST_INLINE VecF fmaddsub(VecF a, VecF b, VecF c) {
  return {a.v * b.v + c.v * v4f{-1.0f, 1.0f, -1.0f, 1.0f}};
}
// As the x86 instructions: the second operand when the comparison is false or unordered.
LMFAST_INLINE VecF max(VecF a, VecF b) { return {a.v > b.v ? a.v : b.v}; }
LMFAST_INLINE VecF min(VecF a, VecF b) { return {a.v < b.v ? a.v : b.v}; }
LMFAST_INLINE VecF swap_pairs(VecF a) { return {v4f{a.v[1], a.v[0], a.v[3], a.v[2]}}; }
LMFAST_INLINE float sum(VecF a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
LMFAST_INLINE float hmax(VecF a) {
  const float x = a.v[0] > a.v[1] ? a.v[0] : a.v[1], y = a.v[2] > a.v[3] ? a.v[2] : a.v[3];
  return x > y ? x : y;
}
// |a| < 2^22: adding and removing 1.5 * 2^23 leaves the nearest integer.
LMFAST_INLINE VecF round_to_int(VecF a) {
  const VecF magic = VecF::set1(12582912.0f);
  return {(a.v + magic.v) - magic.v};
}
LMFAST_INLINE VecF scale_by_power_of_two(VecF a, VecF n) {
  const v4i whole = __builtin_convertvector(n.v, v4i);
  const v4i half = whole >> 1;
  const v4i rest = whole - half;
  const v4i b1 = (half + 127) << 23, b2 = (rest + 127) << 23;
  v4f f1, f2;
  memcpy(&f1, &b1, 16);
  memcpy(&f2, &b2, 16);
  return {a.v * f1 * f2};
}

}  // namespace
}  // namespace lmfast::LMFAST_ISA
