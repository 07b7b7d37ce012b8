// Products of many rows, as bf16, with a packed matrix: what a prompt needs.
//
// Floor: arithmetic, 2 rows depth columns. fp32 products run at 98 % of their peak (199 of 203 GF/s
// on two threads of a Zen 4), so only narrower ones are faster: vdpbf16ps twice as many numbers an
// instruction, AMX tiles 8 to 16 times. Rows are rounded to bf16, as the weights were; decoding,
// which memory bounds, keeps its rows in fp32. Which it is depends on the length of a prompt alone,
// not on what runs beside it (EngineRunner.step).
//
// Panels of bf16 lie as both instructions take them. Integers are widened, one block of the depth
// at a time, and then used for all rows: codes are exact in bf16, those with groups are multiplied
// by their scale and rounded, 1/100 of what rounding to 4 bits was. Integer products would need two
// bytes for a row's numbers (engine_operand.h), twice the instructions, so that they gain nothing
// over bf16 pairs: VNNI at 203 GF/s here, vdpbf16ps beyond 330.
//
// A block of panels stays in the first- or second-level cache while all rows pass.
#pragma once

#include "../amx.h"
#include "engine_product.h"

namespace lmfast::LMFAST_ISA {
namespace {

#if defined(__AVX512F__)

#if defined(LMFAST_AMX)
// 2 x 2 tiles of sums; two panels of 512 are 32 KB.
constexpr int kBF16Rows = 32, kBF16Panels = 2;
constexpr int64_t kBF16Depth = 512;
#else
// 24 registers of sums; four panels of 1024 are 128 KB.
constexpr int kBF16Rows = 6, kBF16Panels = 4;
constexpr int64_t kBF16Depth = 1024;
#endif
// Rows whose numbers stay in the second-level cache while panels pass: 1.5 MB at a depth of 3072.
constexpr int64_t kBF16RowBlock = 256;

// Four depths of a code's 16 columns, one to a byte, as floats.
template <int kByte>
LMFAST_INLINE VecF code_of(__m512i codes, __m512i offset) {
  const __m512i byte =
      _mm512_and_si512(_mm512_srli_epi32(codes, 8 * kByte), _mm512_set1_epi32(255));
  return {_mm512_cvtepi32_ps(_mm512_sub_epi32(byte, offset))};
}
LMFAST_INLINE __m512i rounded_pair(VecF even, VecF odd) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(even.v), half), 16);
  const __m512i high = _mm512_add_epi32(_mm512_castps_si512(odd.v), half);
  return _mm512_mask_blend_epi16(0xaaaaaaaau, low, high);
}
LMFAST_INLINE void widen_four(__m512i codes, __m512i offset, VecF scale, char* out) {
  _mm512_storeu_si512(
      out, rounded_pair(code_of<0>(codes, offset) * scale, code_of<1>(codes, offset) * scale));
  _mm512_storeu_si512(
      out + 64, rounded_pair(code_of<2>(codes, offset) * scale, code_of<3>(codes, offset) * scale));
}

// Depths [first, first + count) of one panel as bf16 pairs, up to `whole` with zeros.
inline void widen(const EngineMatrix& w, const char* memory, int64_t panel, int64_t first,
                  int64_t count, int64_t whole, char* out) {
  const auto type = static_cast<EngineWeights>(w.type);
  const int64_t step = kEngineDepthStep[w.type];
  const EnginePlace place = engine_panel(w, memory, panel);
  const char* from = place.at + first / step * place.stride;
  memset(out + count * 32, 0, static_cast<size_t>((whole - count) * 32));
  if (type == EngineWeights::kBF16) {
    for (int64_t k = 0; k < count; k += step) {
      memcpy(out + k * 32, from + k / step * place.stride, 64);
    }
    return;
  }
  const EnginePlace scales = w.group == 0 ? EnginePlace{} : engine_scales(w, memory, panel);
  const bool nibbles = type == EngineWeights::kI4;
  const __m512i offset = _mm512_set1_epi32(nibbles ? 8 : 128), mask = _mm512_set1_epi8(15);
  for (int64_t k = 0; k < count; k += step, from += place.stride) {
    const VecF scale = scales.at == nullptr
                           ? VecF::set1(1.0f)
                           : VecF::load(reinterpret_cast<const f16*>(
                                 scales.at + (first + k) / w.group * scales.stride));
    const __m512i codes = _mm512_loadu_si512(from);
    char* to = out + k * 32;
    if (!nibbles) {
      widen_four(codes, offset, scale, to);
    } else {
      widen_four(_mm512_and_si512(codes, mask), offset, scale, to);
      widen_four(_mm512_and_si512(_mm512_srli_epi16(codes, 4), mask), offset, scale, to + 128);
    }
  }
}

