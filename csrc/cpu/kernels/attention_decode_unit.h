// A unit of decoding: the rows of a group against a split of the keys, by 64 keys.
#pragma once

#include "attention_by_rows.h"
#include "attention_decode_dot.h"

namespace lmfast::LMFAST_ISA {
namespace {

// The running softmax of one row: reference value, sums of e^(score - m) by lanes, and output.
struct RowSums {
  float m;
  VecF l;
  float* out;
};

// Moves the reference value up to the largest of these scores, and rescales what was summed.
inline __attribute__((noinline)) void raise_reference(VecF top, VecF unit, int64_t padded,
                                                      RowSums& sums) {
  const float largest = hmax(top);
  if (!(largest > sums.m)) return;
  const VecF factor = exp2<6>(VecF::set1(sums.m - largest) * unit);
  const bool first = sums.m == kLowest;
  sums.m = largest;
  sums.l = sums.l * factor;
  if (first) return;  // there is nothing to rescale
  for (int64_t d = 0; d < padded; d += kVec) {
    (VecF::load(sums.out + d) * factor).store(sums.out + d);
  }
}

// p in place of the scores of one row. Sums stay apart by lanes, and a maximum is looked for across
// them only where a lane exceeds the last one: some five times in 8192 keys.
LMFAST_INLINE void row_softmax(float* s, VecF unit, int64_t padded, RowSums& sums) {
  VecF top = VecF::load(s);
  for (int i = kVec; i < kLanes; i += kVec) top = max(top, VecF::load(s + i));
  if (any_less(VecF::set1(sums.m), top)) raise_reference(top, unit, padded, sums);
  const VecF shift = VecF::set1(-sums.m), normal = VecF::set1(1.17549435e-38f);
  for (int i = 0; i < kLanes; i += kVec) {
    const VecF x = exp2<6>((VecF::load(s + i) + shift) * unit);
    // A product with a denormal number takes some 150 cycles: 2 % of them tripled the time.
    const VecF p = select_less(x, normal, VecF::zero(), x);
    p.store(s + i);
    sums.l = sums.l + p;
  }
}

LMFAST_INLINE void multiply_lanes(float* s, const float* factors, int n) {
  for (int i = 0; i < n; i += kVec) {
    (VecF::load(s + i) * VecF::load(factors + i, n - i)).store(s + i);
  }
}

struct DecodeRows {
  int count;
  int64_t lo, hi;  // keys that any of them sees, in this split
  Row row[kDecodeRows];
  RowSums sums[kDecodeRows];
  alignas(64) float q[kDecodeRows * 256];
};

// P: how queries, keys and values are multiplied.
template <class P>
void decode_unit(const AttentionArgs& a, int64_t unit) {
  using S = typename P::Key;
  using Query = typename P::Query;
  const int64_t pair = unit / a.splits, split = unit % a.splits;
  const Unit u{pair / a.kv_heads, pair % a.kv_heads, 0, split};
  const int64_t width = a.head_dim, padded = round_up(width, 32);
  const int64_t record = attention_record_size(a);
  float* partial = partial_of(a, u);
  DecodeRows w;
  w.count = static_cast<int>(attention_rows(a));
  w.lo = a.keys;
  w.hi = 0;
  memset(partial, 0, sizeof(float) * static_cast<size_t>(w.count * record));
  for (int r = 0; r < w.count; ++r) {
    partial[r * record + padded] = kLowest;
    w.sums[r] = {kLowest, VecF::zero(), partial + r * record};
    w.row[r] = row_at(a, u, r);
    const Span seen = visible_in_split(a, u, w.row[r].t);
    if (seen.lo == seen.hi) continue;
    w.lo = seen.lo < w.lo ? seen.lo : w.lo;
    w.hi = seen.hi > w.hi ? seen.hi : w.hi;
  }
  if (w.lo >= w.hi) return;
  Query* q = reinterpret_cast<Query*>(w.q);
  const int64_t q_stride = P::query_stride(width);
  for (int r = 0; r < w.count; ++r) {
    P::load_query(a, u.b, w.row[r], padded, q + r * q_stride);
  }
  alignas(64) float s[kDecodeRows * kLanes], slope[kDecodeRows * kLanes];
  const bool options = has_score_options(a);
  const VecF unit_scale = VecF::set1(exponent_unit(a));
  const StoredTensor stored_k = stored_keys(a), stored_v = stored_values(a);
  int64_t row = storage_row(a.stored, u.b, w.lo), end = 0;
  for (int64_t key = w.lo; key < w.hi; key = end) {
    end = clamp((key / kLanes + 1) * kLanes, 0, w.hi);
    const int64_t next = end < w.hi ? storage_row(a.stored, u.b, end) : row;
    const int n = static_cast<int>(end - key);
    const Keys<S> k{row_of<S>(a.k, row, u.kv_head, key), a.k.row, n,
                    row_of<S>(a.k, next, u.kv_head, end)};
    const Keys<S> v{row_of<S>(a.v, row, u.kv_head, key), a.v.row, n,
                    row_of<S>(a.v, next, u.kv_head, end)};
    P::dot(w.count, q, q_stride, k, width, s);
    for (int r = 0; r < w.count; ++r) {
      float* scores = s + r * kLanes;
      fetch_next(v, width, r);
      if (stored_k.scales != nullptr) {
        multiply_lanes(scores, scales_at(stored_k, row, u.kv_head, key), n);
      }
      const Row at = w.row[r];
      if (options) apply_options_by_rows(a, u.b, at.head, at.t, 1, key, scores, slope);
      hide_invisible_by_rows(a, u.b, at.t, 1, key, end, scores);
      for (int j = n; j < kLanes; ++j) scores[j] = -kInfinity;
      row_softmax(scores, unit_scale, padded, w.sums[r]);
      if (stored_v.scales != nullptr) {
        multiply_lanes(scores, scales_at(stored_v, row, u.kv_head, key), n);
      }
    }
    P::add(w.count, s, v, width, partial, record);
    row = next;
  }
  for (int r = 0; r < w.count; ++r) {
    float* out = partial + r * record;
    P::in_order(out, padded);
    out[padded] = w.sums[r].m;
    out[padded + 1] = sum(w.sums[r].l);
  }
}

}  // namespace
}  // namespace lmfast::LMFAST_ISA
