// The forward of attention.h for bf16 on AMX: both products on tiles, the softmax in fp32 between
// them. Included by attention_fwd.cpp at the amx level only.
//
// A pair of 32 keys by 32 lanes is four products per step of 32 in depth, for two tiles of K and two
// of Q^T. P^T is rounded to bf16 and interleaved in registers into the layout of tile B; V^T is
// packed once per unit (4 % of the time at T = 1024).
#pragma once

#include "../amx.h"
#include "attention_softmax.h"

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

// S^T (32 keys x lanes): tile rows of K times Q^T.
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

// O^T (D x lanes) += V^T P^T over `steps` groups of 32 keys.
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

// P^T of 32 * steps rows of S^T as tiles B, and its sums.
LMFAST_INLINE void exponential_tiles(QueryBlock& q, int steps, const float* s, VecF unit,
                                     float* out, int64_t width, char* p) {
  for (int v = 0; v < q.vecs; ++v) {
    const int i = v * VecF::kWidth;
    const VecF m = VecF::zero() - update_maximum(q, i, 32 * steps, s + i, unit, out, width);
    VecF l0 = VecF::load(q.l + i), l1 = VecF::zero();
    for (int t = 0; t < steps; ++t) {
      const float* row = s + t * 32 * kLanes + i;
      char* tile = p + (t * kLaneTiles + v) * kTileBytes;
#pragma GCC unroll 4
      for (int j = 0; j < 16; ++j) {
        const VecF p0 = exp2<3>(fmadd(VecF::load(row + 2 * j * kLanes), unit, m));
        const VecF p1 = exp2<3>(fmadd(VecF::load(row + (2 * j + 1) * kLanes), unit, m));
        l0 = l0 + p0;
        l1 = l1 + p1;
        _mm512_storeu_si512(tile + 64 * j, interleave_rounded(p0.v, p1.v));
      }
    }
    (l0 + l1).store(q.l + i);
  }
}

void fwd_unit_amx(const AttentionArgs& a, const Unit& u) {
  const int64_t width = round_up(a.head_dim, 32);
  const int columns = static_cast<int>(a.head_dim);
  const int depth = static_cast<int>(width / 32), d_tiles = 2 * depth;
  const Span rows = unit_rows(a, u);
  const Span keys = keys_of_rows(a, u, rows);
  const int64_t count = round_up(keys.hi - keys.lo, 32);
  Scratch scratch(a.scratch);
  bf16* k_copy = scratch.take<bf16>(count * width);
  char* v_tiles = scratch.take<char>(count * width * 2);
  bf16* q_rows = scratch.take<bf16>(kLanes * width);
  char* q_tiles = scratch.take<char>(kLanes * width * 2);
  float* out_rows = scratch.take<float>(kLanes * width);
  float* out = scratch.take<float>(kLanes * width);
  float* s = scratch.take<float>(kChunk * kLanes);
  float* bias = scratch.take<float>(kChunk * kLanes);
  char* p = scratch.take<char>(kChunk * kLanes * 2);
  const TileRows k = tile_rows(a.k, u.b, u.kv_head, keys, columns, width, k_copy);
  for (int64_t j = 0; j < count; j += 32) {
    const bf16* v = row_of<bf16>(a.v, u.b, u.kv_head, keys.lo + j);
    const int n = static_cast<int>(keys.hi - keys.lo - j < 32 ? keys.hi - keys.lo - j : 32);
    for (int t = 0; t < depth; ++t) {
      pack_columns(v + 32 * t, a.v.row, n, columns - 32 * t,
                   v_tiles + (j / 32 * d_tiles + 2 * t) * kTileBytes, kTileBytes);
    }
  }
  const bool options = has_score_options(a);
  const VecF unit = VecF::set1(options ? 1.0f : a.scale * kLog2e);
  memset(q_rows, 0, sizeof(bf16) * static_cast<size_t>(kLanes * width));
  memset(p, 0, kChunk * kLanes * 2);

  TileSession tiles;
  for (int64_t row = rows.lo; row < rows.hi; row += kLanes) {
    QueryBlock q;
    describe_block(a, u, row, static_cast<int>(rows.hi - row < kLanes ? rows.hi - row : kLanes), q);
    const int lane_tiles = (q.vecs + 1) / 2 * 2;
    for (int i = 0; i < q.rows; ++i) {
      memcpy(q_rows + i * width, row_of<bf16>(a.q, u.b, q.row[i].head, q.row[i].t),
             sizeof(bf16) * static_cast<size_t>(columns));
    }
    for (int v = 0; v < lane_tiles; ++v) {
      for (int t = 0; t < depth; ++t) {
        pack_transposed(q_rows + v * 16 * width + 32 * t, width, 16, 32,
                        q_tiles + (v * depth + t) * kTileBytes);
      }
    }
    memset(out, 0, sizeof(float) * static_cast<size_t>(kLanes * width));
    // Chunks start at whole groups of 32 keys from the unit's first, as V was packed.
    const int64_t first = keys.lo + (q.first - keys.lo) / 32 * 32;
    for (int64_t key = first; key < q.last; key += kChunk) {
      const int n = static_cast<int>(q.last - key < kChunk ? q.last - key : kChunk);
      const int steps = (n + 31) / 32;
      for (int t = 0; t < steps; ++t) {
        score_tiles(k.at(key + 32 * t), k.stride, q_tiles, depth, lane_tiles,
                    s + t * 32 * kLanes);
      }
      if (options) apply_options(a, q, key, n, s, bias);
      hide_invisible(q, key, 32 * steps, s);
      exponential_tiles(q, steps, s, unit, out, a.head_dim, p);
      output_tiles(v_tiles + (key - keys.lo) / 32 * d_tiles * kTileBytes, d_tiles, p, steps,
                   lane_tiles, out);
    }
    finish_block(a, q);
    store_block<bf16>(a, q, out, out_rows);
  }
}

}  // namespace
}  // namespace lmfast::LMFAST_ISA
