// Sums along the lanes of vectors, in one order whoever asks.
#pragma once

#include "simd.h"

namespace lmfast::LMFAST_ISA {
namespace {

// The sums of the lanes of four vectors, in one order for all.
LMFAST_INLINE void sum4(VecF a, VecF b, VecF c, VecF d, float* out) {
#if defined(__AVX512F__)
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
  const __m512d x = _mm512_castps_pd(ab), y = _mm512_castps_pd(cd);
  const __m512 all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                                   _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif defined(__AVX2__)
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a.v, b.v), _mm256_hadd_ps(c.v, d.v));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
#else
  out[0] = sum(a);
  out[1] = sum(b);
  out[2] = sum(c);
  out[3] = sum(d);
#endif
}

// The sums of kCount vectors, one or a multiple of four.
template <int kCount>
LMFAST_INLINE void sum_lanes(const VecF* of, int64_t stride, float* out) {
  if constexpr (kCount == 1) {
    float first[4];
    sum4(of[0], VecF::zero(), VecF::zero(), VecF::zero(), first);
    out[0] = first[0];
  } else {
#pragma GCC unroll 2
    for (int c = 0; c < kCount; c += 4) {
      sum4(of[c * stride], of[(c + 1) * stride], of[(c + 2) * stride], of[(c + 3) * stride],
           out + c);
    }
  }
}

}  // namespace
}  // namespace lmfast::LMFAST_ISA
