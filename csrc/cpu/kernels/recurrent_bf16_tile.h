// Products of up to 32 rows with a panel of packed weights, and gates in bf16's precision. On AMX
// by its tiles; by AVX512-BF16 in register tiles of six rows and up to four vectors, as in fp32: a
// product of 16 x 16 tiles reads one operand for each vdpbf16ps, this one for every two to three.
#pragma once

#include "../amx.h"
#include "recurrent_bf16.h"
#include "recurrent_math.h"
#include "recurrent_tile.h"

#if defined(LMFAST_AMX)

namespace lmfast::LMFAST_ISA {
namespace {

constexpr int kBlockRows = 2 * kTileRows;
constexpr int64_t kColumnFloats = kBlockRows * 16;  // of a column tile's sums

#if defined(__AMX_TILE__)

// Tiles for fewer rows than 16: sums 0, 1 and operand 4 have `first` rows, 2, 3 and 5 `second`.
// Nothing past the last row is read then. The usual tiles return at the end of the scope.
class RaggedTiles {
 public:
  RaggedTiles(int first, int second) : ragged_(first < kTileRows || second % kTileRows != 0) {
    if (!ragged_) return;
    const auto rows = static_cast<uint8_t>(first), more = static_cast<uint8_t>(second);
    configure(rows, more == 0 ? uint8_t{1} : more);
  }
  ~RaggedTiles() {
    if (ragged_) configure(kTileRows, kTileRows);
  }
  RaggedTiles(const RaggedTiles&) = delete;
  RaggedTiles& operator=(const RaggedTiles&) = delete;

 private:
  static void configure(uint8_t first, uint8_t second) {
    TileConfig config;
    const uint8_t rows[8] = {first, first, second, second, first, second, kTileRows, kTileRows};
    for (int i = 0; i < 8; ++i) config.rows[i] = rows[i];
    load_tile_config(&config);
  }
  bool ragged_;
};

// sum[column][row][lane] for kColumns column tiles: rows of `a`, `stride` bytes apart, times the
// column tiles at `b`, `tiles` of them along k. B comes from L2, A from L1, and each tile of B is
// used twice: with one row tile the loop waits for L2.
template <int kRowTiles, int kColumns>
LMFAST_INLINE void multiply_tiles(const char* a, int64_t stride, const char* b, int64_t tiles,
                                  float* sum) {
  const char* lower = a + kTileRows * stride;
  tile_zero<0>();
  if (kColumns > 1) tile_zero<1>();
  if (kRowTiles > 1) tile_zero<2>();
  if (kRowTiles > 1 && kColumns > 1) tile_zero<3>();
  for (int64_t k = 0; k < tiles; ++k) {
    tile_load<6>(b + k * kTileBytes, 64);
    tile_load<4>(a + k * 64, stride);
    tile_dot<0, 4, 6>();
    if (kColumns > 1) {
      tile_load<7>(b + (tiles + k) * kTileBytes, 64);
      tile_dot<1, 4, 7>();
    }
    if (kRowTiles > 1) {
      tile_load<5>(lower + k * 64, stride);
      tile_dot<2, 5, 6>();
      if (kColumns > 1) tile_dot<3, 5, 7>();
    }
  }
  tile_store<0>(sum, 64);
  if (kColumns > 1) tile_store<1>(sum + kColumnFloats, 64);
  if (kRowTiles > 1) tile_store<2>(sum + 256, 64);
  if (kRowTiles > 1 && kColumns > 1) tile_store<3>(sum + kColumnFloats + 256, 64);
}

// The same for kVecs column tiles and 1 to 32 rows.
template <int kVecs>
LMFAST_INLINE void multiply_panel(const bf16* a, int64_t stride, int rows, const char* panel,
                                  int64_t tiles, float* sum) {
  const int second = rows > kTileRows ? rows - kTileRows : 0;
  const RaggedTiles shape(rows - second, second);
  const char* from = reinterpret_cast<const char*>(a);
  int v = 0;
  for (; v + 2 <= kVecs; v += 2) {
    const char* b = panel + v * tiles * kTileBytes;
    second > 0 ? multiply_tiles<2, 2>(from, 2 * stride, b, tiles, sum + v * kColumnFloats)
               : multiply_tiles<1, 2>(from, 2 * stride, b, tiles, sum + v * kColumnFloats);
  }
  if (v < kVecs) {
    const char* b = panel + v * tiles * kTileBytes;
    second > 0 ? multiply_tiles<2, 1>(from, 2 * stride, b, tiles, sum + v * kColumnFloats)
               : multiply_tiles<1, 1>(from, 2 * stride, b, tiles, sum + v * kColumnFloats);
  }
}

#else

// sum[v][row][lane] for kVecs column tiles, `tiles` of them along k, and kRows rows of `a`.
template <int kRows, int kVecs>
__attribute__((noinline)) void multiply_pairs(const bf16* a, int64_t stride, const char* b,
                                              int64_t tiles, float* sum) {
  __m512 part[kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) part[r][v] = _mm512_setzero_ps();
  }
  const int64_t column = tiles * kTileBytes;
  for (int64_t k = 0; k < tiles * kTileRows; ++k) {
    __m512bh pairs[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      pairs[v] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + v * column));
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      int32_t pair;
      memcpy(&pair, a + r * stride, 4);
      const __m512bh x = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) part[r][v] = _mm512_dpbf16_ps(part[r][v], x, pairs[v]);
    }
    a += 2;
    b += 64;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) _mm512_store_ps(sum + v * kColumnFloats + r * 16, part[r][v]);
  }
}

template <int kVecs, int kRows>
LMFAST_INLINE void multiply_rows(int rows, const bf16* a, int64_t stride, const char* b,
                                 int64_t tiles, float* sum) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return multiply_rows<kVecs, kRows - 1>(rows, a, stride, b, tiles, sum);
  }
  multiply_pairs<kRows, kVecs>(a, stride, b, tiles, sum);
}

// The same for 1 to 32 rows.
template <int kVecs>
LMFAST_INLINE void multiply_panel(const bf16* a, int64_t stride, int rows, const char* panel,
                                  int64_t tiles, float* sum) {
  constexpr int kMost = TileRows<kVecs>::value;
  for_each_tile<kMost>(0, rows, [&](int64_t first, int take) {
    multiply_rows<kVecs, kMost>(take, a + first * stride, stride, panel, tiles, sum + first * 16);
  });
}

#endif

// Within 1e-5 relative, a hundredth of a bf16's rounding; NaN stays.
LMFAST_INLINE VecF rough_sigmoid(VecF x) {
  const VecF z = min(VecF::set1(126.0f), x * VecF::set1(-1.44269504f));
  return reciprocal(exp2<4>(z) + VecF::set1(1.0f));
}
// Within 2e-7 absolute; NaN stays.
LMFAST_INLINE VecF rough_tanh(VecF x) {
  const VecF z = min(VecF::set1(126.0f), x * VecF::set1(2.88539008f));
  const VecF one = VecF::set1(1.0f);
  return fmadd(VecF::set1(-2.0f), reciprocal(exp2<5>(z) + one), one);
}

LMFAST_INLINE VecF load_or_zero(const bf16* p, int64_t at) {
  return p == nullptr ? VecF::zero() : VecF::load(p + at);
}

}  // namespace
}  // namespace lmfast::LMFAST_ISA

#endif
