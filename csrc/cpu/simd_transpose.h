// Rows of a storage type to columns of float and back, for kernels whose vector lanes are rows.
#pragma once

#include "simd.h"

namespace lmfast::LMFAST_ISA {
namespace {

#if defined(__AVX512F__)

// Transposes 16 rows of 16 32-bit words in registers.
LMFAST_INLINE void transpose_words(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

// out[c][r] = in[r][c] for r < lanes; lanes from `rows` on are zeros. `lanes` is a multiple of 16.
template <class T>
LMFAST_INLINE void rows_to_lanes(const T* in, int64_t in_stride, int rows, int columns, float* out,
                                 int64_t out_stride, int lanes) {
  for (int r0 = 0; r0 < lanes; r0 += 16) {
    for (int c0 = 0; c0 < columns; c0 += 16) {
      __m512i w[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        w[i] = r0 + i < rows
                   ? _mm512_castps_si512(VecF::load(in + (r0 + i) * in_stride + c0, columns - c0).v)
                   : _mm512_setzero_si512();
      }
      transpose_words(w);
      for (int i = 0; i < 16 && c0 + i < columns; ++i) {
        _mm512_storeu_si512(out + (c0 + i) * out_stride + r0, w[i]);
      }
    }
  }
}

// out[r][c] = in[c][r] * scale[r] for r < rows.
template <class T>
LMFAST_INLINE void lanes_to_rows(const float* in, int64_t in_stride, const float* scale, int rows,
                                 int columns, T* out, int64_t out_stride) {
  for (int r0 = 0; r0 < rows; r0 += 16) {
    const VecF factor = VecF::load(scale + r0, rows - r0);
    for (int c0 = 0; c0 < columns; c0 += 16) {
      __m512i w[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const bool there = c0 + i < columns;
        const VecF x = there ? VecF::load(in + (c0 + i) * in_stride + r0) * factor : VecF::zero();
        w[i] = _mm512_castps_si512(x.v);
      }
      transpose_words(w);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        if (r0 + i >= rows) break;
        VecF{_mm512_castsi512_ps(w[i])}.store(out + (r0 + i) * out_stride + c0, columns - c0);
      }
    }
  }
}

#else

template <class T>
LMFAST_INLINE void rows_to_lanes(const T* in, int64_t in_stride, int rows, int columns, float* out,
                                 int64_t out_stride, int lanes) {
  constexpr int W = VecF::kWidth;
  for (int r = 0; r < lanes; ++r) {
    for (int c0 = 0; c0 < columns; c0 += W) {
      const int n = columns - c0 < W ? columns - c0 : W;
      float x[W] = {};
      if (r < rows) VecF::load(in + r * in_stride + c0, n).store(x);
      for (int i = 0; i < n; ++i) out[(c0 + i) * out_stride + r] = x[i];
    }
  }
}

template <class T>
LMFAST_INLINE void lanes_to_rows(const float* in, int64_t in_stride, const float* scale, int rows,
                                 int columns, T* out, int64_t out_stride) {
  constexpr int W = VecF::kWidth;
  for (int r = 0; r < rows; ++r) {
    for (int c0 = 0; c0 < columns; c0 += W) {
      const int n = columns - c0 < W ? columns - c0 : W;
      float x[W] = {};
      for (int i = 0; i < n; ++i) x[i] = in[(c0 + i) * in_stride + r] * scale[r];
      VecF::load(x).store(out + r * out_stride + c0, n);
    }
  }
}

#endif

}  // namespace
}  // namespace lmfast::LMFAST_ISA
