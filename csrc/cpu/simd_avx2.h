// VecF on AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

namespace lmfast::LMFAST_ISA {
namespace {

struct VecF {
  static constexpr int kWidth = 8;
  using scalar = float;
  __m256 v;

  static LMFAST_INLINE VecF zero() { return {_mm256_setzero_ps()}; }
  static LMFAST_INLINE VecF set1(float x) { return {_mm256_set1_ps(x)}; }
  static LMFAST_INLINE __m256i mask(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }

  static LMFAST_INLINE __m256 from_bf16(__m128i h) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
  }
  static LMFAST_INLINE __m128i to_bf16(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i result = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    const __m256i packed = _mm256_packus_epi32(result, result);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
  }
  static LMFAST_INLINE __m128i to_f16(__m256 x) {
    return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // The first n 16-bit values, zeros behind them.
  static LMFAST_INLINE __m128i load16(const void* p, int n) {
    uint16_t buffer[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    memcpy(buffer, p, 2 * static_cast<size_t>(n < 8 ? n : 8));
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(buffer));
  }
  static LMFAST_INLINE void store16(void* p, __m128i h, int n) {
    uint16_t buffer[8];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(buffer), h);
    memcpy(p, buffer, 2 * static_cast<size_t>(n < 8 ? n : 8));
  }

  static LMFAST_INLINE VecF load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static LMFAST_INLINE VecF load(const bf16* p) {
    return {from_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  static LMFAST_INLINE VecF load(const f16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  static LMFAST_INLINE VecF load(const float* p, int n) { return {_mm256_maskload_ps(p, mask(n))}; }
  static LMFAST_INLINE VecF load(const bf16* p, int n) { return {from_bf16(load16(p, n))}; }
  static LMFAST_INLINE VecF load(const f16* p, int n) { return {_mm256_cvtph_ps(load16(p, n))}; }
  static LMFAST_INLINE VecF load_twice(const float* p) { return twice(_mm_loadu_ps(p)); }
  static LMFAST_INLINE VecF load_twice(const float* p, int n) {
    return twice(_mm256_castps256_ps128(_mm256_maskload_ps(p, mask(n < 4 ? n : 4))));
  }
  static LMFAST_INLINE VecF twice(__m128 half) {
    return {_mm256_permutevar8x32_ps(_mm256_castps128_ps256(half),
                                     _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3))};
  }

  LMFAST_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  LMFAST_INLINE void store(bf16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16(v));
  }
  LMFAST_INLINE void store(f16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_f16(v));
  }
  LMFAST_INLINE void store(float* p, int n) const { _mm256_maskstore_ps(p, mask(n), v); }
  LMFAST_INLINE void store(bf16* p, int n) const { store16(p, to_bf16(v), n); }
  LMFAST_INLINE void store(f16* p, int n) const { store16(p, to_f16(v), n); }
};

LMFAST_INLINE VecF operator+(VecF a, VecF b) { return {_mm256_add_ps(a.v, b.v)}; }
LMFAST_INLINE VecF operator-(VecF a, VecF b) { return {_mm256_sub_ps(a.v, b.v)}; }
LMFAST_INLINE VecF operator*(VecF a, VecF b) { return {_mm256_mul_ps(a.v, b.v)}; }
LMFAST_INLINE VecF operator/(VecF a, VecF b) { return {_mm256_div_ps(a.v, b.v)}; }
LMFAST_INLINE VecF fmadd(VecF a, VecF b, VecF c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
LMFAST_INLINE VecF fmaddsub(VecF a, VecF b, VecF c) { return {_mm256_fmaddsub_ps(a.v, b.v, c.v)}; }
LMFAST_INLINE VecF max(VecF a, VecF b) { return {_mm256_max_ps(a.v, b.v)}; }
LMFAST_INLINE VecF min(VecF a, VecF b) { return {_mm256_min_ps(a.v, b.v)}; }
LMFAST_INLINE VecF swap_pairs(VecF a) { return {_mm256_permute_ps(a.v, 0xb1)}; }
LMFAST_INLINE float sum(VecF a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
LMFAST_INLINE float hmax(VecF a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}
LMFAST_INLINE VecF round_to_int(VecF a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// In two factors, so that results below 2^-126 are rounded once instead of lost.
LMFAST_INLINE VecF scale_by_power_of_two(VecF a, VecF n) {
  const __m256i whole = _mm256_cvtps_epi32(n.v);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const __m256i rest = _mm256_sub_epi32(whole, half);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256 f1 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256 f2 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return {_mm256_mul_ps(_mm256_mul_ps(a.v, f1), f2)};
}

}  // namespace
}  // namespace lmfast::LMFAST_ISA
