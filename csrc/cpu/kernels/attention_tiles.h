// The products of attention on AMX tiles, and rows of bf16 as tiles can read them. At the amx level
// only.
//
// Every product goes by squares of 2 x 2 tiles: four products for four loads. Stacking 1 x 4 or
// keeping the tiles B of 32 lanes loaded through all keys were no faster: loads from L1 and L2 hide
// behind the products, and what remains is storing and loading the sums.
#pragma once

#include "../amx.h"
#include "attention_block.h"

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

// 32 rows of S: tile rows `a` (K, say) times 64 lanes of tiles B (Q^T).
LMFAST_INLINE void score_tiles(const bf16* k, int64_t k_stride, const char* q, int depth,
                               int lane_tiles, float* s) {
  const int64_t row_bytes = k_stride * 2, s_bytes = kLanes * 4;
  for (int v = 0; v < lane_tiles; v += 2) {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
    for (int t = 0; t < depth; ++t) {
      tile_load<4>(k + 32 * t, row_bytes);
      tile_load<6>(q + (v * depth + t) * kTileBytes, 64);
      tile_load<7>(q + ((v + 1) * depth + t) * kTileBytes, 64);
      tile_dot<0, 4, 6>();
      tile_load<5>(k + 16 * k_stride + 32 * t, row_bytes);
      tile_dot<1, 4, 7>();
      tile_dot<2, 5, 6>();
      tile_dot<3, 5, 7>();
    }
    float* out = s + v * kTileRows;
    tile_store<0>(out, s_bytes);
    tile_store<1>(out + kTileRows, s_bytes);
    tile_store<2>(out + 16 * kLanes, s_bytes);
    tile_store<3>(out + 16 * kLanes + kTileRows, s_bytes);
  }
}

// C (D x lanes) += A (V^T, say) B (P^T) over `steps` groups of 32 in depth.
LMFAST_INLINE void output_tiles(const char* v_tiles, int d_tiles, const char* p, int steps,
                                int lane_tiles, float* out) {
  const int64_t o_bytes = kLanes * 4;
  for (int d = 0; d < d_tiles; d += 2) {
    for (int v = 0; v < lane_tiles; v += 2) {
      float* o = out + d * 16 * kLanes + v * kTileRows;
      tile_load<0>(o, o_bytes);
      tile_load<1>(o + kTileRows, o_bytes);
      tile_load<2>(o + 16 * kLanes, o_bytes);
      tile_load<3>(o + 16 * kLanes + kTileRows, o_bytes);
      for (int t = 0; t < steps; ++t) {
        tile_load<4>(v_tiles + (t * d_tiles + d) * kTileBytes, 64);
        tile_load<6>(p + (t * kLaneTiles + v) * kTileBytes, 64);
        tile_load<7>(p + (t * kLaneTiles + v + 1) * kTileBytes, 64);
        tile_dot<0, 4, 6>();
        tile_load<5>(v_tiles + (t * d_tiles + d + 1) * kTileBytes, 64);
        tile_dot<1, 4, 7>();
        tile_dot<2, 5, 6>();
        tile_dot<3, 5, 7>();
      }
      tile_store<0>(o, o_bytes);
      tile_store<1>(o + kTileRows, o_bytes);
      tile_store<2>(o + 16 * kLanes, o_bytes);
      tile_store<3>(o + 16 * kLanes + kTileRows, o_bytes);
    }
  }
}

}  // namespace
}  // namespace lmfast::LMFAST_ISA
