// Products of rows, as 16-bit integers, with a packed matrix of int8 or int4.
//
// Codes are stored without sign, which is how AVX512-VNNI takes its first operand; what the offset
// adds is the offset times the sum of x, known per chunk of the depth. A chunk's sum is exact in 32
// bits, whichever instructions make it (see engine_operand.h), is converted once, and multiplied by
// its group's scale where there are groups. int8 reads a quarter of the floats' bytes: with two
// instructions for each 64 of them the product stays behind the memory's speed.
#pragma once

#include "engine_product_bf16.h"

namespace lmfast::LMFAST_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kIntRowsAtOnce = 3, kIntPanels = 4;
#elif defined(__AVX2__)
constexpr int kIntRowsAtOnce = 2, kIntPanels = 1;
#else
constexpr int kIntRowsAtOnce = 1, kIntPanels = 1;
#endif

// What a tile needs beside its panels and rows.
struct IntegerTile {
  EnginePlace w;
  int64_t depth, chunk;
  EnginePlace scales;  // f16, of the first panel's groups; or null
  const Operand* x;
  int64_t row;
  int64_t ahead;  // what is fetched (engine_product.h)
  // The step of the panel's depth k, of which a step has kStep.
  template <int kStep>
  LMFAST_INLINE const char* step(int panel, int64_t k) const {
    return w.at + k / kStep * w.stride + panel * 64;
  }
  LMFAST_INLINE const f16* scale(int panel, int64_t group) const {
    if (scales.at == nullptr) return nullptr;
    return reinterpret_cast<const f16*>(scales.at + group * scales.stride) + panel * kEnginePanel;
  }
};

// Four or eight bytes of x, in every lane.
LMFAST_INLINE int32_t bytes_at(const int8_t* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return x;
}

// Adds the exact sums of a chunk, minus the offset's part, to the row's sums.
LMFAST_INLINE void add_chunk(const IntegerTile& t, int panel, int64_t chunk, int row,
                             const int32_t* exact, float* sums) {
  constexpr int W = VecF::kWidth;
  const int32_t offset = t.x->sums[(t.row + row) * t.x->sums_stride + chunk];
  const f16* scales = t.scale(panel, chunk);
  float* out = sums + row * kSumsStride + panel * kEnginePanel;
#pragma GCC unroll 4
  for (int v = 0; v < kPanelVecs; ++v) {
    alignas(64) float lanes[W];
    for (int i = 0; i < W; ++i) lanes[i] = static_cast<float>(exact[v * W + i] - offset);
    const VecF x = VecF::load(lanes), before = VecF::load(out + v * W);
    (scales == nullptr ? before + x : fmadd(x, VecF::load(scales + v * W), before))
        .store(out + v * W);
  }
}

#if defined(__AVX512F__)

// The codes of 16 columns: 4 (int8) or 8 (int4) of the depth.
template <bool kNibbles>
struct Codes {
  static constexpr int kStep = kNibbles ? 8 : 4, kParts = kNibbles ? 2 : 1;
  static LMFAST_INLINE void load(const char* p, __m512i (&out)[kParts]) {
    const __m512i x = _mm512_loadu_si512(p);
    if constexpr (kNibbles) {
      const __m512i mask = _mm512_set1_epi8(15);
      out[0] = _mm512_and_si512(x, mask);
      out[1] = _mm512_and_si512(_mm512_srli_epi16(x, 4), mask);
    } else {
      out[0] = x;
    }
  }
};

// What the codes' offset adds to a chunk's exact sums.
LMFAST_INLINE __m512i offset_of(const IntegerTile& t, int64_t chunk, int row) {
  return _mm512_set1_epi32(t.x->sums[(t.row + row) * t.x->sums_stride + chunk]);
}

