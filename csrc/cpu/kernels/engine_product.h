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
// Up to kRowsAtOnce rows share one reading of the weights from registers; more rows find them in a
// cache, a part of the depth at a time. What passes over a part after the first rows fetches the
// next one: otherwise memory would rest while those rows are multiplied.
//
// AVX2 has 16 registers. Tiles of 3 rows and 2 panels, each reading its half of all lines from
// memory, left 20 sums and weights to them: 19 GMAC/s of bf16 in the second-level cache (Zen 3), 6
// rows and one panel 41 (fp32 37 and 41). Eight rows of a Llama's layers on one core: bf16 17.3 ->
// 10.2 ms, fp32 25.7 -> 21.0; four rows 12.9 -> 5.7 and 19.9 -> 16.6; a prompt of 512 tokens in
// bf16 560 -> 370, in fp32 as before.
#pragma once

#include "../prefetch.h"
#include "engine_operand.h"

namespace lmfast::LMFAST_ISA {
namespace {

constexpr int kPanelVecs = kEnginePanel / VecF::kWidth;
constexpr int kMostPanels = kEngineBlock;
constexpr int kSumsStride = kMostPanels * kEnginePanel;

// Rows that are multiplied together, and the panels whose sums fit the registers beside them.
// Where that is less than a block, tiles would skip lines that the next ones need: they take a
// block in parts that stay in the nearest cache, of part_steps() steps or, as long as one reading
// serves all rows and memory is what they wait for, of kStreamSteps.
#if defined(__AVX512F__)
constexpr int kRowsAtOnce = 6;
constexpr int panels_of(int) { return 4; }
constexpr int64_t part_steps(int step) { return 1024 / step; }  // 256 KB of floats
constexpr int64_t kStreamSteps = 1024;
#elif defined(__AVX2__)
constexpr int kRowsAtOnce = 6;
constexpr int panels_of(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
constexpr int64_t part_steps(int) { return 64; }  // 16 KB
constexpr int64_t kStreamSteps = 32;
#else
constexpr int kRowsAtOnce = 3;
constexpr int panels_of(int rows) { return rows == 1 ? 2 : 1; }
constexpr int64_t part_steps(int) { return 64; }
constexpr int64_t kStreamSteps = 32;
#endif

// kStep rows of the depth, 16 columns each: 64 bytes, of which `load` gives row i of a vector.
struct PanelF32 {
  static constexpr int kStep = 1;
  template <int i>
  static LMFAST_INLINE VecF load(const char* p, int v) {
    return VecF::load(reinterpret_cast<const float*>(p) + v * VecF::kWidth);
  }
};
struct PanelBF16 {
  static constexpr int kStep = 2;
  template <int i>
  static LMFAST_INLINE VecF load(const char* p, int v) {
    p += v * VecF::kWidth * 4;
#if defined(__AVX512F__)
    const __m512i x = _mm512_loadu_si512(p);
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    return {_mm512_castsi512_ps(i == 0 ? _mm512_slli_epi32(x, 16) : _mm512_and_si512(x, high))};
#elif defined(__AVX2__)
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    return {_mm256_castsi256_ps(i == 0 ? _mm256_slli_epi32(x, 16) : _mm256_and_si256(x, high))};
#else
    uint32_t pairs[4];
    memcpy(pairs, p, 16);
    for (uint32_t& x : pairs) x = i == 0 ? x << 16 : x & 0xffff0000u;
    VecF out;
    memcpy(&out.v, pairs, 16);
    return out;
#endif
  }
};

// How many bytes ahead of a product its weights are fetched. What cannot be told from the latency:
// two cores of a Zen 4, a token of a 160 M Llama in ms, 1024 | 2048 | 3072 | 4096 bytes: fp32 7.13
// | 7.08 | 7.03 | -, bf16 3.43 | 3.65 | 3.76 | 5.2 (8192), int8 2.45 | 2.74 | 2.64 | 3.0, int4 1.63
// | 1.96 | 1.81 | 1.9.
//
// On AVX2 (a Zen 3) floats of one row are read 5 to 10 % faster when nothing but the processor
// fetches them, bf16 15 % slower.
#if defined(__AVX512F__)
constexpr bool kAlwaysFetches = true;
#if defined(__AMX_TILE__)
constexpr int64_t kAhead = 2048, kAheadNarrow = 2048;  // other processors; not measured there
#else
constexpr int64_t kAhead = 2048, kAheadNarrow = 1024;  // of floats, and of all others
#endif
#else
constexpr bool kAlwaysFetches = false;
constexpr int64_t kAhead = 0, kAheadNarrow = 1024;
#endif

// What a tile fetches: kPanels lines a step from `next` on, in its first `steps` steps.
struct Fetched {
  const char* next;
  int64_t steps;
};

// Adds row i of a step, and of those behind it, to the sums.
template <class Format, int kRows, int kVecs, int i = 0>
LMFAST_INLINE void add_rows(const char* at, const float* x, int64_t stride,
                            VecF (&sum)[kRows][kVecs]) {
  VecF b[kVecs];
#pragma GCC unroll 16
  for (int v = 0; v < kVecs; ++v) {
    b[v] = Format::template load<i>(at + v / kPanelVecs * 64, v % kPanelVecs);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const VecF a = VecF::set1(x[r * stride + i]);
#pragma GCC unroll 16
    for (int v = 0; v < kVecs; ++v) sum[r][v] = fmadd(a, b[v], sum[r][v]);
  }
  if constexpr (i + 1 < Format::kStep) add_rows<Format, kRows, kVecs, i + 1>(at, x, stride, sum);
}

// sums[r][p] (+)= x[r] times kPanels panels, `steps` steps of the depth.
template <class Format, int kRows, int kPanels>
inline __attribute__((noinline)) void product_tile(const EnginePlace& w, int64_t steps,
                                                   const float* x, int64_t stride, float* sums,
                                                   bool add, Fetched fetched) {
  constexpr int kVecs = kPanels * kPanelVecs, W = VecF::kWidth;
  VecF sum[kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kVecs; ++v) {
      sum[r][v] = add ? VecF::load(sums + r * kSumsStride + v * W) : VecF::zero();
    }
  }
  const char* at = w.at;
  for (int64_t k = 0; k < steps; ++k, at += w.stride) {
    if (kAlwaysFetches || k < fetched.steps) {
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) prefetch(fetched.next + p * 64);
      fetched.next += kPanels * 64;
    }
    add_rows<Format, kRows, kVecs>(at, x + k * Format::kStep, stride, sum);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kVecs; ++v) sum[r][v].store(sums + r * kSumsStride + v * W);
  }
}