// Panels of bf16: bytes from one to the next, and from a pair of the depth to the next.
struct Bf16Panels {
  const char* at;
  int64_t panel, step;
};

// sums (+)= rows of x times panels, `depth` of it; a multiple of 32 for tiles, else of 2.
#if defined(LMFAST_AMX)

template <int kTall, int kWide>
LMFAST_INLINE void bf16_tiles(const Bf16Panels& w, int64_t depth, const uint16_t* x, int64_t stride,
                              float* sums, bool add) {
  constexpr int64_t kRow = kSumsStride * 4;
  float* below = sums + kTileRows * kSumsStride;
  const uint16_t* next = x + kTileRows * stride;
  if (add) {
    tile_load<0>(sums, kRow);
    if constexpr (kWide == 2) tile_load<1>(sums + kEnginePanel, kRow);
    if constexpr (kTall == 2) tile_load<2>(below, kRow);
    if constexpr (kTall == 2 && kWide == 2) tile_load<3>(below + kEnginePanel, kRow);
  } else {
    tile_zero<0>();
    if constexpr (kWide == 2) tile_zero<1>();
    if constexpr (kTall == 2) tile_zero<2>();
    if constexpr (kTall == 2 && kWide == 2) tile_zero<3>();
  }
  for (int64_t k = 0; k < depth; k += kTileDepth) {
    tile_load<4>(x + k, stride * 2);
    tile_load<6>(w.at + k / 2 * w.step, w.step);
    tile_dot<0, 4, 6>();
    if constexpr (kWide == 2) {
      tile_load<7>(w.at + w.panel + k / 2 * w.step, w.step);
      tile_dot<1, 4, 7>();
    }
    if constexpr (kTall == 2) {
      tile_load<5>(next + k, stride * 2);
      tile_dot<2, 5, 6>();
      if constexpr (kWide == 2) tile_dot<3, 5, 7>();
    }
  }
  tile_store<0>(sums, kRow);
  if constexpr (kWide == 2) tile_store<1>(sums + kEnginePanel, kRow);
  if constexpr (kTall == 2) tile_store<2>(below, kRow);
  if constexpr (kTall == 2 && kWide == 2) tile_store<3>(below + kEnginePanel, kRow);
}

template <int kPanels>
inline __attribute__((noinline)) void bf16_rows(int rows, const Bf16Panels& w, int64_t depth,
                                                const uint16_t* x, int64_t stride, float* sums,
                                                bool add) {
  if (rows > kTileRows) {
    bf16_tiles<2, kPanels>(w, depth, x, stride, sums, add);
  } else {
    bf16_tiles<1, kPanels>(w, depth, x, stride, sums, add);
  }
}

#else