// Adds the exact sums of a chunk to the row's sums.
LMFAST_INLINE VecF add_chunk(const IntegerTile& t, int panel, int64_t chunk, __m512i exact,
                             VecF before) {
  const VecF x{_mm512_cvtepi32_ps(exact)};
  const f16* scales = t.scale(panel, chunk);
  return scales == nullptr ? before + x : fmadd(x, VecF::load(scales), before);
}

template <bool kNibbles, int kRows, int kPanels>
__attribute__((target("avx512vnni"), noinline)) void integer_tile_vnni(const IntegerTile& t,
                                                                       float* sums) {
  using C = Codes<kNibbles>;
  const int8_t* high = t.x->high + t.row * t.x->stride;
  const int8_t* low = t.x->low + t.row * t.x->stride;
  const int64_t stride = t.x->stride;
  VecF kept[kPanels];  // the sums of a single row
#pragma GCC unroll 4
  for (int p = 0; p < kPanels; ++p) kept[p] = VecF::zero();
  int64_t chunk = 0;
  for (int64_t k = 0; k < t.depth; ++chunk) {
    const int64_t end = k + t.chunk < t.depth ? k + t.chunk : t.depth;
    __m512i h[kRows][kPanels], l[kRows][kPanels];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) {
        h[r][p] = _mm512_setzero_si512();
        l[r][p] = _mm512_sub_epi32(_mm512_setzero_si512(), offset_of(t, chunk, r));
      }
    }
    for (; k < end; k += C::kStep) {
      __m512i codes[kPanels][C::kParts];
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) {
        const char* at = t.template step<C::kStep>(p, k);
        prefetch(at + t.ahead);
        C::load(at, codes[p]);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int i = 0; i < C::kParts; ++i) {
          const __m512i a = _mm512_set1_epi32(bytes_at(high + r * stride + k + 4 * i));
          const __m512i b = _mm512_set1_epi32(bytes_at(low + r * stride + k + 4 * i));
#pragma GCC unroll 4
          for (int p = 0; p < kPanels; ++p) {
            h[r][p] = _mm512_dpbusd_epi32(h[r][p], codes[p][i], a);
            l[r][p] = _mm512_dpbusd_epi32(l[r][p], codes[p][i], b);
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) {
        const __m512i total = _mm512_add_epi32(_mm512_slli_epi32(h[r][p], 8), l[r][p]);
        float* out = sums + r * kSumsStride + p * kEnginePanel;
        if constexpr (kRows == 1) {
          kept[p] = add_chunk(t, p, chunk, total, kept[p]);
        } else {
          add_chunk(t, p, chunk, total, VecF::load(out)).store(out);
        }
      }
    }
  }
  if constexpr (kRows == 1) {
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) kept[p].store(sums + p * kEnginePanel);
  }
}

// Even lanes of a and b plus the odd ones: columns 0-7 in a, 8-15 in b, two sums each.
LMFAST_INLINE __m512i add_neighbours(__m512i a, __m512i b) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return _mm512_add_epi32(_mm512_permutex2var_epi32(a, even, b),
                          _mm512_permutex2var_epi32(a, odd, b));
}

template <bool kNibbles, int kRows, int kPanels>
inline __attribute__((noinline)) void integer_tile(const IntegerTile& t, float* sums) {
  using C = Codes<kNibbles>;
  const int16_t* words = t.x->words + t.row * t.x->stride;
  int64_t chunk = 0;
  for (int64_t k = 0; k < t.depth; ++chunk) {
    const int64_t end = k + t.chunk < t.depth ? k + t.chunk : t.depth;
    __m512i s[kRows][kPanels][2];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) s[r][p][0] = s[r][p][1] = _mm512_setzero_si512();
    }
    for (; k < end; k += C::kStep) {
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) {
        const char* at = t.template step<C::kStep>(p, k);
        prefetch(at + t.ahead);
        __m512i codes[C::kParts];
        C::load(at, codes);
#pragma GCC unroll 2
        for (int i = 0; i < C::kParts; ++i) {
          const __m512i a = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(codes[i]));
          const __m512i b = _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(codes[i], 1));
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            int64_t four;
            memcpy(&four, words + r * t.x->stride + k + 4 * i, 8);
            const __m512i x = _mm512_set1_epi64(four);
            s[r][p][0] = _mm512_add_epi32(s[r][p][0], _mm512_madd_epi16(a, x));
            s[r][p][1] = _mm512_add_epi32(s[r][p][1], _mm512_madd_epi16(b, x));
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) {
        float* out = sums + r * kSumsStride + p * kEnginePanel;
        const __m512i exact = add_neighbours(s[r][p][0], s[r][p][1]);
        add_chunk(t, p, chunk, _mm512_sub_epi32(exact, offset_of(t, chunk, r)), VecF::load(out))
            .store(out);
      }
    }
  }
}

