// Attention, forward: out = softmax(scale q k^T + ...) v, and the log-sum-exp per query row.
//
// Floor: arithmetic, 4 T S D operations per head (half of it when causal), of which no (T, S)
// matrix is ever stored. Blocks of 64 query rows, as vector lanes, walk through the keys in chunks
// of 128:
//   S^T (keys x lanes) = K Q^T;  P^T = 2^(S^T - m);  O^T (D x lanes) += V^T P^T.
// With query rows as lanes no sum or maximum crosses lanes, and K and V are read where they lie, as
// the side of the product that is broadcast (fp32) or the tile A (AMX). Only the 64 query rows are
// transposed on the way in and the output on the way out.
//
// Two versions: this one in fp32 on gemm_f32.h, for every type and level (bf16 and fp16 are
// converted per unit of work), and attention_fwd_amx.cpp for bf16 on tiles.
//
// Formulas: Dao et al. 2022, https://arxiv.org/abs/2205.14135 (tiling, online softmax).
#include "../simd_transpose.h"
#include "attention_rows.h"
#include "attention_softmax.h"

namespace lmfast::LMFAST_ISA {
namespace {

// P^T in place of S^T, and its sums, from lane `first` on.
LMFAST_INLINE void exponentials(const AttentionArgs& a, QueryBlock& q, int first, int n, float* s,
                                float* out) {
  const VecF unit = VecF::set1(exponent_unit(a));
  for (int i = first; i < q.vecs * VecF::kWidth; i += VecF::kWidth) {
    const VecF top = largest(s + i, n);
    if (exceeds(q, i, top, unit)) raise_maximum(a, q, i, top, out);
    const VecF m = VecF::zero() - VecF::load(q.m + i);
    VecF l0 = VecF::zero(), l1 = l0;
    int j = 0;
    for (; j + 2 <= n; j += 2) {
      float* p = s + j * kLanes + i;
      const VecF p0 = exp2<6>((VecF::load(p) + m) * unit);
      const VecF p1 = exp2<6>((VecF::load(p + kLanes) + m) * unit);
      p0.store(p);
      p1.store(p + kLanes);
      l0 = l0 + p0;
      l1 = l1 + p1;
    }
    if (j < n) {
      float* p = s + j * kLanes + i;
      const VecF p0 = exp2<6>((VecF::load(p) + m) * unit);
      p0.store(p);
      l0 = l0 + p0;
    }
    (VecF::load(q.l + i) + (l0 + l1)).store(q.l + i);
  }
}

template <class T>
void fwd_unit(const AttentionArgs& a, const Unit& u) {
  const int64_t width = a.head_dim;
  const Span rows = unit_rows(a, u);
  const Span keys = keys_of_rows(a, u, rows);
  Scratch scratch(a.scratch);
  float* k_copy = scratch.take<float>((keys.hi - keys.lo) * width);
  float* v_copy = scratch.take<float>((keys.hi - keys.lo) * width);
  float* q_rows = scratch.take<float>(kLanes * width);
  float* q_lanes = scratch.take<float>(kLanes * width);
  float* out = scratch.take<float>(kLanes * width);
  float* s = scratch.take<float>(kChunk * kLanes);
  float* bias = scratch.take<float>(kChunk * kLanes);
  const FloatRows k = stored_rows(a, stored_keys(a), u.b, u.kv_head, keys, k_copy);
  const FloatRows v = stored_rows(a, stored_values(a), u.b, u.kv_head, keys, v_copy);
  const bool options = has_score_options(a);
  const int64_t chain = chain_of(a);

  for (int64_t row = rows.lo; row < rows.hi; row += kLanes) {
    QueryBlock q;
    describe_block(a, u, row, static_cast<int>(rows.hi - row < kLanes ? rows.hi - row : kLanes), q);
    const int lanes = q.vecs * VecF::kWidth;
    for (int i = 0; i < q.rows; ++i) {
      to_float_row(row_of<T>(a.q, u.b, q.row[i].head, q.row[i].t), width, q_rows + i * width);
    }
    rows_to_lanes(q_rows, width, q.rows, static_cast<int>(width), q_lanes, kLanes, lanes);
    memset(out, 0, sizeof(float) * static_cast<size_t>(kLanes * width));
    // Where the leading lanes see no more keys (the diagonal of a causal block) only the others go
    // on, 16 lanes less every 16 keys: 4 % of the time at T = 1024.
    int64_t past[kLanes / 16] = {};
    for (int i = 0; i < q.rows; ++i) {
      const int64_t hi = static_cast<int64_t>(q.hi[i]);
      past[i / 16] = hi > past[i / 16] ? hi : past[i / 16];
    }
    int n = 0;
    for (int64_t key = q.first, first = 0; key < q.last; key += n) {
      while (past[first / 16] <= key) first += 16;
      const int64_t end = past[first / 16] < key + kFloatStep ? past[first / 16] : key + kFloatStep;
      n = static_cast<int>(end - key);
      float* scores = s + first;
      const int64_t lanes_left = lanes - first;
      const float* k_rows = k.data + key * k.stride;
      multiply_heads(n, lanes_left, width, k_rows, k.stride, q_lanes + first, scores, chain);
      if (options) apply_options(a, q, key, n, s, bias);
      hide_invisible(q, key, n, s);
      exponentials(a, q, static_cast<int>(first), n, s, out);
      gemm_f32<true, true>(width, lanes - first, n, v.data + key * v.stride, v.stride, scores,
                           kLanes, out + first, kLanes);
    }
    if (a.splits > 1) {
      store_partial(a, u, q, row, out);
      continue;
    }
    finish_block(a, q);
    store_block<T>(a, q, out, q_rows);
  }
}

}  // namespace

void attention_fwd(const AttentionArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const Unit u = unit_at(a, i);
    switch (a.dtype) {
      case DType::kF32:
        fwd_unit<float>(a, u);
        break;
      case DType::kF16:
        fwd_unit<f16>(a, u);
        break;
      case DType::kBF16:
        fwd_unit<bf16>(a, u);
        break;
      case DType::kF64:  // the reference's
        break;
    }
  }
}

}  // namespace lmfast::LMFAST_ISA
