// The products of attention on tiles, and rows of bf16 as tiles can read them.
//
// On AMX products go by squares of 2 x 2 tiles: four products (4.6 ns each) for four loads. Loading
// and storing the sums costs as much as 5 products a square, so sums stay in tiles for as many
// steps as there are: 64 ns a square for 2 steps, 175 ns for 8. Without AMX (tiles_avx512.h) a tile
// of sums stays in registers for all steps.
#pragma once

#include "../amx.h"
#include "attention_stored.h"

#if defined(LMFAST_AMX)

namespace lmfast::LMFAST_ISA {
namespace {

constexpr int kLaneTiles = kLanes / kTileRows;

// Rows of bf16 as tiles A can read them: 32 at a time, zeros behind the last row and column.
struct TileRows {
  const bf16* data;  // row 0 would be here
  int64_t stride;
  int64_t tail;  // first row of `padded`
  const bf16* padded;
  LMFAST_INLINE const bf16* at(int64_t row) const {
    return row >= tail ? padded + (row - tail) * stride : data + row * stride;
  }
};

LMFAST_INLINE void copy_rows(const bf16* in, int64_t in_stride, int64_t rows, int64_t columns,
                             bf16* out, int64_t width, int64_t padded_rows) {
  memset(out, 0, sizeof(bf16) * static_cast<size_t>(padded_rows * width));
  for (int64_t r = 0; r < rows; ++r) {
    memcpy(out + r * width, in + r * in_stride, sizeof(bf16) * static_cast<size_t>(columns));
  }
}

// Rows [rows.lo, rows.hi) of one head; whole groups of 32 in place when they lie close together.
// `copy` holds the padded rows.
LMFAST_INLINE TileRows tile_rows(const AttentionTensor& x, int64_t b, int64_t head, Span rows,
                                 int64_t columns, int64_t width, bf16* copy) {
  const bf16* first = row_of<bf16>(x, b, head, 0);
  const int64_t n = rows.hi - rows.lo;
  // Rows far apart share few sets of the first-level cache.
  const bool in_place = columns == width && x.row == width;
  const int64_t whole = in_place ? n / 32 * 32 : 0;
  copy_rows(first + (rows.lo + whole) * x.row, x.row, n - whole, columns, copy, width,
            round_up(n - whole, 32));
  return {first, in_place ? x.row : width, rows.lo + whole, copy};
}

LMFAST_INLINE bool lies_as_bf16(const AttentionArgs& a) {
  return a.stored.type == Stored::kBF16 && a.stored.table == nullptr;
}

// The keys of a unit as tile rows.
LMFAST_INLINE TileRows stored_tile_rows(const AttentionArgs& a, const Unit& u, Span keys,
                                        int64_t width, bf16* copy) {
  if (lies_as_bf16(a)) return tile_rows(a.k, u.b, u.kv_head, keys, a.head_dim, width, copy);
  const int64_t padded = round_up(keys.hi - keys.lo, 32);
  memset(copy, 0, sizeof(bf16) * static_cast<size_t>(padded * width));
  copy_stored(a, stored_keys(a), u.b, u.kv_head, keys, copy, width);
  return {nullptr, width, keys.lo, copy};
}

// n <= 32 values as bf16, where they lie or copied.
struct Bf16Rows {
  const bf16* data;
  int64_t stride;
};
LMFAST_INLINE Bf16Rows stored_values_as_bf16(const AttentionArgs& a, const Unit& u, int64_t key,
                                             int n, int64_t width, bf16* copy) {
  if (lies_as_bf16(a)) return {row_of<bf16>(a.v, u.b, u.kv_head, key), a.v.row};
  copy_stored(a, stored_values(a), u.b, u.kv_head, {key, key + n}, copy, width);
  return {copy, width};
}

#if defined(__AMX_TILE__)

// 32 rows by 32 lanes of S: rows `a` (of K, say) times two columns of tiles B (Q^T), `depth` tiles
// deep. Up to a depth of 64 the tiles B stay loaded (12 % faster than loading them for every row).
LMFAST_INLINE void score_square(const bf16* a, int64_t stride, const char* b, int depth, float* s) {
  const int64_t row_bytes = stride * 2, s_bytes = kLanes * 4;
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
  for (int t = 0; t < depth; ++t) {
    tile_load<4>(a + 32 * t, row_bytes);
    tile_load<6>(b + t * kTileBytes, 64);
    tile_load<7>(b + (depth + t) * kTileBytes, 64);
    tile_dot<0, 4, 6>();
    tile_load<5>(a + 16 * stride + 32 * t, row_bytes);
    tile_dot<1, 4, 7>();
    tile_dot<2, 5, 6>();
    tile_dot<3, 5, 7>();
  }
  tile_store<0>(s, s_bytes);
  tile_store<1>(s + kTileRows, s_bytes);
  tile_store<2>(s + 16 * kLanes, s_bytes);
  tile_store<3>(s + 16 * kLanes + kTileRows, s_bytes);
}
template <int kDepth>
LMFAST_INLINE void score_strip(const TileRows& a, int64_t row, int groups, const char* b,
                               float* s) {
  static_assert(kDepth <= 2, "four tiles hold B");
  const int64_t row_bytes = a.stride * 2, s_bytes = kLanes * 4;
  tile_load<4>(b, 64);
  tile_load<5>(b + kDepth * kTileBytes, 64);
  if constexpr (kDepth == 2) {
    tile_load<6>(b + kTileBytes, 64);
    tile_load<7>(b + 3 * kTileBytes, 64);
  }
  for (int g = 0; g < groups; ++g) {
    const bf16* rows = a.at(row + 32 * g);
    for (int half = 0; half < 2; ++half, rows += 16 * a.stride, s += 16 * kLanes) {
      tile_zero<0>();
      tile_zero<1>();
      tile_load<2>(rows, row_bytes);
      if constexpr (kDepth == 2) tile_load<3>(rows + 32, row_bytes);
      tile_dot<0, 2, 4>();
      tile_dot<1, 2, 5>();
      if constexpr (kDepth == 2) {
        tile_dot<0, 3, 6>();
        tile_dot<1, 3, 7>();
      }
      tile_store<0>(s, s_bytes);
      tile_store<1>(s + kTileRows, s_bytes);
    }
  }
}
// Groups of 32 rows of `a` from `row` on by lanes 32 pair to 32 pair + 31; s at the first row.
LMFAST_INLINE void score_rows(const TileRows& a, int64_t row, int groups, const char* b, int depth,
                              int pair, float* s) {
  const char* tiles = b + 2 * pair * depth * kTileBytes;
  s += 32 * pair;
  if (depth == 1) return score_strip<1>(a, row, groups, tiles, s);
  if (depth == 2) return score_strip<2>(a, row, groups, tiles, s);
  for (int g = 0; g < groups; ++g) {
    score_square(a.at(row + 32 * g), a.stride, tiles, depth, s + g * 32 * kLanes);
  }
}

// C (32 rows by 32 columns, c_stride floats apart) += A B over `steps` tiles in depth.
LMFAST_INLINE void add_square(const char* a, int64_t a_row, int64_t a_step, const char* b,
                              int64_t b_column, int64_t b_step, int steps, float* c,
                              int64_t c_stride) {
  const int64_t bytes = c_stride * 4;
  tile_load<0>(c, bytes);
  tile_load<1>(c + 16, bytes);
  tile_load<2>(c + 16 * c_stride, bytes);
  tile_load<3>(c + 16 * c_stride + 16, bytes);
  for (int t = 0; t < steps; ++t) {
    tile_load<4>(a + t * a_step, 64);
    tile_load<6>(b + t * b_step, 64);
    tile_load<7>(b + t * b_step + b_column, 64);
    tile_dot<0, 4, 6>();
    tile_load<5>(a + t * a_step + a_row, 64);
    tile_dot<1, 4, 7>();
    tile_dot<2, 5, 6>();
    tile_dot<3, 5, 7>();
  }
  tile_store<0>(c, bytes);
  tile_store<1>(c + 16, bytes);
  tile_store<2>(c + 16 * c_stride, bytes);
  tile_store<3>(c + 16 * c_stride + 16, bytes);
}

#else

LMFAST_INLINE void score_rows(const TileRows& a, int64_t row, int groups, const char* b, int depth,
                              int pair, float* s) {
  for (int g = 0; g < groups; ++g) {
    const bf16* rows = a.at(row + 32 * g);
    for (int half = 0; half < 2; ++half, rows += 16 * a.stride, s += 16 * kLanes) {
      const SoftOperand left{reinterpret_cast<const char*>(rows), 2 * a.stride, 64};
      for (int v = 2 * pair; v < 2 * pair + 2; ++v) {
        soft_dots<false>(s + 16 * v, kLanes, left, {b + v * depth * kTileBytes, 64, kTileBytes},
                         depth);
      }
    }
  }
}

LMFAST_INLINE void add_square(const char* a, int64_t a_row, int64_t a_step, const char* b,
                              int64_t b_column, int64_t b_step, int steps, float* c,
                              int64_t c_stride) {
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j) {
      soft_dots<true>(c + 16 * (i * c_stride + j), c_stride, {a + i * a_row, 64, a_step},
                      {b + j * b_column, 64, b_step}, steps);
    }
  }
}