#else

template <bool kNibbles, int kRows, int kPanels>
inline __attribute__((noinline)) void integer_tile(const IntegerTile& t, float* sums) {
  constexpr int kStep = kNibbles ? 8 : 4, kParts = kNibbles ? 2 : 1;
  static_assert(kPanels == 1);
  const int16_t* words = t.x->words + t.row * t.x->stride;
  int64_t chunk = 0;
  for (int64_t k = 0; k < t.depth; ++chunk) {
    const int64_t end = k + t.chunk < t.depth ? k + t.chunk : t.depth;
#if defined(__AVX2__)
    __m256i s[kRows][4];
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) s[r][q] = _mm256_setzero_si256();
    }
    for (; k < end; k += kStep) {
      const char* at = t.step<kStep>(0, k);
      prefetch(at + t.ahead);
#pragma GCC unroll 2
      for (int i = 0; i < kParts; ++i) {
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) {  // four columns of four
          __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at) + q);
          if (kNibbles) {
            if (i == 1) bytes = _mm_srli_epi16(bytes, 4);
            bytes = _mm_and_si128(bytes, _mm_set1_epi8(15));
          }
          const __m256i codes = _mm256_cvtepu8_epi16(bytes);
#pragma GCC unroll 2
          for (int r = 0; r < kRows; ++r) {
            int64_t four;
            memcpy(&four, words + r * t.x->stride + k + 4 * i, 8);
            const __m256i x = _mm256_set1_epi64x(four);
            s[r][q] = _mm256_add_epi32(s[r][q], _mm256_madd_epi16(codes, x));
          }
        }
      }
    }
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
      alignas(32) int32_t exact[kEnginePanel];
#pragma GCC unroll 2
      for (int q = 0; q < 4; q += 2) {
        // Sums of neighbours come as columns 0 1 4 5 2 3 6 7.
        const __m256i pair =
            _mm256_permute4x64_epi64(_mm256_hadd_epi32(s[r][q], s[r][q + 1]), 0xd8);
        _mm256_store_si256(reinterpret_cast<__m256i*>(exact + 4 * q), pair);
      }
      add_chunk(t, 0, chunk, r, exact, sums);
    }
#else
    int32_t s[kRows][kEnginePanel] = {};
    for (; k < end; k += kStep) {
      const uint8_t* at = reinterpret_cast<const uint8_t*>(t.step<kStep>(0, k));
      for (int i = 0; i < kParts; ++i) {
        for (int r = 0; r < kRows; ++r) {
          const int16_t* x = words + r * t.x->stride + k + 4 * i;
          for (int c = 0; c < kEnginePanel; ++c) {
            for (int j = 0; j < 4; ++j) {
              const int code = kNibbles ? (at[4 * c + j] >> (4 * i)) & 15 : at[4 * c + j];
              s[r][c] += code * x[j];
            }
          }
        }
      }
    }
    for (int r = 0; r < kRows; ++r) add_chunk(t, 0, chunk, r, s[r], sums);
#endif
  }
}

#endif

