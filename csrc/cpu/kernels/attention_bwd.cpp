// Attention, backward: dq, dk and dv from q, k, v, out, dout and two numbers per row of the
// softmax.
//
// Floor: arithmetic, five products where the forward has two. Blocks of 64 keys, as vector lanes,
// walk through the query rows that see them, so that reference value, sum and delta = dout . out of
// a row are single numbers, and P and dS come out in the order that the next products read:
//   S = Q K^T;  dP = dO V^T;  P = 2^(S - m) / l;  dS = P (dP - delta);
//   dV^T += dO^T P;  dK^T += Q^T dS;  dQ += dS K.
// Recomputing P costs one product and the exponentials again; keeping it would cost T S numbers.
//
// A unit owns all of dK and dV of its keys, and its dQ: there are no atomic additions, and the
// result does not depend on the threads. When there are few heads the keys are cut into ranges,
// each with a part of dQ; their number depends on the shape only. A part is added as soon as all
// earlier ones are (attention_backward.cpp), so there are about as many in memory as threads:
// 16,384 tokens of one head, forward and backward, 32 MB with two threads, where sixteen parts
// took 84.
//
// Two versions, as in attention_fwd.cpp: fp32 here, bf16 on tiles in attention_bwd_amx.cpp.
#include "../simd_transpose.h"
#include "attention_grad.h"
#include "attention_rows.h"

namespace lmfast::LMFAST_ISA {
namespace {

// P in place of s and dS in place of dp, for n rows.
template <bool kSlope>
LMFAST_INLINE void score_gradients(const HeadRows& h, int64_t t, int n, VecF unit, float* s,
                                   float* dp, const float* slope) {
  constexpr int W = VecF::kWidth;
  for (int j = 0; j < n; ++j) {
    const VecF minus_m = VecF::set1(h.minus_m[t + j]), inverse = VecF::set1(h.inverse[t + j]);
    const VecF delta = VecF::set1(h.delta[t + j]);
    for (int i = j * kLanes; i < (j + 1) * kLanes; i += W) {
      const VecF p = exp2<6>((VecF::load(s + i) + minus_m) * unit) * inverse;
      VecF ds = p * (VecF::load(dp + i) - delta);
      if constexpr (kSlope) ds = ds * VecF::load(slope + i);
      p.store(s + i);
      ds.store(dp + i);
    }
  }
}

// delta = dout . out of all rows of a head, added in multiply_heads's order: where a row has one
// key, or one that outweighs all others, dP - delta is then 0 as it should be, not a rounding error
// of the two. `rows` and the lanes are scratch for (64, D) floats.
template <class T>
void exact_deltas(const AttentionBwdArgs& a, int64_t b, const HeadRows& h, const FloatRows& dout,
                  int64_t chain, float* rows, float* out_lanes, float* dout_lanes) {
  constexpr int W = VecF::kWidth;
  const AttentionArgs& f = a.fwd;
  const int64_t width = f.head_dim;
  for (int64_t t = 0; t < f.length; t += kLanes) {
    const int n = static_cast<int>(f.length - t < kLanes ? f.length - t : kLanes);
    for (int i = 0; i < n; ++i) {
      to_float_row(row_of<T>(f.out, b, h.head, t + i), width, rows + i * width);
    }
    const int columns = static_cast<int>(width);
    rows_to_lanes(rows, width, n, columns, out_lanes, kLanes, kLanes);
    rows_to_lanes(dout.data + t * dout.stride, dout.stride, n, columns, dout_lanes, kLanes, kLanes);
    for (int i = 0; i < n; i += W) {
      VecF total = VecF::zero();
      for (int64_t first = 0; first < width; first += chain) {
        const int64_t end = first + chain < width ? first + chain : width;
        VecF sum = VecF::zero();
        for (int64_t d = first; d < end; ++d) {
          const int64_t at = d * kLanes + i;
          sum = fmadd(VecF::load(dout_lanes + at), VecF::load(out_lanes + at), sum);
        }
        total = first > 0 ? sum + total : sum;
      }
      total.store(h.delta + t + i, n - i);
    }
  }
}

template <class T>
void bwd_unit(const AttentionBwdArgs& a, const Unit& u) {
  const AttentionArgs& f = a.fwd;
  const int64_t width = f.head_dim, group = f.heads / f.kv_heads;
  const int64_t padded = round_up(width, 16);  // of K and dQ, whose columns are lanes
  const Span keys = unit_keys(f, u);
  const int64_t blocks = (keys.hi - keys.lo + kLanes - 1) / kLanes;
  const int64_t sums = group > 1 ? blocks : 1;  // a group's sums wait for its last head
  Scratch scratch(f.scratch);
  float* q_copy = scratch.take<float>(f.length * width);
  float* dout_copy = scratch.take<float>(f.length * width);
  float* own_dq = scratch.take<float>(f.length * padded);
  HeadRows h{0, scratch.take<float>(f.length), scratch.take<float>(f.length),
             scratch.take<float>(f.length)};
  float* dk = scratch.take<float>(sums * kLanes * width);
  float* dv = scratch.take<float>(sums * kLanes * width);
  float* k_rows = scratch.take<float>(kLanes * padded);
  float* v_rows = scratch.take<float>(kLanes * width);
  float* k_lanes = scratch.take<float>(kLanes * width);
  float* v_lanes = scratch.take<float>(kLanes * width);
  float* s = scratch.take<float>(kChunk * kLanes);
  float* dp = scratch.take<float>(kChunk * kLanes);
  float* slope = scratch.take<float>(kChunk * kLanes);
  const bool options = has_score_options(f);
  const VecF unit = VecF::set1(exponent_unit(f));
  const int64_t chain = chain_of(f);
  const size_t sum_bytes = sizeof(float) * static_cast<size_t>(kLanes * width);
  memset(k_rows, 0, sizeof(float) * static_cast<size_t>(kLanes * padded));

  for (int64_t g = 0; g < group; ++g) {
    h.head = u.kv_head * group + g;
    describe_head(f, u.b, h, f.length);
    const Span all{0, f.length};
    const FloatRows q = float_rows<T>(f.q, u.b, h.head, all, width, q_copy);
    const FloatRows dout = float_rows<T>(a.dout, u.b, h.head, all, width, dout_copy);
    exact_deltas<T>(a, u.b, h, dout, chain, v_rows, v_lanes, k_lanes);
    float* dq = dq_of_head(a, g, own_dq);
    memset(dq, 0, sizeof(float) * static_cast<size_t>(f.length * padded));
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t key = keys.lo + block * kLanes;
      const int count = static_cast<int>(clamp(f.lengths[u.b] - key, 0, kLanes));
      float* dk_sum = dk + (group > 1 ? block : 0) * kLanes * width;
      float* dv_sum = dv + (group > 1 ? block : 0) * kLanes * width;
      if (g == 0) {
        memset(dk_sum, 0, sum_bytes);
        memset(dv_sum, 0, sum_bytes);
      }
      for (int j = 0; j < count; ++j) {
        to_float_row(row_of<T>(f.k, u.b, u.kv_head, key + j), width, k_rows + j * padded);
        to_float_row(row_of<T>(f.v, u.b, u.kv_head, key + j), width, v_rows + j * width);
      }
      const int columns = static_cast<int>(width);
      rows_to_lanes(k_rows, padded, count, columns, k_lanes, kLanes, kLanes);
      rows_to_lanes(v_rows, width, count, columns, v_lanes, kLanes, kLanes);
      const Span rows = count > 0 ? rows_of_keys(f, u.b, key) : Span{0, 0};
      int n = 0;
      for (int64_t t = rows.lo; t < rows.hi; t += n) {
        // Rows on the diagonal see the first keys only: 16 rows at a time, as many lanes as needed.
        const bool diagonal = visible_keys(f, u.b, t).hi < key + count;
        const int64_t most = diagonal ? 16 : kFloatStep;
        n = static_cast<int>(rows.hi - t < most ? rows.hi - t : most);
        const int64_t seen = clamp(visible_keys(f, u.b, t + n - 1).hi - key, 0, count);
        const int64_t lanes = round_up(seen, 16);
        const float* q_rows = q.data + t * q.stride;
        const float* dout_rows = dout.data + t * dout.stride;
        multiply_heads(n, lanes, width, q_rows, q.stride, k_lanes, s, chain);
        multiply_heads(n, lanes, width, dout_rows, dout.stride, v_lanes, dp, chain);
        if (options) apply_options_by_rows(f, u.b, h.head, t, n, key, s, slope);
        hide_invisible_by_rows(f, u.b, t, n, key, key + kLanes, s);
        if (f.softcap > 0.0f) {
          score_gradients<true>(h, t, n, unit, s, dp, slope);
        } else {
          score_gradients<false>(h, t, n, unit, s, dp, slope);
        }
        gemm_f32<true, true>(width, lanes, n, dout_rows, dout.stride, s, kLanes, dv_sum, kLanes);
        gemm_f32<true, true>(width, lanes, n, q_rows, q.stride, dp, kLanes, dk_sum, kLanes);
        gemm_f32<false, true>(n, padded, seen, dp, kLanes, k_rows, padded, dq + t * padded, padded);
      }
      if (g == group - 1) store_dkv<T>(a, u, key, dk_sum, dv_sum);
    }
    if (a.dq_partial == nullptr) store_dq<T>(a, u, h.head, dq, padded);
  }
}

}  // namespace

