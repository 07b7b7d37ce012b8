// Products of rows with a packed matrix, whatever its type: as 16-bit integers with int8 and int4
// (engine_tile_int.h), as floats (engine_product.h) or rounded to bf16 (engine_product_bf16.h).
#pragma once

#include "engine_product_bf16.h"
#include "engine_tile_int.h"

namespace lmfast::LMFAST_ISA {
namespace {

// What rows from r on fetch while they pass `steps` steps of a block.
#if defined(__AVX512F__)
LMFAST_INLINE int64_t fetched_by_integers(int64_t r, int64_t, const EnginePlace& w, int64_t steps) {
  return r == kIntRowsAtOnce ? steps * w.stride : kAheadNarrow;
}
#else
LMFAST_INLINE Fetched fetched_by_integers(int64_t r, int64_t rows, const EnginePlace& w,
                                          int64_t steps) {
  const int64_t others = (rows - 1) / kIntRowsAtOnce, other = r / kIntRowsAtOnce - 1;
  if (others == 0) return {w.at + kAheadInteger, kIntSteps};
  if (other < 0) return {w.at, 0};
  const int64_t share = (kIntSteps + others - 1) / others;
  return {w.at + (steps + other * share * steps / kIntSteps) * w.stride, share};
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

// As multiply_floats.
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
      const IntegerTile t{
          at, w.depth, chunk, of_groups, &x, r, fetched_by_integers(r, rows, at, steps)};
      if (panels == kIntPanels) {
        integer_rows<kNibbles, kIntPanels>(count, vnni, t, sums);
      } else if (panels == 2) {
        integer_rows<kNibbles, 2>(count, vnni, t, sums);
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
