// AMX tiles for kernels compiled at the amx level: session, loads, products, packing. Kernels that
// the build also compiles with AVX512-BF16 alone get the same operations from tiles_avx512.h.
//
// One configuration serves every kernel: eight tiles of 16 rows of 64 bytes. A product adds
// A (16 rows of 32 bf16, as they lie in memory) times B (16 rows, each a pair of consecutive k for
// 16 columns: the VNNI layout) to C (16 x 16 float). Ragged edges are padded with zeros where the
// operands are packed, so no other tile shape is needed.
//
// The instructions are written as asm of our own: GCC 12's _tile_loadconfig names 8 of the 64 bytes
// it reads (the rest of the struct is then dropped as dead stores, and the process dies), and its
// _tile_loadd does not say that it reads memory, so stores may move past it. Its macros also need
// literal tile numbers, where templates need constants.
#pragma once

#include "simd_transpose.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define LMFAST_AMX 1  // tiles, of AMX or of tiles_avx512.h
#if !defined(__AMX_TILE__)
#include "tiles_avx512.h"
#elif defined(LMFAST_EMULATE_AMX)
#include "amx_emulated.h"
#endif

namespace lmfast::LMFAST_ISA {
namespace {

constexpr int kTileRows = 16;   // rows of A and C, columns of B and C
constexpr int kTileDepth = 32;  // bf16 in a row of A: the k of one product
constexpr int kTileBytes = 1024;

#if defined(__AMX_TILE__)

// What ldtilecfg reads: the shapes of the eight tiles.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

#if !defined(LMFAST_EMULATE_AMX)

LMFAST_INLINE void load_tile_config(const TileConfig* config) {
  asm volatile("ldtilecfg %0" : : "m"(*config) : "memory");
}
LMFAST_INLINE void release_tiles() { asm volatile("tilerelease" : : : "memory"); }

template <int kTile>
LMFAST_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
// 16 rows of 64 bytes, `stride` bytes apart.
template <int kTile>
LMFAST_INLINE void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
LMFAST_INLINE void tile_store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(kTile) : "memory");
}
// C += A * B in bf16, summed in float.
template <int kC, int kA, int kB>
LMFAST_INLINE void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}

#endif

// Turns the tiles on for the calling thread and releases them at the end of the scope: a thread
// with live tiles pays for 8 KB of state at every context switch.
class TileSession {
 public:
  TileSession() {
    const TileConfig config;
    load_tile_config(&config);
  }
  ~TileSession() { release_tiles(); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

#endif

// 32 bf16 from memory; the first n, zeros behind them and nothing read past them.
LMFAST_INLINE __m512i load_pairs(const bf16* p) { return _mm512_loadu_si512(p); }
LMFAST_INLINE __m512i load_pairs(const bf16* p, int n) {
  const __mmask32 mask = n >= 32 ? 0xffffffffu : (1u << (n > 0 ? n : 0)) - 1u;
  return _mm512_maskz_loadu_epi16(mask, p);
}
LMFAST_INLINE __m512i to_pairs(__m512 low, __m512 high) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}
LMFAST_INLINE __m512i load_pairs(const float* p) {
  return to_pairs(_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16));
}
LMFAST_INLINE __m512i load_pairs(const float* p, int n) {
  return to_pairs(VecF::load(p, n > 0 ? n : 0).v, VecF::load(p + 16, n > 16 ? n - 16 : 0).v);
}

// Rows k and k + 1, 16 floats each, rounded to bf16 as one VNNI row: even k in the low halves. Ties
// round away from zero; cvtne2ps and a permutation take 2.5 cycles a vector where this takes 1.
LMFAST_INLINE __m512i interleave_rounded(__m512 even, __m512 odd) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(even), half), 16);
  const __m512i high = _mm512_add_epi32(_mm512_castps_si512(odd), half);
  return _mm512_mask_blend_epi16(0xaaaaaaaau, low, high);
}
// Rows k and k + 1, 32 bf16 each, as two VNNI rows: columns 0-15 and 16-31.
LMFAST_INLINE void interleave(__m512i even, __m512i odd, __m512i* first, __m512i* second) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                       39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high =
      _mm512_set_epi16(63, 31, 62, 30, 61, 29, 60, 28, 59, 27, 58, 26, 57, 25, 56, 24, 55, 23, 54,
                       22, 53, 21, 52, 20, 51, 19, 50, 18, 49, 17, 48, 16);
  *first = _mm512_permutex2var_epi16(even, low, odd);
  *second = _mm512_permutex2var_epi16(even, high, odd);
}

