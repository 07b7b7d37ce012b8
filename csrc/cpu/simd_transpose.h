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

LMFAST_INLINE void transpose(VecF (&rows)[16]) {
  __m512i words[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) words[i] = _mm512_castps_si512(rows[i].v);
  transpose_words(words);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) rows[i].v = _mm512_castsi512_ps(words[i]);
}

#elif defined(__AVX2__)

// Transposes 8 rows of 8 floats in registers.
LMFAST_INLINE void transpose(VecF (&rows)[8]) {
  __m256 r[8], t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(rows[2 * i].v, rows[2 * i + 1].v);
    t[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i].v, rows[2 * i + 1].v);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    rows[i].v = _mm256_permute2f128_ps(r[i], r[4 + i], 0x20);
    rows[4 + i].v = _mm256_permute2f128_ps(r[i], r[4 + i], 0x31);
  }
}

#else

LMFAST_INLINE void transpose(VecF (&rows)[VecF::kWidth]) {
  constexpr int W = VecF::kWidth;
  float in[W][W], out[W];
  for (int i = 0; i < W; ++i) rows[i].store(in[i]);
  for (int i = 0; i < W; ++i) {
    for (int j = 0; j < W; ++j) out[j] = in[j][i];
    rows[i] = VecF::load(out);
  }
}

#endif

// The first n values, zeros behind them; n may be more than a vector has. Without masks a part of a
// vector takes many instructions.
template <class T>
LMFAST_INLINE VecF load_most(const T* p, int n) {
#if !defined(__AVX512F__)
  if (n >= VecF::kWidth) return VecF::load(p);
#endif
  return VecF::load(p, n);
}
template <class T>
LMFAST_INLINE void store_most(VecF x, T* p, int n) {
#if !defined(__AVX512F__)
  if (n >= VecF::kWidth) return x.store(p);
#endif
  x.store(p, n);
}

// out[c][r] = in[r][c] for r < lanes; lanes from `rows` on are zeros. `lanes` is a multiple of the
// vectors' width.
template <class T>
LMFAST_INLINE void rows_to_lanes(const T* in, int64_t in_stride, int rows, int columns, float* out,
                                 int64_t out_stride, int lanes) {
  constexpr int W = VecF::kWidth;
  for (int r0 = 0; r0 < lanes; r0 += W) {
    for (int c0 = 0; c0 < columns; c0 += W) {
      VecF w[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        w[i] =
            r0 + i < rows ? load_most(in + (r0 + i) * in_stride + c0, columns - c0) : VecF::zero();
      }
      transpose(w);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        if (c0 + i >= columns) break;
        w[i].store(out + (c0 + i) * out_stride + r0);
      }
    }
  }
}

// out[r][c] = in[c][r] * scale[r] for r < rows.
template <class T>
LMFAST_INLINE void lanes_to_rows(const float* in, int64_t in_stride, const float* scale, int rows,
                                 int columns, T* out, int64_t out_stride) {
  constexpr int W = VecF::kWidth;
  for (int r0 = 0; r0 < rows; r0 += W) {
    const VecF factor = load_most(scale + r0, rows - r0);
    for (int c0 = 0; c0 < columns; c0 += W) {
      VecF w[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        const bool there = c0 + i < columns;
        w[i] = there ? VecF::load(in + (c0 + i) * in_stride + r0) * factor : VecF::zero();
      }
      transpose(w);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        if (r0 + i >= rows) break;
        store_most(w[i], out + (r0 + i) * out_stride + c0, columns - c0);
      }
    }
  }
}

}  // namespace
}  // namespace lmfast::LMFAST_ISA