template <int kRows, int kPanels>
__attribute__((target("avx512bf16"), noinline)) void bf16_dots(const Bf16Panels& w, int64_t depth,
                                                               const uint16_t* x, int64_t stride,
                                                               float* sums, bool add) {
  __m512 sum[kRows][kPanels];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) {
      const float* at = sums + r * kSumsStride + p * kEnginePanel;
      sum[r][p] = add ? _mm512_loadu_ps(at) : _mm512_setzero_ps();
    }
  }
  for (int64_t k = 0; k < depth; k += 2) {
    __m512bh b[kPanels];
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) {
      b[p] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(w.at + p * w.panel + k / 2 * w.step));
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      int32_t pair;
      memcpy(&pair, x + r * stride + k, 4);
      const __m512bh a = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) sum[r][p] = _mm512_dpbf16_ps(sum[r][p], a, b[p]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) {
      _mm512_storeu_ps(sums + r * kSumsStride + p * kEnginePanel, sum[r][p]);
    }
  }
}

template <int kPanels, int kRows = kBF16Rows>
LMFAST_INLINE void bf16_rows(int rows, const Bf16Panels& w, int64_t depth, const uint16_t* x,
                             int64_t stride, float* sums, bool add) {
  if (rows == kRows) {
    bf16_dots<kRows, kPanels>(w, depth, x, stride, sums, add);
  } else if constexpr (kRows > 1) {
    bf16_rows<kPanels, kRows - 1>(rows, w, depth, x, stride, sums, add);
  }
}

#endif

// As multiply_panels, with rows in x.pairs; `staging` holds widened panels.
template <class Done>
LMFAST_INLINE void multiply_rounded(const EngineMatrix& w, const char* memory, const Operand& x,
                                    int64_t rows, int64_t first, int64_t past, char* staging,
                                    float* carried, const Done& done) {
#if defined(LMFAST_AMX)
  const TileSession session;
  constexpr int64_t kUnit = kTileDepth;
#else
  constexpr int64_t kUnit = 2;
#endif
  const bool integers = is_integer(w);
  const float* columns =
      integers && w.group == 0 ? reinterpret_cast<const float*>(memory + w.scales) : nullptr;
  for (int64_t above = 0; above < rows; above += kBF16RowBlock) {
    const int64_t below = above + kBF16RowBlock < rows ? above + kBF16RowBlock : rows;
    int panels = 0;
    for (int64_t p = first; p < past; p += panels) {
      panels = panels_together(p, past, kBF16Panels);
      if (panels != kBF16Panels) panels = 1;
      for (int64_t k = 0; k < w.depth; k += kBF16Depth) {
        const int64_t count = w.depth - k < kBF16Depth ? w.depth - k : kBF16Depth;
        const int64_t whole = round_up(count, kUnit);
        const EnginePlace place = engine_panel(w, memory, p);
        Bf16Panels b{place.at + k / 2 * place.stride, 64, place.stride};
        if (integers || whole != count) {
          b = {staging, whole * 32, 64};
          for (int i = 0; i < panels; ++i) {
            widen(w, memory, p + i, k, count, whole, staging + i * b.panel);
          }
        }
        for (int64_t r = above; r < below; r += kBF16Rows) {
          const int n = static_cast<int>(below - r < kBF16Rows ? below - r : kBF16Rows);
          const uint16_t* a = x.pairs + r * x.pairs_stride + k;
          float* sums = carried + r * kSumsStride;
          if (panels == kBF16Panels) {
            bf16_rows<kBF16Panels>(n, b, whole, a, x.pairs_stride, sums, k > 0);
          } else {
            bf16_rows<1>(n, b, whole, a, x.pairs_stride, sums, k > 0);
          }
          if (k + count < w.depth) continue;
          for (int i = 0; columns != nullptr && i < n; ++i) {
            for (int64_t c = 0; c < panels * kEnginePanel; c += VecF::kWidth) {
              float* at = sums + i * kSumsStride + c;
              (VecF::load(at) * VecF::load(columns + p * kEnginePanel + c)).store(at);
            }
          }
          done(r, n, p, panels, sums);
        }
      }
    }
  }
}

#endif

}  // namespace
}  // namespace lmfast::LMFAST_ISA