// One tile from rows of T (bf16 or float, `stride` elements apart), of which `rows` exist with
// `columns` elements each; the rest is zeros. 1024 bytes at `tile`.
//
// pack_transposed: 16 rows of 32 columns -> B with k = column, column = row (K^T from rows of K).
template <class T>
LMFAST_INLINE void pack_transposed(const T* src, int64_t stride, int rows, int columns,
                                   void* tile) {
  __m512i r[16];
  if (rows >= 16 && columns >= 32) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = load_pairs(src + i * stride);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      r[i] = i < rows ? load_pairs(src + i * stride, columns) : _mm512_setzero_si512();
    }
  }
  transpose_words(r);
  char* out = static_cast<char*>(tile);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + 64 * i, r[i]);
}
// pack_rows: 32 rows of 32 columns -> two B tiles with k = row: columns 0-15, then 16-31 at
// `tile_stride` bytes.
template <class T>
LMFAST_INLINE void pack_rows(const T* src, int64_t stride, int rows, int columns, void* tile,
                             int64_t tile_stride) {
  char* out = static_cast<char*>(tile);
  for (int i = 0; i < 16; ++i) {
    const __m512i zero = _mm512_setzero_si512();
    const T* even = src + 2 * i * stride;
    const __m512i a = 2 * i < rows ? load_pairs(even, columns) : zero;
    const __m512i b = 2 * i + 1 < rows ? load_pairs(even + stride, columns) : zero;
    __m512i first, second;
    interleave(a, b, &first, &second);
    _mm512_storeu_si512(out + 64 * i, first);
    _mm512_storeu_si512(out + tile_stride + 64 * i, second);
  }
}
// pack_columns: 32 rows of 32 columns -> two A tiles with k = row, row = column (V^T from rows of
// V): columns 0-15, then 16-31 at `tile_stride` bytes.
template <class T>
LMFAST_INLINE void pack_columns(const T* src, int64_t stride, int rows, int columns, void* tile,
                                int64_t tile_stride) {
  __m512i first[16], second[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    const __m512i zero = _mm512_setzero_si512();
    const T* even = src + 2 * i * stride;
    const __m512i a = 2 * i < rows ? load_pairs(even, columns) : zero;
    const __m512i b = 2 * i + 1 < rows ? load_pairs(even + stride, columns) : zero;
    interleave(a, b, &first[i], &second[i]);
  }
  transpose_words(first);
  transpose_words(second);
  char* out = static_cast<char*>(tile);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    _mm512_storeu_si512(out + 64 * i, first[i]);
    _mm512_storeu_si512(out + tile_stride + 64 * i, second[i]);
  }
}

// A float is the exact sum of three bf16 numbers, its bits in three pieces; a product of floats in
// fp32's accuracy is the sum of the six products of their larger parts. The three left out are
// below 2^-24 of the largest.
LMFAST_INLINE __m512 truncated(__m512 x) {
  return _mm512_castsi512_ps(
      _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
// 32 floats in bf16 parts: rounded if there is one, otherwise split exactly by truncation.
template <int kParts>
LMFAST_INLINE void split_floats(__m512 low, __m512 high, __m512i* parts) {
  if constexpr (kParts == 1) {
    parts[0] = to_pairs(low, high);
  } else {
    const __m512i odd_words =
        _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27,
                         25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
#pragma GCC unroll 3
    for (int i = 0; i < kParts; ++i) {
      parts[i] =
          _mm512_permutex2var_epi16(_mm512_castps_si512(low), odd_words, _mm512_castps_si512(high));
      low = _mm512_sub_ps(low, truncated(low));
      high = _mm512_sub_ps(high, truncated(high));
    }
  }
}
// Which parts of A and B are multiplied. The small pairs come first, for all of the depth, and the
// leading parts last: the sum then rounds as often as one of plain fp32 products. Among the small
// ones the order changes one operand at a time: 16 tile loads for 24 products of 2 x 2 tiles.
template <int kParts>
struct Pairs {
  static constexpr int kSmall = 0;
  static constexpr int a[] = {0}, b[] = {0};
};
template <>
struct Pairs<3> {
  static constexpr int kSmall = 5;
  static constexpr int a[] = {0, 0, 1, 1, 2, 0}, b[] = {2, 1, 1, 0, 0, 0};
};

}  // namespace
}  // namespace lmfast::LMFAST_ISA

#endif
