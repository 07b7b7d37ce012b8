// What the backward attention kernels share, on blocks of scores with query rows as rows and 64
// keys as lanes: the probabilities again, and the gradient of the scores.
#pragma once

#include "../simd_transpose.h"
#include "attention_by_rows.h"

namespace lmfast::LMFAST_ISA {
namespace {

// One query head of a unit, row by row: the negative reference value of its scores (-inf for rows
// of padding), one over the sum of e^(score - reference), and dout . out.
struct HeadRows {
  int64_t head;
  float *minus_m, *inverse, *delta;
};

// The rows t in [lo, hi) that see a key of [key, key + kLanes).
LMFAST_INLINE Span rows_of_keys(const AttentionArgs& a, int64_t b, int64_t key) {
  // Both limits of visible_keys only grow with t.
  const auto first = [&](auto&& passed) {
    int64_t lo = 0, hi = a.length;
    while (lo < hi) {
      const int64_t middle = (lo + hi) / 2;
      passed(visible_keys(a, b, middle)) ? hi = middle : lo = middle + 1;
    }
    return lo;
  };
  const int64_t lo = first([&](Span s) { return s.hi > key; });
  const int64_t hi = first([&](Span s) { return s.lo >= key + kLanes; });
  return lo < hi ? Span{lo, hi} : Span{0, 0};
}

// Reference values and sums; rows of padding take no part.
inline void describe_head(const AttentionArgs& f, int64_t b, HeadRows& h, int64_t padded) {
  const int64_t first = (b * f.heads + h.head) * f.length;
  for (int64_t t = 0; t < padded; ++t) {
    const bool there = t < f.length;
    h.minus_m[t] = there ? -f.reference[first + t] : -kInfinity;
    h.inverse[t] = there ? 1.0f / f.sum[first + t] : 1.0f;
  }
}

// Where dQ of head g of the group is summed: with the parts of other ranges to come, in this one's;
// otherwise in `own`.
LMFAST_INLINE float* dq_of_head(const AttentionBwdArgs& a, int64_t g, float* own) {
  return a.dq_partial == nullptr ? own : a.dq_partial + g * a.dq_rows * a.dq_width;
}

// Rows of a finished dQ to their tensor.
template <class T>
void store_dq(const AttentionBwdArgs& a, const Unit& u, int64_t head, const float* dq,
              int64_t width) {
  constexpr int W = VecF::kWidth;
  const AttentionArgs& f = a.fwd;
  const VecF scale = VecF::set1(f.scale);
  for (int64_t t = 0; t < f.length; ++t) {
    T* out = mutable_row_of<T>(a.dq, u.b, head, t);
    for (int64_t d = 0; d < f.head_dim; d += W) {
      const int n = static_cast<int>(f.head_dim - d < W ? f.head_dim - d : W);
      (VecF::load(dq + t * width + d, n) * scale).store(out + d, n);
    }
  }
}

// Keys of a unit of the backward: a.ranges parts at block limits.
LMFAST_INLINE Span unit_keys(const AttentionArgs& a, const Unit& u) {
  const int64_t blocks = (a.keys + kLanes - 1) / kLanes, per = (blocks + a.ranges - 1) / a.ranges;
  return {clamp(u.range * per * kLanes, 0, a.keys), clamp((u.range + 1) * per * kLanes, 0, a.keys)};
}

// dK and dV of a block of keys, from columns to rows.
template <class T>
void store_dkv(const AttentionBwdArgs& a, const Unit& u, int64_t key, const float* dk,
               const float* dv) {
  const AttentionArgs& f = a.fwd;
  const int count = static_cast<int>(f.keys - key < kLanes ? f.keys - key : kLanes);
  const int width = static_cast<int>(f.head_dim);
  alignas(64) float factor[kLanes];
  for (float& x : factor) x = f.scale;
  lanes_to_rows(dk, kLanes, factor, count, width, mutable_row_of<T>(a.dk, u.b, u.kv_head, key),
                a.dk.row);
  for (float& x : factor) x = 1.0f;
  lanes_to_rows(dv, kLanes, factor, count, width, mutable_row_of<T>(a.dv, u.b, u.kv_head, key),
                a.dv.row);
}

}  // namespace
}  // namespace lmfast::LMFAST_ISA
