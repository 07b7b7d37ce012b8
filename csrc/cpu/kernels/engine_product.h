// Products of a few or many rows with a packed matrix of floats or bf16.
//
// Floor: reading the matrix once, from memory while decoding. Blocks of four panels of 16 columns,
// their depth in order, are read as they lie, one stream; one broadcast of x serves four panels,
// and no sum crosses lanes. Every sum runs through the depth in order whatever the number of rows,
// so a row's result is the same alone and in a batch. bf16 pairs of one column are widened by a
// shift and a mask, products are in fp32: x is not rounded.
//
// One core of a Zen 4 reads 39 GB/s in any simple way. Panels that lay one behind the other, so
// that a block was four streams 12 KB apart, came to 23 GB/s with the next lines asked for in the
// first-level cache, and to 29 in the second; one stream, to 40. A token of GPT-2 on one core went
// from 0.85 (fp32), 0.78 (bf16), 0.56 (int8), 0.49 (int4) of a plain read of as many bytes to 0.95,
// 0.96, 0.89 and 0.78.
//
// Up to kRows rows share one reading of the weights from registers; more rows find them in the
// second-level cache, a part of the depth at a time. The second pass over a part fetches the next
// one: otherwise memory would rest while the rows behind the first ones are multiplied.
#pragma once

#include "../prefetch.h"
#include "engine_operand.h"