template <bool kNibbles, int kPanels, int kRows = kIntRowsAtOnce>
LMFAST_INLINE void integer_rows(int rows, bool vnni, const IntegerTile& t, float* sums) {
  if (rows == kRows) {
#if defined(__AVX512F__)
    if (vnni) return integer_tile_vnni<kNibbles, kRows, kPanels>(t, sums);
#endif
    integer_tile<kNibbles, kRows, kPanels>(t, sums);
  } else if constexpr (kRows > 1) {
    integer_rows<kNibbles, kPanels, kRows - 1>(rows, vnni, t, sums);
  }
}

// As multiply_panels.
template <bool kNibbles, class Done>
LMFAST_INLINE void multiply_integers(const EngineMatrix& w, const char* memory, const Operand& x,
                                     int64_t rows, int64_t first, int64_t past, bool vnni,
                                     float* carried, const Done& done) {
  const int64_t steps = w.depth / (kNibbles ? 8 : 4), chunk = operand_chunk(w);
  const bool grouped = w.group != 0;
  int panels = 0;
  for (int64_t p = first; p < past; p += panels) {
    panels = panels_together(p, past, kIntPanels);
    const EnginePlace at = engine_panel(w, memory, p);
    const EnginePlace of_groups = grouped ? engine_scales(w, memory, p) : EnginePlace{};
    for (int64_t r = 0; r < rows; r += kIntRowsAtOnce) {
      const int count = static_cast<int>(rows - r < kIntRowsAtOnce ? rows - r : kIntRowsAtOnce);
      float* sums = carried;
      memset(sums, 0, sizeof(float) * static_cast<size_t>(count * kSumsStride));
      const int64_t ahead = r == kIntRowsAtOnce ? steps * at.stride : kAheadNarrow;
      const IntegerTile t{at, w.depth, chunk, of_groups, &x, r, ahead};
      if (panels == kIntPanels) {
        integer_rows<kNibbles, kIntPanels>(count, vnni, t, sums);
      } else if (panels == 2) {
        integer_rows<kNibbles, kIntPanels == 1 ? 1 : 2>(count, vnni, t, sums);
      } else {
        integer_rows<kNibbles, 1>(count, vnni, t, sums);
      }
      const float* scales =
          grouped ? nullptr : reinterpret_cast<const float*>(memory + w.scales) + p * kEnginePanel;
      for (int i = 0; i < count; ++i) {
        const VecF step = VecF::set1(x.steps[r + i]);
        for (int64_t c = 0; c < panels * kEnginePanel; c += VecF::kWidth) {
          float* at = sums + i * kSumsStride + c;
          VecF v = VecF::load(at) * step;
          if (!grouped) v = v * VecF::load(scales + c);
          v.store(at);
        }
      }
      done(r, count, p, panels, sums);
    }
  }
}

// done(row, rows, panel, panels, sums[row][kSumsStride]) for rows of x times panels [first, past).
template <class Done>
LMFAST_INLINE void multiply(const EngineMatrix& w, const char* memory, const Operand& x, RowsAs as,
                            int64_t rows, int64_t first, int64_t past, char* staging,
                            float* carried, const Done& done) {
#if defined(__AVX512F__)
  if (as == RowsAs::kPairs) {
    return multiply_rounded(w, memory, x, rows, first, past, staging, carried, done);
  }
#else
  static_cast<void>(staging);
#endif
  const bool vnni = as == RowsAs::kBytes;
  switch (static_cast<EngineWeights>(w.type)) {
    case EngineWeights::kF32:
      return multiply_floats<PanelF32>(w, memory, x, rows, first, past, carried, done);
    case EngineWeights::kBF16:
      return multiply_floats<PanelBF16>(w, memory, x, rows, first, past, carried, done);
    case EngineWeights::kI8:
      return multiply_integers<false>(w, memory, x, rows, first, past, vnni, carried, done);
    case EngineWeights::kI4:
      return multiply_integers<true>(w, memory, x, rows, first, past, vnni, carried, done);
  }
}

}  // namespace
}  // namespace lmfast::LMFAST_ISA
