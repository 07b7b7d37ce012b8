// Sums of rows, as 16-bit integers, times a block of a matrix of int8 or int4.
//
// Codes are stored without sign, which is how AVX512-VNNI takes its first operand; what the offset
// adds is the offset times the sum of x, known per chunk of the depth. A chunk's sum is exact in 32
// bits, whichever instructions make it (see engine_operand.h), is converted once, and multiplied by
// its group's scale where there are groups. int8 reads a quarter of the floats' bytes: with two
// instructions for each 64 of them the product stays behind the memory's speed.
#pragma once

#include "engine_product.h"

namespace lmfast::LMFAST_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kIntRowsAtOnce = 3, kIntPanels = 4;
#elif defined(__AVX2__)
constexpr int kIntRowsAtOnce = 2, kIntPanels = 4;
#else
constexpr int kIntRowsAtOnce = 1, kIntPanels = 4;
#endif
#if !defined(__AVX512F__)
// Steps of one panel before those of the next, and how far ahead a single pair of rows fetches.
constexpr int64_t kIntSteps = 8, kAheadInteger = 2048;
#endif

// What a tile needs beside its panels and rows.
struct IntegerTile {
  EnginePlace w;
  int64_t depth, chunk;
  EnginePlace scales;  // f16, of the first panel's groups; or null
  const Operand* x;
  int64_t row;
#if defined(__AVX512F__)
  int64_t ahead;
#else
  Fetched fetched;  // of every kIntSteps steps of a panel
#endif
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

#if defined(__AVX2__)

// The sums of 16 columns of one row: two neighbours for each column.
struct ColumnSums {
  __m256i s[4];

  LMFAST_INLINE void clear() {
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) s[q] = _mm256_setzero_si256();
  }
  LMFAST_INLINE void add(int q, __m256i codes, __m256i x) {
    s[q] = _mm256_add_epi32(s[q], _mm256_madd_epi16(codes, x));
  }
  // The columns 8 v ... 8 v + 7, exactly.
  LMFAST_INLINE __m256i columns(int v) const {
    // Sums of neighbours come as columns 0 1 4 5 2 3 6 7.
    return _mm256_permute4x64_epi64(_mm256_hadd_epi32(s[2 * v], s[2 * v + 1]), 0xd8);
  }
  LMFAST_INLINE VecF less(int v, int32_t offset) const {
    return {_mm256_cvtepi32_ps(_mm256_sub_epi32(columns(v), _mm256_set1_epi32(offset)))};
  }
};

// Adds a step: kStep of the depth, 16 columns.
template <bool kNibbles, int kRows>
LMFAST_INLINE void add_step(const char* at, const int16_t* words, int64_t stride,
                            ColumnSums (&sums)[kRows]) {
#pragma GCC unroll 2
  for (int i = 0; i < (kNibbles ? 2 : 1); ++i) {
    __m256i x[kRows];
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
      int64_t four;
      memcpy(&four, words + r * stride + 4 * i, 8);
      x[r] = _mm256_set1_epi64x(four);
    }
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {  // four columns of four
      __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at) + q);
      if (kNibbles) {
        if (i == 1) bytes = _mm_srli_epi16(bytes, 4);
        bytes = _mm_and_si128(bytes, _mm_set1_epi8(15));
      }
      const __m256i codes = _mm256_cvtepu8_epi16(bytes);
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) sums[r].add(q, codes, x[r]);
    }
  }
}

#else

struct ColumnSums {
  int32_t s[kEnginePanel];

  LMFAST_INLINE void clear() { memset(s, 0, sizeof(s)); }
  LMFAST_INLINE VecF less(int v, int32_t offset) const {
    float lanes[VecF::kWidth];
    for (int i = 0; i < VecF::kWidth; ++i) {
      lanes[i] = static_cast<float>(s[v * VecF::kWidth + i] - offset);
    }
    return VecF::load(lanes);
  }
};

template <bool kNibbles, int kRows>
LMFAST_INLINE void add_step(const char* at, const int16_t* words, int64_t stride,
                            ColumnSums (&sums)[kRows]) {
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(at);
  for (int i = 0; i < (kNibbles ? 2 : 1); ++i) {
    for (int r = 0; r < kRows; ++r) {
      const int16_t* x = words + r * stride + 4 * i;
      for (int c = 0; c < kEnginePanel; ++c) {
        for (int j = 0; j < 4; ++j) {
          const int byte = bytes[4 * c + j];
          sums[r].s[c] += (kNibbles ? (byte >> (4 * i)) & 15 : byte) * x[j];
        }
      }
    }
  }
}

#endif

// Registers hold the sums of one panel at a time: the panels of a few steps, 2 KB, are passed one
// after the other, and each pass fetches its part of the next 2 KB, so that memory is still read as
// one stream. Panel by panel over the whole depth, every pass read a line of four from memory: a
// token of a 160 M Llama on one core of a Zen 3 took 23.0 ms (int8) and 18.5 (int4), so 11.6 and
// 8.8; fp32, at memory's speed, has four times the bytes and 40. Two rows at a time make 55 to 62
// GMAC/s in the second-level cache, three 50.
template <bool kNibbles, int kRows, int kPanels>
inline __attribute__((noinline)) void integer_tile(const IntegerTile& t, float* sums) {
  constexpr int kStep = kNibbles ? 8 : 4, W = VecF::kWidth;
  constexpr int64_t kPart = kIntSteps * kStep;
  const int16_t* words = t.x->words + t.row * t.x->stride;
  const char* at = t.w.at;
  const char* next = t.fetched.next;
  ColumnSums kept[kPanels][kRows];
  int64_t chunk = 0;
  for (int64_t k = 0, end; k < t.depth; k = end, ++chunk) {
    end = k + t.chunk < t.depth ? k + t.chunk : t.depth;
    for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) kept[p][r].clear();
    }
    for (; k < end; k += kPart) {
      const int64_t steps = (end - k < kPart ? end - k : kPart) / kStep;
      for (int p = 0; p < kPanels; ++p) {
        ColumnSums exact[kRows];
#pragma GCC unroll 2
        for (int r = 0; r < kRows; ++r) exact[r] = kept[p][r];
        const char* step = at + p * 64;
        for (int64_t i = 0; i < steps; ++i, step += t.w.stride) {
          if (i < t.fetched.steps) {
            prefetch(next);
            next += 64;
          }
          add_step<kNibbles, kRows>(step, words + k + i * kStep, t.x->stride, exact);
        }
#pragma GCC unroll 2
        for (int r = 0; r < kRows; ++r) kept[p][r] = exact[r];
      }
      at += steps * t.w.stride;
    }
    for (int p = 0; p < kPanels; ++p) {
      const f16* scales = t.scale(p, chunk);
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) {
        const int32_t offset = t.x->sums[(t.row + r) * t.x->sums_stride + chunk];
        float* out = sums + r * kSumsStride + p * kEnginePanel;
#pragma GCC unroll 4
        for (int v = 0; v < kPanelVecs; ++v) {
          const VecF x = kept[p][r].less(v, offset), before = VecF::load(out + v * W);
          (scales == nullptr ? before + x : fmadd(x, VecF::load(scales + v * W), before))
              .store(out + v * W);
        }
      }
    }
  }
}

#endif

}  // namespace
}  // namespace lmfast::LMFAST_ISA
