// The forward of attention.h for bf16 on AMX: both products on tiles, the softmax in fp32 between
// them. Included by attention_fwd.cpp at the amx level only.
//
// A pair of 32 keys by 32 lanes is four products per step of 32 in depth, for two tiles of K and
// two of Q^T. P^T is rounded to bf16 and interleaved in registers into the layout of tile B; V^T is
// packed once per unit (4 % of the time at T = 1024).
#pragma once

#include "attention_softmax.h"
#include "attention_tiles.h"

namespace lmfast::LMFAST_ISA {
namespace {

// P^T of 32 * steps rows of S^T as tiles B, and its sums.
LMFAST_INLINE void exponential_tiles(QueryBlock& q, int steps, const float* s, VecF unit,
                                     float* out, int64_t width, char* p) {
  for (int v = 0; v < q.vecs; ++v) {
    const int i = v * VecF::kWidth;
    const VecF m = VecF::zero() - update_maximum(q, i, 32 * steps, s + i, unit, out, width);
    VecF l0 = VecF::zero(), l1 = l0;
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
    (VecF::load(q.l + i) + (l0 + l1)).store(q.l + i);
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
        score_tiles(k.at(key + 32 * t), k.stride, q_tiles, depth, lane_tiles, s + t * 32 * kLanes);
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