#endif

// Square (d, v) of C (D x lanes) += A (V^T, say) B (P^T): A in tiles (steps, D / 16), B in tiles
// (steps, 4).
LMFAST_INLINE void output_square(const char* a, int d_tiles, const char* b, int steps, int d, int v,
                                 float* out) {
  add_square(a + d * kTileBytes, kTileBytes, d_tiles * kTileBytes, b + v * kTileBytes, kTileBytes,
             kLaneTiles * kTileBytes, steps, out + d * 16 * kLanes + v * kTileRows, kLanes);
}

// exponent_unit times (score - m) for probabilities that are rounded to bf16, where one
// multiply-add is exact enough while m is not large; `shift` is what rough_shift makes of m.
template <bool kExact>
LMFAST_INLINE VecF rough_shift(VecF m, VecF unit) {
  const VecF minus_m = VecF::zero() - m;
  // Finite, or -inf, a hidden score, would not stay it.
  return kExact ? minus_m : min(minus_m * unit, VecF::set1(-kLowest));
}
template <bool kExact>
LMFAST_INLINE VecF rough_exponent(VecF score, VecF unit, VecF shift) {
  return kExact ? (score + shift) * unit : fmadd(score, unit, shift);
}
// Whether m * unit is too large for one multiply-add, as scores far from zero make it: up to 2^12
// it is rounded by 2^-13 at most, a sixteenth of what bf16 leaves; from 2^31 on exponentials
// overflow. Rows that see nothing do not count: their m is the lowest number, or infinite.
LMFAST_INLINE bool needs_exact(VecF m, VecF unit) {
  const VecF size = max(m, VecF::zero() - m), none = VecF::zero();
  const VecF seen = select_less(size, VecF::set1(-0.5f * kLowest), size, none);
  return any_less(VecF::set1(4096.0f), seen * unit);
}

}  // namespace
}  // namespace lmfast::LMFAST_ISA

#endif
