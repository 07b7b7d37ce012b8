// The softmax of the forward attention kernels, on blocks of scores with keys as rows and query
// rows as lanes: no sum or maximum crosses lanes.
//
// The maximum is online but lazy: the reference value m of a lane moves only when a chunk exceeds
// it by more than 2^8 (or, on AMX, its sum 2^14), so that usually the first chunk sets it and the
// output is never rescaled; e^(s - m) stays bounded by construction, at any size of the scores.
// (Idea: Flash-Attention 4.)
#pragma once

#include "../simd_transpose.h"
#include "attention_block.h"

namespace lmfast::LMFAST_ISA {
namespace {

constexpr int kLaneVecs = kLanes / VecF::kWidth;

// A block of up to 64 query rows of one unit.
struct QueryBlock {
  int rows;
  int vecs;  // vectors of lanes in use; lanes behind `rows` repeat lane 0's limits
  int64_t b;
  Row row[kLanes];
  alignas(64) float lo[kLanes], hi[kLanes];     // keys lane sees: [lo, hi)
  alignas(64) float slope[kLanes], at[kLanes];  // ALiBi; position
  alignas(64) float m[kLanes], l[kLanes];
  int64_t first, last;          // keys any row sees lie in [first, last)
  int64_t all_first, all_last;  // every row sees [all_first, all_last)
};

LMFAST_INLINE void describe_block(const AttentionArgs& a, const Unit& u, int64_t row, int rows,
                                  QueryBlock& q) {
  q.rows = rows;
  q.vecs = (rows + VecF::kWidth - 1) / VecF::kWidth;
  q.b = u.b;
  q.first = q.all_last = a.keys;
  q.last = q.all_first = 0;
  Row at = row_at(a, u, row);
  for (int i = 0; i < q.vecs * VecF::kWidth; ++i) {
    q.row[i] = i < rows ? at : q.row[0];
    if (++at.t == a.length) at = {at.head + 1, 0};
    const Span s = visible_in_split(a, u, q.row[i].t);
    q.lo[i] = static_cast<float>(s.lo);
    q.hi[i] = static_cast<float>(s.hi);
    q.at[i] = static_cast<float>(a.offsets[u.b] + q.row[i].t);
    q.slope[i] = a.alibi != nullptr ? a.alibi[q.row[i].head] : 0.0f;
    q.m[i] = kLowest;
    q.l[i] = 0.0f;
    if (s.lo < s.hi) {
      q.first = s.lo < q.first ? s.lo : q.first;
      q.last = s.hi > q.last ? s.hi : q.last;
    }
    q.all_first = s.lo > q.all_first ? s.lo : q.all_first;
    q.all_last = s.hi < q.all_last ? s.hi : q.all_last;
  }
  q.first = q.first < q.last ? q.first : q.last;
}

// Products with keys [key, key + n) to scores with scale, softcap, ALiBi and mask applied.
inline __attribute__((noinline)) void apply_options(const AttentionArgs& a, const QueryBlock& q,
                                                    int64_t key, int n, float* s, float* bias) {
  constexpr int W = VecF::kWidth;
  if (a.mask_kind != MaskKind::kNone) {
    alignas(64) float rows[kLanes * kLanes];  // of the mask
    for (int i = 0; i < q.rows; ++i) {
      const Row r = q.row[i];
      mask_row(a,
               q.b * a.mask_stride[0] + r.head * a.mask_stride[1] + r.t * a.mask_stride[2] +
                   key * a.mask_stride[3],
               n, rows + i * kLanes);
    }
    rows_to_lanes(rows, kLanes, q.rows, n, bias, kLanes, q.vecs * W);
  }
  const VecF scale = VecF::set1(a.scale);
  const VecF cap = VecF::set1(a.softcap), inverse = VecF::set1(a.scale / a.softcap);
  for (int j = 0; j < n; ++j) {
    const VecF position = VecF::set1(static_cast<float>(key + j));
    for (int i = 0; i < q.vecs * W; i += W) {
      float* p = s + j * kLanes + i;
      VecF x = VecF::load(p);
      x = a.softcap > 0.0f ? cap * tanh(x * inverse) : x * scale;
      if (a.alibi != nullptr) {
        x = fmadd(VecF::load(q.slope + i), position - VecF::load(q.at + i), x);
      }
      if (a.mask_kind != MaskKind::kNone) x = add_mask(x, VecF::load(bias + j * kLanes + i));
      x.store(p);
    }
  }
}

// -inf where a lane does not see the key.
LMFAST_INLINE void hide_invisible(const QueryBlock& q, int64_t key, int n, float* s) {
  constexpr int W = VecF::kWidth;
  const VecF hidden = VecF::set1(-kInfinity);
  for (int j = 0; j < n; ++j) {
    if (key + j >= q.all_first && key + j < q.all_last) continue;
    const VecF position = VecF::set1(static_cast<float>(key + j));
    for (int i = 0; i < q.vecs * W; i += W) {
      float* p = s + j * kLanes + i;
      VecF x = select_less(position, VecF::load(q.hi + i), VecF::load(p), hidden);
      x = select_less(position, VecF::load(q.lo + i), hidden, x);
      x.store(p);
    }
  }
}

// The largest of n rows of s in a lane vector.
LMFAST_INLINE VecF largest(const float* s, int n) {
  VecF x0 = VecF::load(s), x1 = x0;
  int j = 0;
  for (; j + 2 <= n; j += 2) {
    x0 = max(x0, VecF::load(s + j * kLanes));
    x1 = max(x1, VecF::load(s + (j + 1) * kLanes));
  }
  if (j < n) x0 = max(x0, VecF::load(s + j * kLanes));
  return max(x0, x1);
}

// Whether some lane of x is above its limit.
LMFAST_INLINE bool any_above(VecF x, VecF limit) { return any_less(limit, x); }
LMFAST_INLINE bool any_above(VecF x, float limit) { return any_above(x, VecF::set1(limit)); }

// Whether a lane of vector i needs a larger reference value before e^(top - m) is taken.
LMFAST_INLINE bool exceeds(const QueryBlock& q, int i, VecF top, VecF unit) {
  return any_above((top - VecF::load(q.m + i)) * unit, 8.0f);
}

// Moves the reference values of lane vector i up to `top`, and rescales its sums and output.
inline __attribute__((noinline)) void raise_maximum(const AttentionArgs& a, QueryBlock& q, int i,
                                                    VecF top, float* out) {
  const VecF m = VecF::load(q.m + i);
  const VecF moved = select_less(m, top, top, m);
  const VecF factor = exp2<6>((m - moved) * VecF::set1(exponent_unit(a)));
  moved.store(q.m + i);
  (VecF::load(q.l + i) * factor).store(q.l + i);
  if (!(hmax(m) > kLowest)) return;  // the first chunk: there is nothing to rescale
  for (int64_t d = 0; d < a.head_dim; ++d) {
    float* p = out + d * kLanes + i;
    (VecF::load(p) * factor).store(p);
  }
}

// Adds the sinks, keeps what the backward needs, and leaves in q.l what the output is to be divided
// by, inverted: 0 for a row that saw nothing.
LMFAST_INLINE void finish_block(const AttentionArgs& a, QueryBlock& q) {
  constexpr int W = VecF::kWidth;
  alignas(64) float sums[kLanes];
  const VecF unit = VecF::set1(exponent_unit(a)), one = VecF::set1(1.0f), zero = VecF::zero();
  for (int i = 0; i < q.vecs * W; i += W) {
    const VecF m = VecF::load(q.m + i);
    VecF l = VecF::load(q.l + i), factor = one;
    if (a.sinks != nullptr) {
      alignas(64) float sinks[W];
      for (int j = 0; j < W; ++j) sinks[j] = a.sinks[q.row[i + j].head];
      const VecF sink = VecF::load(sinks), moved = select_less(m, sink, sink, m);
      factor = exp2<6>((m - moved) * unit);
      l = fmadd(l, factor, exp2<6>((sink - moved) * unit));
      moved.store(q.m + i);
    }
    l.store(sums + i);
    // An empty row has l == 0; a NaN stays one.
    const VecF empty = select_less(zero, l, zero, select_less(l, one, one, zero));
    select_less(zero, empty, zero, factor / select_less(zero, empty, one, l)).store(q.l + i);
  }
  for (int i = 0; i < q.rows; ++i) {
    keep_sums(a, (q.b * a.heads + q.row[i].head) * a.length + q.row[i].t, q.m[i], sums[i]);
  }
}

// The same for one split of the keys: what attention_combine needs of each row. `row` is the first
// of the block in its unit.
LMFAST_INLINE void store_partial(const AttentionArgs& a, const Unit& u, const QueryBlock& q,
                                 int64_t row, const float* out) {
  const int64_t record = attention_record_size(a), padded = record - 2;
  float* to = partial_of(a, u) + row * record;
  alignas(64) float one[kLanes];
  for (float& x : one) x = 1.0f;
  lanes_to_rows(out, kLanes, one, q.rows, static_cast<int>(a.head_dim), to, record);
  for (int i = 0; i < q.rows; ++i, to += record) {
    for (int64_t d = a.head_dim; d < padded; ++d) to[d] = 0.0f;
    to[padded] = q.m[i];
    to[padded + 1] = q.l[i];
  }
}

// The block's output, divided by the sums, to its rows; those of one head together. `rows` is
// scratch for (64, D) floats.
template <class T>
void store_block(const AttentionArgs& a, const QueryBlock& q, const float* out, float* rows) {
  constexpr int W = VecF::kWidth;
  const int width = static_cast<int>(a.head_dim);
  const Row first = q.row[0];
  if (first.t + q.rows <= a.length) {
    lanes_to_rows(out, kLanes, q.l, q.rows, width,
                  mutable_row_of<T>(a.out, q.b, first.head, first.t), a.out.row);
    return;
  }
  lanes_to_rows(out, kLanes, q.l, q.rows, width, rows, width);
  for (int i = 0; i < q.rows; ++i) {
    T* p = mutable_row_of<T>(a.out, q.b, q.row[i].head, q.row[i].t);
    for (int d = 0; d < width; d += W) {
      const int n = width - d < W ? width - d : W;
      VecF::load(rows + i * width + d, n).store(p + d, n);
    }
  }
}

}  // namespace
}  // namespace lmfast::LMFAST_ISA
