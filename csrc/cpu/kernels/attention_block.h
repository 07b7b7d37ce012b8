// What the forward and backward attention kernels share: scratch memory, the query rows of a unit,
// and which keys they see.
#pragma once

#include "../simd_tanh.h"
#include "attention.h"

namespace lmfast::LMFAST_ISA {
namespace {

constexpr int kLanes = static_cast<int>(kAttentionLanes);
constexpr int kChunk = static_cast<int>(kAttentionChunk);
// Rows per step in fp32: a multiple of kGemmRows that leaves S, K and V in the first-level cache.
// (60 against 96 and 128: 2 and 5 % faster.)
constexpr int kFloatStep = 60;
constexpr int kDecodeRows = static_cast<int>(kAttentionDecodeRows);
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLowest = -3.402823466e38f;
constexpr float kInfinity = __builtin_inff();

// An integer as a type, to pass it to a generic lambda.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Hands out 64-byte aligned pieces of a participant's scratch.
class Scratch {
 public:
  explicit Scratch(void* base) : next_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(next_);
    next_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return p;
  }

 private:
  char* next_;
};

// One (batch row, key/value head), a range of its query rows or keys, and a split of the keys.
struct Unit {
  int64_t b, kv_head, range, split;
};
LMFAST_INLINE Unit unit_at(const AttentionArgs& a, int64_t i) {
  const int64_t split = i % a.splits, range = i / a.splits % a.ranges;
  const int64_t pair = i / a.splits / a.ranges;
  // Later ranges see more keys: hand those out first.
  return {pair / a.kv_heads, pair % a.kv_heads, a.ranges - 1 - range, split};
}
// Where the rows of a unit's split leave their parts; of a single split, the thread's own memory.
LMFAST_INLINE float* partial_of(const AttentionArgs& a, const Unit& u) {
  const int64_t pair = u.b * a.kv_heads + u.kv_head;
  const int64_t at = a.splits > 1 ? pair * a.splits + u.split : 0;
  return a.partial + at * attention_rows(a) * attention_record_size(a);
}

struct Span {
  int64_t lo, hi;  // lo <= hi
};
LMFAST_INLINE int64_t clamp(int64_t x, int64_t lo, int64_t hi) {
  return x < lo ? lo : (x > hi ? hi : x);
}
// The keys that query t of batch row b sees, before any mask.
LMFAST_INLINE Span visible_keys(const AttentionArgs& a, int64_t b, int64_t t) {
  const int64_t p = a.offsets[b] + t, keys = a.lengths[b];
  int64_t lo = 0, hi = keys;
  if (a.causal) hi = clamp(p + 1, 0, keys);
  if (a.window > 0) {
    lo = clamp(p - a.window + 1, 0, keys);
    if (!a.causal) hi = clamp(p + a.window, 0, keys);
  }
  if (a.runs != nullptr) {
    const int64_t* run = a.runs + b * a.runs_batch + 2 * t;
    lo = lo > run[0] ? lo : run[0];
    hi = hi < run[1] ? hi : run[1];
  }
  return {lo < hi ? lo : hi, hi};
}

// Of those, the keys of this split.
LMFAST_INLINE Span visible_in_split(const AttentionArgs& a, const Unit& u, int64_t t) {
  const Span all = visible_keys(a, u.b, t);
  if (a.splits == 1) return all;
  const int64_t first = u.split * a.keys_per_split, past = first + a.keys_per_split;
  const int64_t hi = clamp(all.hi, first, past);
  return {clamp(all.lo, first, hi), hi};
}

// The query rows of a unit are numbered through the heads of its group: row = g * T + t.
struct Row {
  int64_t head, t;
};
LMFAST_INLINE Row row_at(const AttentionArgs& a, const Unit& u, int64_t row) {
  const int64_t group = a.heads / a.kv_heads;
  return {u.kv_head * group + row / a.length, row % a.length};
}
// The rows of a unit of the forward: the whole group's, cut into a.ranges parts at block limits.
LMFAST_INLINE Span unit_rows(const AttentionArgs& a, const Unit& u) {
  const int64_t all = a.heads / a.kv_heads * a.length;
  const int64_t blocks = (all + kLanes - 1) / kLanes, per = (blocks + a.ranges - 1) / a.ranges;
  return {clamp(u.range * per * kLanes, 0, all), clamp((u.range + 1) * per * kLanes, 0, all)};
}
// A span that holds every key of the unit's split that these rows see.
LMFAST_INLINE Span keys_of_rows(const AttentionArgs& a, const Unit& u, Span rows) {
  if (rows.lo >= rows.hi) return {0, 0};
  int64_t first = rows.lo % a.length, last = (rows.hi - 1) % a.length;
  if (rows.hi - rows.lo >= a.length || first > last) {
    first = 0;
    last = a.length - 1;
  }
  // Both limits only grow with t; a row that sees nothing widens the span at most.
  const Span all{visible_in_split(a, u, first).lo, visible_in_split(a, u, last).hi};
  return all.lo < all.hi ? all : Span{0, 0};
}
template <class T>
LMFAST_INLINE const T* row_of(const AttentionTensor& x, int64_t b, int64_t head, int64_t row) {
  return static_cast<const T*>(x.data) + b * x.batch + head * x.head + row * x.row;
}
template <class T>
LMFAST_INLINE T* mutable_row_of(const AttentionTensor& x, int64_t b, int64_t head, int64_t row) {
  return const_cast<T*>(row_of<T>(x, b, head, row));
}

template <class T>
LMFAST_INLINE void to_float_row(const T* in, int64_t n, float* out) {
  constexpr int W = VecF::kWidth;
  int64_t i = 0;
  for (; i + W <= n; i += W) VecF::load(in + i).store(out + i);
  if (i < n) VecF::load(in + i, static_cast<int>(n - i)).store(out + i, static_cast<int>(n - i));
}

LMFAST_INLINE bool has_score_options(const AttentionArgs& a) {
  // A scale that is not positive would turn the largest product into the smallest score, and next
  // to a very small one products may be larger than any limit. Sinks are compared with scores.
  return a.softcap > 0.0f || a.alibi != nullptr || a.mask_kind != MaskKind::kNone ||
         a.sinks != nullptr || !(a.scale > 1e-30f);
}

// What a score's distance to its row's reference value m is multiplied by for an exponent of 2.
// Without options scores are the products alone. As one multiply-add, s * unit - m * unit, the
// exponent of the largest score would not be 0 but a rounding error, and so would the error of a
// probability near 1; and a finite mask of 3e38 would overflow.
LMFAST_INLINE float exponent_unit(const AttentionArgs& a) {
  return has_score_options(a) ? kLog2e : a.scale * kLog2e;
}

// Keeps what the backward needs of a row.
LMFAST_INLINE void keep_sums(const AttentionArgs& a, int64_t row, float m, float sum) {
  if (a.sum == nullptr) return;
  const bool empty = sum == 0.0f;
  a.reference[row] = empty ? kInfinity : m;
  a.sum[row] = empty ? 1.0f : sum;
}

// What the mask adds to a score; -inf hides the key. `lowest` is the lowest number but one: what
// lies below it hides. NaN shows, and makes the score NaN.
template <class T>
LMFAST_INLINE void added_row(const void* mask, int64_t at, int64_t stride, int n, float lowest,
                             float* out) {
  constexpr int W = VecF::kWidth;
  const T* p = static_cast<const T*>(mask) + at;
  const VecF limit = VecF::set1(lowest), hidden = VecF::set1(-kInfinity);
  for (int i = 0; i < n; i += W) {
    T lanes[W] = {};
    const int count = n - i < W ? n - i : W;
    if (stride != 1) {
      for (int j = 0; j < count; ++j) lanes[j] = p[(i + j) * stride];
    }
    const VecF x = VecF::load(stride == 1 ? p + i : lanes, count);
    select_less(x, limit, hidden, x).store(out + i, count);
  }
}
// The same for n keys of one row of any mask, from element `at` on.
inline __attribute__((noinline)) void mask_row(const AttentionArgs& a, int64_t at, int n,
                                               float* out) {
  const int64_t stride = a.mask_stride[3];
  switch (a.mask_kind) {
    case MaskKind::kBool: {
      const uint8_t* p = static_cast<const uint8_t*>(a.mask) + at;
      for (int i = 0; i < n; ++i) out[i] = p[i * stride] != 0 ? 0.0f : -kInfinity;
      break;
    }
    case MaskKind::kF32:
      added_row<float>(a.mask, at, stride, n, -3.40282326e38f, out);
      break;
    case MaskKind::kBF16:
      added_row<bf16>(a.mask, at, stride, n, -3.37623949e38f, out);
      break;
    case MaskKind::kF16:
      added_row<f16>(a.mask, at, stride, n, -65472.0f, out);
      break;
    case MaskKind::kNone:
      break;
  }
}

// The score with what mask_row gave for it added.
LMFAST_INLINE VecF add_mask(VecF score, VecF added) {
  return select_less(added, VecF::set1(kLowest), VecF::set1(-kInfinity), score + added);
}

}  // namespace
}  // namespace lmfast::LMFAST_ISA
