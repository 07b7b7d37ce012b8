// VecF on AVX-512 (F, BW, VL, DQ); bf16 stores use the AVX512-BF16 instruction where the level has
// it.
#pragma once

#include <immintrin.h>

namespace lmfast::LMFAST_ISA {
namespace {

struct VecF {
  static constexpr int kWidth = 16;
  using scalar = float;
  __m512 v;

  static LMFAST_INLINE VecF zero() { return {_mm512_setzero_ps()}; }
  static LMFAST_INLINE VecF set1(float x) { return {_mm512_set1_ps(x)}; }
  static LMFAST_INLINE __mmask16 mask(int n) {
    return static_cast<__mmask16>(n >= 16 ? 0xffffu : (1u << n) - 1u);
  }

  static LMFAST_INLINE __m512 from_bf16(__m256i h) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  }
  static LMFAST_INLINE __m256i to_bf16(__m512 x) {
#if defined(__AVX512BF16__)
    // Rounds to nearest even; numbers below 2^-126 become zero.
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
#else
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i result = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
    return _mm512_cvtepi32_epi16(result);
#endif
  }
  static LMFAST_INLINE __m256i to_f16(__m512 x) {
    return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }

  static LMFAST_INLINE VecF load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static LMFAST_INLINE VecF load(const bf16* p) {
    return {from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static LMFAST_INLINE VecF load(const f16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  // The first n lanes from memory, zeros in the others; nothing past them is read.
  static LMFAST_INLINE VecF load(const float* p, int n) {
    return {_mm512_maskz_loadu_ps(mask(n), p)};
  }
  static LMFAST_INLINE VecF load(const bf16* p, int n) {
    return {from_bf16(_mm256_maskz_loadu_epi16(mask(n), p))};
  }
  static LMFAST_INLINE VecF load(const f16* p, int n) {
    return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask(n), p))};
  }
  // kWidth / 2 values, each in two neighbouring lanes; the masked form reads n of them.
  static LMFAST_INLINE VecF load_twice(const float* p) {
    const __m512 half = _mm512_castps256_ps512(_mm256_loadu_ps(p));
    return {_mm512_permutexvar_ps(pair_index(), half)};
  }
  static LMFAST_INLINE VecF load_twice(const float* p, int n) {
    return {_mm512_permutexvar_ps(pair_index(), _mm512_maskz_loadu_ps(mask(n), p))};
  }
  static LMFAST_INLINE __m512i pair_index() {
    return _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  }

  LMFAST_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  LMFAST_INLINE void store(bf16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(v));
  }
  LMFAST_INLINE void store(f16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_f16(v));
  }
  LMFAST_INLINE void store(float* p, int n) const { _mm512_mask_storeu_ps(p, mask(n), v); }
  LMFAST_INLINE void store(bf16* p, int n) const {
    _mm256_mask_storeu_epi16(p, mask(n), to_bf16(v));
  }
  LMFAST_INLINE void store(f16* p, int n) const { _mm256_mask_storeu_epi16(p, mask(n), to_f16(v)); }
};

LMFAST_INLINE VecF operator+(VecF a, VecF b) { return {_mm512_add_ps(a.v, b.v)}; }
LMFAST_INLINE VecF operator-(VecF a, VecF b) { return {_mm512_sub_ps(a.v, b.v)}; }
LMFAST_INLINE VecF operator*(VecF a, VecF b) { return {_mm512_mul_ps(a.v, b.v)}; }
LMFAST_INLINE VecF operator/(VecF a, VecF b) { return {_mm512_div_ps(a.v, b.v)}; }
LMFAST_INLINE VecF fmadd(VecF a, VecF b, VecF c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// a * b - c in even lanes, a * b + c in odd ones.
LMFAST_INLINE VecF fmaddsub(VecF a, VecF b, VecF c) { return {_mm512_fmaddsub_ps(a.v, b.v, c.v)}; }
LMFAST_INLINE VecF max(VecF a, VecF b) { return {_mm512_max_ps(a.v, b.v)}; }
LMFAST_INLINE VecF min(VecF a, VecF b) { return {_mm512_min_ps(a.v, b.v)}; }
LMFAST_INLINE VecF swap_pairs(VecF a) { return {_mm512_permute_ps(a.v, 0xb1)}; }
LMFAST_INLINE float sum(VecF a) { return _mm512_reduce_add_ps(a.v); }
LMFAST_INLINE float hmax(VecF a) { return _mm512_reduce_max_ps(a.v); }
LMFAST_INLINE VecF round_to_int(VecF a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
LMFAST_INLINE VecF scale_by_power_of_two(VecF a, VecF n) { return {_mm512_scalef_ps(a.v, n.v)}; }

}  // namespace
}  // namespace lmfast::LMFAST_ISA
