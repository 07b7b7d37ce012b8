// Numbers of 8 and of 4 bits as vectors of floats.
#pragma once

#include "../simd.h"

namespace lmfast::LMFAST_ISA {
namespace {

constexpr int W = VecF::kWidth;

// Signed: W int8. Pair: W bytes of two codes each. Numbers: what codes of 4 bits stand for. With a
// count, the first n bytes are read and the others taken as zero.
#if defined(__AVX512F__)
struct Signed {
  static LMFAST_INLINE VecF load(const uint8_t* p) {
    return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static LMFAST_INLINE VecF load(const uint8_t* p, int n) {
    return widen(_mm_maskz_loadu_epi8(VecF::mask(n), p));
  }
  static LMFAST_INLINE VecF widen(__m128i bytes) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
  }
};
struct Pair {
  __m512i v;
  static LMFAST_INLINE Pair load(const uint8_t* p) {
    return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  static LMFAST_INLINE Pair load(const uint8_t* p, int n) {
    return {_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(VecF::mask(n), p))};
  }
};
struct Numbers {  // what a code stands for
  VecF of;
  LMFAST_INLINE explicit Numbers(float scale)
      : of(VecF{_mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7)} *
           VecF::set1(scale)) {}
  // The permutation looks at the lowest four bits only.
  LMFAST_INLINE VecF low(Pair p) const { return {_mm512_permutexvar_ps(p.v, of.v)}; }
  LMFAST_INLINE VecF high(Pair p) const {
    return {_mm512_permutexvar_ps(_mm512_srli_epi32(p.v, 4), of.v)};
  }
};
#elif defined(__AVX2__)
LMFAST_INLINE __m128i some_bytes(const uint8_t* p, int n) {
  uint8_t buffer[8] = {};
  memcpy(buffer, p, static_cast<size_t>(n < 8 ? n : 8));
  return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(buffer));
}
struct Signed {
  static LMFAST_INLINE VecF load(const uint8_t* p) {
    return widen(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static LMFAST_INLINE VecF load(const uint8_t* p, int n) { return widen(some_bytes(p, n)); }
  static LMFAST_INLINE VecF widen(__m128i bytes) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))};
  }
};
struct Pair {
  __m256i v;
  static LMFAST_INLINE Pair load(const uint8_t* p) {
    return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))};
  }
  static LMFAST_INLINE Pair load(const uint8_t* p, int n) {
    return {_mm256_cvtepu8_epi32(some_bytes(p, n))};
  }
};
struct Numbers {
  VecF scale, offset;
  LMFAST_INLINE explicit Numbers(float s) : scale(VecF::set1(s)), offset(VecF::set1(-8 * s)) {}
  LMFAST_INLINE VecF low(Pair p) const {
    return number(_mm256_and_si256(p.v, _mm256_set1_epi32(15)));
  }
  LMFAST_INLINE VecF high(Pair p) const { return number(_mm256_srli_epi32(p.v, 4)); }
  LMFAST_INLINE VecF number(__m256i code) const {
    return fmadd(VecF{_mm256_cvtepi32_ps(code)}, scale, offset);
  }
};
#else
struct Signed {
  static LMFAST_INLINE VecF load(const uint8_t* p, int n = W) {
    float lanes[W] = {};
    for (int i = 0; i < n && i < W; ++i) lanes[i] = static_cast<float>(static_cast<int8_t>(p[i]));
    return VecF::load(lanes);
  }
};
struct Pair {
  uint8_t v[W];
  static LMFAST_INLINE Pair load(const uint8_t* p, int n = W) {
    Pair pair{};
    for (int i = 0; i < n && i < W; ++i) pair.v[i] = p[i];
    return pair;
  }
};
struct Numbers {
  float scale;
  LMFAST_INLINE explicit Numbers(float s) : scale(s) {}
  LMFAST_INLINE VecF low(Pair p) const { return number(p, 0); }
  LMFAST_INLINE VecF high(Pair p) const { return number(p, 4); }
  LMFAST_INLINE VecF number(Pair p, int shift) const {
    float lanes[W];
    for (int i = 0; i < W; ++i) lanes[i] = static_cast<float>(((p.v[i] >> shift) & 15) - 8) * scale;
    return VecF::load(lanes);
  }
};
#endif

}  // namespace
}  // namespace lmfast::LMFAST_ISA