// The same for any number of panels of a block, kPanels at a time.
template <class Format, int kRows, int kPanels>
LMFAST_INLINE void product_panels(int panels, EnginePlace w, int64_t steps, const float* x,
                                  int64_t stride, float* sums, bool add, Fetched fetched) {
  for (; panels >= kPanels; panels -= kPanels) {
    product_tile<Format, kRows, kPanels>(w, steps, x, stride, sums, add, fetched);
    w.at += kPanels * 64;
    sums += kPanels * kEnginePanel;
    fetched.next += fetched.steps * kPanels * 64;
  }
  if constexpr (kPanels > 1) {
    if (panels > 0) {
      product_panels<Format, kRows, kPanels / 2>(panels, w, steps, x, stride, sums, add, fetched);
    }
  }
}

template <class Format, int kRows = kRowsAtOnce>
LMFAST_INLINE void product_rows(int rows, int panels, const EnginePlace& w, int64_t steps,
                                const float* x, int64_t stride, float* sums, bool add,
                                Fetched fetched) {
  if (rows == kRows) {
    product_panels<Format, kRows, panels_of(kRows)>(panels, w, steps, x, stride, sums, add,
                                                    fetched);
  } else if constexpr (kRows > 1) {
    product_rows<Format, kRows - 1>(rows, panels, w, steps, x, stride, sums, add, fetched);
  }
}

// How many panels from `panel` on, before `past`, are multiplied together: `most`, a pair or one,
// of one block.
LMFAST_INLINE int panels_together(int64_t panel, int64_t past, int most) {
  const int64_t end = panel / kEngineBlock * kEngineBlock + kEngineBlock;
  const int64_t left = (end < past ? end : past) - panel;
  return left >= most ? most : (left >= 2 && most > 2 ? 2 : 1);
}

// What group `group` of `groups` of rows fetches while it multiplies `steps` steps of a block.
template <class Format>
LMFAST_INLINE Fetched fetched_by(int64_t group, int64_t groups, bool whole, const EnginePlace& w,
                                 int64_t steps) {
  const char* next_part = w.at + steps * w.stride;
  if (whole) {  // the first rows read a stream of their own
    constexpr int64_t near = Format::kStep == 1 ? kAhead : kAheadNarrow;
    return {group == 1 ? next_part : w.at + near, group == 1 || near > 0 ? steps : 0};
  }
  if (groups == 1) return {next_part, steps};
  if (group == 0) return {next_part, 0};
  const int64_t share = (steps + groups - 2) / (groups - 1);
  return {next_part + (group - 1) * share * w.stride, share};
}

// done(row, rows, panel, panels, sums) for all rows and the panels [first, past); `carried` holds
// kSumsStride floats per row.
template <class Format, class Done>
LMFAST_INLINE void multiply_floats(const EngineMatrix& w, const char* memory, const Operand& x,
                                   int64_t rows, int64_t first, int64_t past, float* carried,
                                   const Done& done) {
  const int64_t groups = (rows + kRowsAtOnce - 1) / kRowsAtOnce;
  const bool whole = panels_of(rows == 1 ? 1 : kRowsAtOnce) == kEngineBlock;
  const int64_t all = (w.depth + Format::kStep - 1) / Format::kStep;
  const int64_t part = groups > 1 ? part_steps(Format::kStep) : whole ? all : kStreamSteps;
  int panels = 0;
  for (int64_t p = first; p < past; p += panels) {
    panels = panels_together(p, past, kEngineBlock);
    for (int64_t k = 0; k < all; k += part) {
      const int64_t steps = all - k < part ? all - k : part;
      EnginePlace at = engine_panel(w, memory, p);
      at.at += k * at.stride;
      int64_t r = 0;
      for (int64_t g = 0; g < groups; ++g) {
        const int count = static_cast<int>((rows - r + groups - g - 1) / (groups - g));
        float* sums = carried + r * kSumsStride;
        product_rows<Format>(count, panels, at, steps, x.rows + r * x.stride + k * Format::kStep,
                             x.stride, sums, k > 0,
                             fetched_by<Format>(g, groups, whole, at, steps));
        if (k + steps == all) done(r, count, p, panels, sums);
        r += count;
      }
    }
  }
}

}  // namespace
}  // namespace lmfast::LMFAST_ISA