namespace lmfast::LMFAST_ISA {
namespace {

constexpr int kPanelVecs = kEnginePanel / VecF::kWidth;
#if defined(__AVX512F__)
constexpr int kRowsAtOnce = 6, kPanelsOfOne = 4, kPanelsOfMany = 4;
#elif defined(__AVX2__)
constexpr int kRowsAtOnce = 3, kPanelsOfOne = 4, kPanelsOfMany = 2;
#else
constexpr int kRowsAtOnce = 3, kPanelsOfOne = 2, kPanelsOfMany = 1;
#endif
constexpr int kMostPanels = kEngineBlock;
constexpr int kSumsStride = kMostPanels * kEnginePanel;
constexpr int64_t kDepthPart = 1024;  // 4 panels: 256 KB of floats

// kStep rows of the depth, 16 columns each: 64 bytes.
struct PanelF32 {
  static constexpr int kStep = 1;
  static LMFAST_INLINE void load(const char* p, int v, VecF (&out)[1]) {
    out[0] = VecF::load(reinterpret_cast<const float*>(p) + v * VecF::kWidth);
  }
};
struct PanelBF16 {
  static constexpr int kStep = 2;
  static LMFAST_INLINE void load(const char* p, int v, VecF (&out)[2]) {
    p += v * VecF::kWidth * 4;
#if defined(__AVX512F__)
    const __m512i x = _mm512_loadu_si512(p);
    out[0] = {_mm512_castsi512_ps(_mm512_slli_epi32(x, 16))};
    out[1] = {
        _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
#elif defined(__AVX2__)
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    out[0] = {_mm256_castsi256_ps(_mm256_slli_epi32(x, 16))};
    out[1] = {
        _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
#else
    uint32_t pairs[4], low[4];
    memcpy(pairs, p, 16);
    for (int i = 0; i < 4; ++i) {
      low[i] = pairs[i] << 16;
      pairs[i] &= 0xffff0000u;
    }
    memcpy(&out[0].v, low, 16);
    memcpy(&out[1].v, pairs, 16);
#endif
  }
};

// How many bytes ahead of a product its weights are fetched. What cannot be told from the latency:
// two cores of a Zen 4, a token of a 160 M Llama in ms, 1024 | 2048 | 3072 | 4096 bytes: fp32 7.13
// | 7.08 | 7.03 | -, bf16 3.43 | 3.65 | 3.76 | 5.2 (8192), int8 2.45 | 2.74 | 2.64 | 3.0, int4 1.63
// | 1.96 | 1.81 | 1.9.
#if defined(__AMX_TILE__)
constexpr int64_t kAhead = 2048, kAheadNarrow = 2048;  // other processors; not measured there
#else
constexpr int64_t kAhead = 2048, kAheadNarrow = 1024;  // of floats, and of all others
#endif

// sums[r][p] (+)= x[r] times kPanels panels, `steps` steps of the depth; fetches what is `ahead`.
template <class Format, int kRows, int kPanels>
inline __attribute__((noinline)) void product_tile(const EnginePlace& w, int64_t steps,
                                                   const float* x, int64_t stride, float* sums,
                                                   bool add, int64_t ahead) {
  constexpr int kVecs = kPanels * kPanelVecs, W = VecF::kWidth;
  VecF sum[kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kVecs; ++v) {
      sum[r][v] = add ? VecF::load(sums + r * kSumsStride + v * W) : VecF::zero();
    }
  }
  for (int64_t k = 0; k < steps; ++k) {
    VecF b[kVecs][Format::kStep];
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) {
      const char* at = w.at + k * w.stride + p * 64;
      prefetch(at + ahead);
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVecs; ++v) Format::load(at, v, b[p * kPanelVecs + v]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < Format::kStep; ++i) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const VecF a = VecF::set1(x[r * stride + k * Format::kStep + i]);
#pragma GCC unroll 16
        for (int v = 0; v < kVecs; ++v) sum[r][v] = fmadd(a, b[v][i], sum[r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kVecs; ++v) sum[r][v].store(sums + r * kSumsStride + v * W);
  }
}

template <class Format, int kPanels, int kRows = kRowsAtOnce>
LMFAST_INLINE void product_rows(int rows, const EnginePlace& w, int64_t steps, const float* x,
                                int64_t stride, float* sums, bool add, int64_t ahead) {
  if (rows == kRows) {
    product_tile<Format, kRows, kPanels>(w, steps, x, stride, sums, add, ahead);
  } else if constexpr (kRows > 1) {
    product_rows<Format, kPanels, kRows - 1>(rows, w, steps, x, stride, sums, add, ahead);
  }
}

// How many panels from `panel` on, before `past`, are multiplied together: `most`, a pair or one,
// of one block.
LMFAST_INLINE int panels_together(int64_t panel, int64_t past, int most) {
  const int64_t end = panel / kEngineBlock * kEngineBlock + kEngineBlock;
  const int64_t left = (end < past ? end : past) - panel;
  return left >= most ? most : (left >= 2 && most > 2 ? 2 : 1);
}

// done(row, rows, panel, panels, sums) for all rows and the panels [first, past); `carried` holds
// kSumsStride floats per row when there are more than kRowsAtOnce.
template <class Format, int kGroup, class Done>
LMFAST_INLINE void multiply_panels(const EngineMatrix& w, const char* memory, const Operand& x,
                                   int64_t rows, int64_t first, int64_t past, float* carried,
                                   const Done& done) {
  const int64_t all = (w.depth + Format::kStep - 1) / Format::kStep;
  const int64_t part = rows > kRowsAtOnce ? kDepthPart / Format::kStep : all;
  int panels = 0;
  for (int64_t p = first; p < past; p += panels) {
    panels = panels_together(p, past, kGroup);
    for (int64_t k = 0; k < all; k += part) {
      const int64_t steps = all - k < part ? all - k : part;
      EnginePlace at = engine_panel(w, memory, p);
      at.at += k * at.stride;
      for (int64_t r = 0; r < rows; r += kRowsAtOnce) {
        const int count = static_cast<int>(rows - r < kRowsAtOnce ? rows - r : kRowsAtOnce);
        const float* a = x.rows + r * x.stride + k * Format::kStep;
        float* sums = carried + r * kSumsStride;
        const int64_t near = Format::kStep == 1 ? kAhead : kAheadNarrow;
        const int64_t ahead = r == kRowsAtOnce ? steps * at.stride : near;
        if (panels == kGroup) {
          product_rows<Format, kGroup>(count, at, steps, a, x.stride, sums, k > 0, ahead);
        } else if (panels == 2) {
          product_rows<Format, 2>(count, at, steps, a, x.stride, sums, k > 0, ahead);
        } else {
          product_rows<Format, 1>(count, at, steps, a, x.stride, sums, k > 0, ahead);
        }
        if (k + steps == all) done(r, count, p, panels, sums);
      }
    }
  }
}

template <class Format, class Done>
LMFAST_INLINE void multiply_floats(const EngineMatrix& w, const char* memory, const Operand& x,
                                   int64_t rows, int64_t first, int64_t past, float* carried,
                                   const Done& done) {
  if (rows == 1) {
    multiply_panels<Format, kPanelsOfOne>(w, memory, x, rows, first, past, carried, done);
  } else {
    multiply_panels<Format, kPanelsOfMany>(w, memory, x, rows, first, past, carried, done);
  }
}

}  // namespace
}  // namespace lmfast::LMFAST_ISA
