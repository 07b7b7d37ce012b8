// Attention of a few query rows on a long cache: decoding.
//
// Floor: memory. Every key and value is read once from memory, for all query heads of its group and
// all rows together (up to kDecodeRows), where it lies; nothing is packed or copied, and nothing
// behind the row's length is touched. The keys are cut into splits, so that one sequence with one
// key head still occupies every thread; a split leaves its maximum, sum and unnormalised output,
// and attention_combine adds the splits in order. Splits depend on the lengths only, not on the
// threads.
//
// A row of keys is a dot product per query row, summed across lanes at its end; values are added to
// outputs that stay in registers through a chunk of 64 keys. More rows than kDecodeRows are cheaper
// as lanes (attention_fwd.cpp).
#include "../simd_transpose.h"
#include "attention_by_rows.h"

namespace lmfast::LMFAST_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kRowsAtOnce = 4;
#else
constexpr int kRowsAtOnce = 2;
#endif
constexpr int kVecsAtOnce = 4;

// Asks for what lies some rows ahead: the processor's own prefetching stops at every page. One row
// of 16 heads by 8192 keys of 64 fp32: from 80 to 91 % of the read bandwidth, and 1.2 to 1.4 times
// faster with 4 rows to a key head, which also need the arithmetic.
LMFAST_INLINE void prefetch(const void* p) {
  __builtin_prefetch(static_cast<const char*>(p) + 4096);
}

// Scores of kRows queries (fp32 rows `q_stride` apart) against n keys: s[r][j].
template <int kRows, class T>
LMFAST_INLINE void dot_keys(const float* q, int64_t q_stride, const T* k, int64_t k_stride,
                            int64_t width, int n, float* s) {
  constexpr int W = VecF::kWidth;
  const int64_t whole = width / W * W;
  const int rest = static_cast<int>(width - whole);
  for (int j = 0; j < n; ++j, k += k_stride) {
    VecF total[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) total[r] = VecF::zero();
    for (int64_t d = 0; d < whole; d += W) {
      const VecF x = VecF::load(k + d);
      prefetch(k + d);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        total[r] = fmadd(x, VecF::load(q + r * q_stride + d), total[r]);
      }
    }
    if (rest > 0) {
      const VecF x = VecF::load(k + whole, rest);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        total[r] = fmadd(x, VecF::load(q + r * q_stride + whole, rest), total[r]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) s[r * kLanes + j] = sum(total[r]);
  }
}

// out[r] += p[r][j] v[j] over n values, kVecs vectors of columns at a time; `lanes` of the last.
template <int kRows, int kVecs, class T>
LMFAST_INLINE void add_values(const float* p, const T* v, int64_t v_stride, int n, int lanes,
                              float* out, int64_t out_stride) {
  constexpr int W = VecF::kWidth;
  VecF total[kRows][kVecs];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) total[r][i] = VecF::zero();
  }
  for (int j = 0; j < n; ++j, v += v_stride) {
    VecF x[kVecs];
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) {
      prefetch(v + i * W);
      x[i] = i == kVecs - 1 && lanes < W ? VecF::load(v + i * W, lanes) : VecF::load(v + i * W);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const VecF weight = VecF::set1(p[r * kLanes + j]);
#pragma GCC unroll 4
      for (int i = 0; i < kVecs; ++i) total[r][i] = fmadd(weight, x[i], total[r][i]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) {
      float* at = out + r * out_stride + i * W;
      (VecF::load(at) + total[r][i]).store(at);
    }
  }
}
template <int kRows, class T>
LMFAST_INLINE void add_all_values(const float* p, const T* v, int64_t v_stride, int n,
                                  int64_t width, float* out, int64_t out_stride) {
  constexpr int W = VecF::kWidth, kBlock = kVecsAtOnce * W;
  int64_t d = 0;
  for (; d + kBlock <= width; d += kBlock) {
    add_values<kRows, kVecsAtOnce>(p, v + d, v_stride, n, W, out + d, out_stride);
  }
  for (; d < width; d += W) {
    const int lanes = static_cast<int>(width - d < W ? width - d : W);
    add_values<kRows, 1>(p, v + d, v_stride, n, lanes, out + d, out_stride);
  }
}

// Calls f with the number of rows as a constant, for all of them in turn.
template <class F>
LMFAST_INLINE void by_rows(int rows, const F& f) {
  int r = 0;
  for (; r + kRowsAtOnce <= rows; r += kRowsAtOnce) f(r, Constant<kRowsAtOnce>());
  if constexpr (kRowsAtOnce > 2) {
    if (rows - r >= 2) {
      f(r, Constant<2>());
      r += 2;
    }
  }
  if (r < rows) f(r, Constant<1>());
}

// p in place of the scores of one row; its maximum, sum and output follow.
LMFAST_INLINE void row_softmax(float* s, VecF unit, float* m, float* l, float* out, int64_t width) {
  constexpr int W = VecF::kWidth;
  VecF top = VecF::load(s);
  for (int i = W; i < kLanes; i += W) top = max(top, VecF::load(s + i));
  const float largest = hmax(top * unit);
  if (largest > *m) {
    float factor[W];
    exp2<6>(VecF::set1(*m - largest)).store(factor);
    *m = largest;
    *l *= factor[0];
    for (int64_t d = 0; d < width; d += W)
      (VecF::load(out + d) * VecF::set1(factor[0])).store(out + d);
  }
  const VecF shift = VecF::set1(-*m);
  VecF total = VecF::zero();
  for (int i = 0; i < kLanes; i += W) {
    const VecF p = exp2<6>(fmadd(VecF::load(s + i), unit, shift));
    p.store(s + i);
    total = total + p;
  }
  *l += sum(total);
}