void attention_bwd(const AttentionBwdArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const Unit u = unit_at(a.fwd, i);
    switch (a.fwd.dtype) {
      case DType::kF32:
        bwd_unit<float>(a, u);
        break;
      case DType::kF16:
        bwd_unit<f16>(a, u);
        break;
      case DType::kBF16:
        bwd_unit<bf16>(a, u);
        break;
      case DType::kF64:  // the reference's
        break;
    }
  }
}

void attention_add_part(const AttentionPartsArgs& a, int64_t begin, int64_t end) {
  constexpr int W = VecF::kWidth;
  for (int64_t i = begin; i < end; i += W) {
    const int n = static_cast<int>(end - i < W ? end - i : W);
    (VecF::load(a.total + i, n) + VecF::load(a.part + i, n)).store(a.total + i, n);
  }
}

void attention_store_parts(const AttentionPartsArgs& a, int64_t begin, int64_t end) {
  const AttentionArgs& f = a.bwd.fwd;
  const Unit u{a.pair / f.kv_heads, a.pair % f.kv_heads, 0, 0};
  const int64_t first_head = u.kv_head * (f.heads / f.kv_heads);
  LMFAST_DISPATCH_DTYPE(f.dtype, scalar_t, {
    if constexpr (sizeof(scalar_t) <= sizeof(float)) {
      for (int64_t g = begin; g < end; ++g) {
        const float* dq = a.total + g * a.bwd.dq_rows * a.bwd.dq_width;
        store_dq<scalar_t>(a.bwd, u, first_head + g, dq, a.bwd.dq_width);
      }
    }
  })
}

}  // namespace lmfast::LMFAST_ISA