template <class T>
void decode_unit(const AttentionDecodeArgs& a, int64_t unit) {
  const AttentionArgs& f = a.fwd;
  const int64_t pair = unit / a.splits, split = unit % a.splits;
  const Unit u{pair / f.kv_heads, pair % f.kv_heads, 0};
  const int rows = static_cast<int>(f.heads / f.kv_heads * f.length);
  const int64_t width = f.head_dim, padded = round_up(width, 16), record = padded + 2;
  float* partial = a.partial + unit * rows * record;
  // A row's record: output, maximum, sum.
  memset(partial, 0, sizeof(float) * static_cast<size_t>(rows * record));
  Row row[kDecodeRows];
  alignas(64) float q[kDecodeRows * 256], s[kDecodeRows * kLanes], slope[kDecodeRows * kLanes];
  int64_t lo = f.keys, hi = 0;
  for (int r = 0; r < rows; ++r) {
    partial[r * record + padded] = kLowest;
    row[r] = row_at(f, u, r);
    to_float_row(row_of<T>(f.q, u.b, row[r].head, row[r].t), width, q + r * padded);
    const Span seen = visible_keys(f, u.b, row[r].t);
    if (seen.lo == seen.hi) continue;
    lo = seen.lo < lo ? seen.lo : lo;
    hi = seen.hi > hi ? seen.hi : hi;
  }
  const int64_t first = split * a.keys_per_split, past = first + a.keys_per_split;
  lo = lo > first ? lo : first;
  hi = hi < past ? hi : past;
  const bool options = has_score_options(f);
  const VecF unit_scale = VecF::set1(options ? 1.0f : f.scale * kLog2e);
  for (int64_t key = lo; key < hi; key += kLanes) {
    const int n = static_cast<int>(hi - key < kLanes ? hi - key : kLanes);
    const T* k = row_of<T>(f.k, u.b, u.kv_head, key);
    const T* v = row_of<T>(f.v, u.b, u.kv_head, key);
    by_rows(rows, [&](int r, auto count) {
      dot_keys<decltype(count)::value>(q + r * padded, padded, k, f.k.row, width, n,
                                       s + r * kLanes);
    });
    for (int r = 0; r < rows; ++r) {
      float* scores = s + r * kLanes;
      if (options) apply_options_by_rows(f, u.b, row[r].head, row[r].t, 1, key, scores, slope);
      hide_invisible_by_rows(f, u.b, row[r].t, 1, key, key + n, scores);
      for (int j = n; j < kLanes; ++j) scores[j] = -kInfinity;
      float* out = partial + r * record;
      row_softmax(scores, unit_scale, out + padded, out + padded + 1, out, width);
    }
    by_rows(rows, [&](int r, auto count) {
      add_all_values<decltype(count)::value>(s + r * kLanes, v, f.v.row, n, width,
                                             partial + r * record, record);
    });
  }
}

// out = sum of splits, each scaled to the largest maximum, over the sum of their sums and the sink.
template <class T>
void combine_row(const AttentionDecodeArgs& a, int64_t at) {
  constexpr int W = VecF::kWidth;
  const AttentionArgs& f = a.fwd;
  const int64_t t = at % f.length, head = at / f.length % f.heads, b = at / f.length / f.heads;
  const int64_t group = f.heads / f.kv_heads, rows = group * f.length;
  const int64_t padded = round_up(f.head_dim, 16), record = padded + 2;
  const float* first = a.partial + (b * f.kv_heads + head / group) * a.splits * rows * record +
                       (head % group * f.length + t) * record;
  const float sink = f.sinks != nullptr ? f.sinks[head] * kLog2e : kLowest;
  float m = sink;
  for (int64_t i = 0; i < a.splits; ++i) {
    const float x = first[i * rows * record + padded];
    m = x > m ? x : m;
  }
  float lanes[W], l = 0.0f;
  alignas(64) float out[256] = {};
  if (f.sinks != nullptr) {
    exp2<6>(VecF::set1(sink - m)).store(lanes);
    l = lanes[0];
  }
  for (int64_t i = 0; i < a.splits; ++i) {
    const float* in = first + i * rows * record;
    const VecF factor = exp2<6>(VecF::set1(in[padded] - m));
    factor.store(lanes);
    l += lanes[0] * in[padded + 1];
    for (int64_t d = 0; d < padded; d += W) {
      fmadd(VecF::load(in + d), factor, VecF::load(out + d)).store(out + d);
    }
  }
  const bool empty = l == 0.0f;
  log2(VecF::set1(empty ? 1.0f : l)).store(lanes);
  f.lse[at] = empty ? kInfinity : m + lanes[0];
  const VecF inverse = VecF::set1(empty ? 0.0f : 1.0f / l);
  T* to = mutable_row_of<T>(f.out, b, head, t);
  for (int64_t d = 0; d < f.head_dim; d += W) {
    const int n = static_cast<int>(f.head_dim - d < W ? f.head_dim - d : W);
    (VecF::load(out + d) * inverse).store(to + d, n);
  }
}

}  // namespace

void attention_decode(const AttentionDecodeArgs& a, int64_t begin, int64_t end) {
  LMFAST_DISPATCH_DTYPE(a.fwd.dtype, scalar_t, {
    if constexpr (sizeof(scalar_t) <= sizeof(float)) {
      for (int64_t i = begin; i < end; ++i) decode_unit<scalar_t>(a, i);
    }
  })
}

void attention_combine(const AttentionDecodeArgs& a, int64_t begin, int64_t end) {
  LMFAST_DISPATCH_DTYPE(a.fwd.dtype, scalar_t, {
    if constexpr (sizeof(scalar_t) <= sizeof(float)) {
      for (int64_t i = begin; i < end; ++i) combine_row<scalar_t>(a, i);
    }
  })
}

}  // namespace lmfast::LMFAST_ISA
