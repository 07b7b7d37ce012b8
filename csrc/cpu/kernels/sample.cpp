// Drawing a token from a row of logits: bias, penalties, temperature, top-k, top-p, min-p, typical.
//
// Floor: reading the logits once; a row of 50 k in fp32 is 200 KB, 6 us at 33 GB/s, less from L2.
// Everything else works on the row while it is in L2: a pass for the maximum, one for the
// exponentials, about 1.3 for each filter's threshold (sample_select.h) and one that packs the
// survivors, of which there are few after top-k. Nothing is sorted. Ids keep their order, so the
// draw is the same as the reference's: the first id at which the cumulated weight passes u * total.
// Sums are kept in lanes for 64 vectors at most and then added in double.
#include "sample.h"

#include "../simd.h"
#include "sample_select.h"

namespace lmfast::LMFAST_ISA {
namespace {

// The first n lanes of x, `other` in the rest.
template <class V>
LMFAST_INLINE V lanes_or(V x, int64_t n, double other) {
  typename V::scalar values[V::kWidth];
  x.store(values);
  for (int64_t i = n; i < V::kWidth; ++i) values[i] = static_cast<typename V::scalar>(other);
  return V::load(values);
}

// A row's tokens that are still possible, in order of ids.
template <class A>
struct Row {
  A* scores;
  A* weights;
  int32_t* ids;  // null: token i is id i
  int64_t n;
};

// Keeps tokens with key > threshold, and those with key == threshold that tie(i) takes, asked in
// order of ids. `keys` may be the row's scores or weights.
template <class A, class Tie>
LMFAST_INLINE void pack(Row<A>& row, const A* keys, A threshold, const Tie& tie, A* scores,
                        bool with_weights, int32_t* ids) {
  int64_t count = 0, i = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    const __m512 limit = _mm512_set1_ps(threshold);
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; i + 16 <= row.n; i += 16) {
      const __m512 key = _mm512_loadu_ps(keys + i);
      __mmask16 keep = _mm512_cmp_ps_mask(key, limit, _CMP_GT_OQ);
      unsigned equal = _mm512_cmp_ps_mask(key, limit, _CMP_EQ_OQ);
      for (; equal != 0; equal &= equal - 1) {
        if (!tie(i + __builtin_ctz(equal))) break;  // nor the ones behind it
        keep = __mmask16(keep | (equal & (0u - equal)));
      }
      if (keep == 0) continue;
      const __m512i id = row.ids == nullptr
                             ? _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int32_t>(i)))
                             : _mm512_loadu_si512(row.ids + i);
      const __m512 score = _mm512_loadu_ps(row.scores + i);
      if (with_weights) {
        const __m512 w = _mm512_loadu_ps(row.weights + i);
        _mm512_storeu_ps(row.weights + count, _mm512_maskz_compress_ps(keep, w));
      }
      _mm512_storeu_ps(scores + count, _mm512_maskz_compress_ps(keep, score));
      _mm512_storeu_si512(ids + count, _mm512_maskz_compress_epi32(keep, id));
      count += __builtin_popcount(keep);
    }
  }
#endif
  for (; i < row.n; ++i) {
    const A key = keys[i];
    if (!(key > threshold) && !(key == threshold && tie(i))) continue;
    ids[count] = row.ids == nullptr ? static_cast<int32_t>(i) : row.ids[i];
    if (with_weights) row.weights[count] = row.weights[i];
    scores[count++] = row.scores[i];
  }
  row.scores = scores;
  row.ids = ids;
  row.n = count;
}

// Sum of an array.
template <class A>
LMFAST_INLINE double sum_of(const A* x, int64_t n) {
  using V = VecOf<A>;
  constexpr int64_t kBlock = 64 * V::kWidth;
  double total = 0.0;
  for (int64_t b = 0; b < n; b += kBlock) {
    const int64_t end = b + kBlock < n ? b + kBlock : n;
    V sums = V::zero();
    int64_t i = b;
    for (; i + V::kWidth <= end; i += V::kWidth) sums = sums + V::load(x + i);
    if (i < end) sums = sums + V::load(x + i, static_cast<int>(end - i));
    total += static_cast<double>(sum(sums));
  }
  return total;
}

// weights = exp((scores - largest) / temperature); their sum.
template <class A>
LMFAST_INLINE double exponentials(Row<A>& row, A largest, double temperature) {
  using V = VecOf<A>;
  const V center = V::set1(largest), factor = V::set1(static_cast<A>(1.0 / temperature));
  int64_t i = 0;
  for (; i + V::kWidth <= row.n; i += V::kWidth) {
    exp((V::load(row.scores + i) - center) * factor).store(row.weights + i);
  }
  if (i < row.n) {
    const int rest = static_cast<int>(row.n - i);
    exp((V::load(row.scores + i, rest) - center) * factor).store(row.weights + i, rest);
  }
  return sum_of(row.weights, row.n);
}

// Keeps the smallest number of tokens with the largest keys that together reach the target.
template <class A>
LMFAST_INLINE double keep_mass(Row<A>& row, const A* keys, double total, double target,
                               const SelectBuffers<A>& buffers, A* scores, int32_t* ids) {
  const Crossing<A> found = find_crossing<A>(keys, row.weights, row.n, total, target, buffers);
  if (found.threshold == -static_cast<A>(INFINITY)) return total;
  double mass = found.above;
  const A* weights = row.weights;
  const auto tie = [&](int64_t i) {
    if (mass >= target) return false;
    mass += static_cast<double>(weights[i]);
    return true;
  };
  pack(row, keys, found.threshold, tie, scores, true, ids);
  return sum_of(row.weights, row.n);
}

// keys = -|-log p - entropy|: largest where the surprise is nearest to the entropy.
template <class A>
void surprises(const Row<A>& row, A* keys, A largest, double temperature, double total) {
  using V = VecOf<A>;
  constexpr int64_t kBlock = 64 * V::kWidth;
  const V center = V::set1(largest), factor = V::set1(static_cast<A>(1.0 / temperature));
  const V least = V::set1(static_cast<A>(-1e30));  // of -inf, whose weight is 0: not 0 * inf
  double mean = 0.0;                               // of log p + log(total)
  for (int64_t b = 0; b < row.n; b += kBlock) {
    const int64_t end = b + kBlock < row.n ? b + kBlock : row.n;
    V sums = V::zero();
    for (int64_t i = b; i < end; i += V::kWidth) {
      const int n = static_cast<int>(end - i < V::kWidth ? end - i : V::kWidth);
      const bool whole = n == V::kWidth;
      const V s = whole ? V::load(row.scores + i) : V::load(row.scores + i, n);
      const V w = whole ? V::load(row.weights + i) : V::load(row.weights + i, n);
      const V x = max((s - center) * factor, least);
      sums = fmadd(w, x, sums);
      whole ? x.store(keys + i) : x.store(keys + i, n);
    }
    mean += static_cast<double>(sum(sums));
  }
  const V middle = V::set1(static_cast<A>(mean / total));
  for (int64_t i = 0; i < row.n; i += V::kWidth) {
    const int n = static_cast<int>(row.n - i < V::kWidth ? row.n - i : V::kWidth);
    const bool whole = n == V::kWidth;
    const V d = (whole ? V::load(keys + i) : V::load(keys + i, n)) - middle;
    const V key = min(d, V::zero() - d);
    whole ? key.store(keys + i) : key.store(keys + i, n);
  }
}

// The penalties, where a token was seen; most blocks of 16 ids have none.
template <class A>
void penalise(const SampleArgs& a, int64_t r, const double* settings, A* scores) {
  const int64_t n = a.classes;
  const int32_t* counts = a.counts == nullptr ? nullptr : a.counts + r * n;
  const uint8_t* mask = a.prompt_mask == nullptr ? nullptr : a.prompt_mask + r * n;
  const A frequency = static_cast<A>(settings[kFrequencyPenalty]);
  const A presence = static_cast<A>(settings[kPresencePenalty]);
  const A repetition = static_cast<A>(settings[kRepetitionPenalty]);
  for (int64_t b = 0; b < n; b += 16) {
    const int64_t end = b + 16 < n ? b + 16 : n;
    int32_t any = 0;
    if (counts != nullptr) {
      for (int64_t i = b; i < end; ++i) any |= counts[i];
    }
    if (mask != nullptr) {
      for (int64_t i = b; i < end; ++i) any |= mask[i];
    }
    if (any == 0) continue;
    for (int64_t i = b; i < end; ++i) {
      const int32_t count = counts == nullptr ? 0 : counts[i];
      A s = scores[i];
      if (count > 0) s = (s - frequency * static_cast<A>(count)) - presence;
      if (count > 0 || (mask != nullptr && mask[i] != 0)) {
        s = s > A(0) ? s / repetition : s * repetition;
      }
      scores[i] = s;
    }
  }
}

template <class T>
void draw_row(const SampleArgs& a, int64_t r) {
  using V = VecOf<T>;
  using A = AccOf<T>;
  const int64_t size = a.classes, room = size + 64;
  const double* settings = a.settings + r * a.settings_stride;
  A* memory = static_cast<A*>(a.scratch);
  A* scores = memory;
  const SelectBuffers<A> buffers{{memory + 2 * room, memory + 3 * room},
                                 {memory + 4 * room, memory + 5 * room}};
  A* keys = memory + 6 * room;  // of the typical filter
  int32_t* ids = reinterpret_cast<int32_t*>(memory + 7 * room);
  const T* x = static_cast<const T*>(a.logits) + r * a.stride;
  const A* bias = a.bias == nullptr ? nullptr : static_cast<const A*>(a.bias) + r * a.bias_stride;

  for (int64_t i = 0; i < size; i += V::kWidth) {
    const int n = static_cast<int>(size - i < V::kWidth ? size - i : V::kWidth);
    V v = n == V::kWidth ? V::load(x + i) : V::load(x + i, n);
    if (bias != nullptr) v = v + (n == V::kWidth ? V::load(bias + i) : V::load(bias + i, n));
    n == V::kWidth ? v.store(scores + i) : v.store(scores + i, n);
  }
  if (a.counts != nullptr || a.prompt_mask != nullptr) penalise(a, r, settings, scores);
  for (int64_t i = 0; i < a.suppress_count; ++i) {
    scores[a.suppress[i]] = -static_cast<A>(INFINITY);
  }

  // NaN and +inf times 0 are NaN; -inf is possible and taken for the smallest number.
  V most = V::set1(-static_cast<A>(INFINITY)), bad = V::zero();
  const V smallest = V::set1(sizeof(A) == 4 ? static_cast<A>(-3.402823466e38)
                                            : static_cast<A>(-1.7976931348623157e308));
  for (int64_t i = 0; i < size; i += V::kWidth) {
    const int64_t n = size - i;
    const V v = n >= V::kWidth ? V::load(scores + i)
                               : lanes_or(V::load(scores + i, static_cast<int>(n)), n, -INFINITY);
    most = max(v, most);
    bad = fmadd(max(smallest, v), V::zero(), bad);  // max returns its second operand when NaN
  }
  const A largest = hmax(most);
  const double wrong = static_cast<double>(sum(bad));
  if (wrong != 0.0 || !(largest > -static_cast<A>(INFINITY))) {
    a.ids[r] = -1;
    return;
  }

  Row<A> row{scores, memory + room, nullptr, size};
  const int64_t k =
      settings[kTopK] < static_cast<double>(size) ? static_cast<int64_t>(settings[kTopK]) : 0;
  if (k == 1) {
    int64_t i = 0;
    while (scores[i] != largest) ++i;
    a.ids[r] = i;
    if (a.log_probs != nullptr) static_cast<A*>(a.log_probs)[r] = A(0);
    return;
  }
  if (k > 0) {
    const Crossing<A> found = find_crossing<A>(scores, nullptr, size, static_cast<double>(size),
                                               static_cast<double>(k), buffers);
    int64_t ties = k - static_cast<int64_t>(found.above);
    pack(row, scores, found.threshold, [&](int64_t) { return ties-- > 0; }, scores, false, ids);
  }
  const double temperature = settings[kTemperature];
  double total = exponentials(row, largest, temperature);
  if (settings[kTopP] < 1.0) {
    total = keep_mass(row, row.scores, total, settings[kTopP] * total, buffers, scores, ids);
  }
  if (settings[kMinP] > 0.0) {
    const A least = static_cast<A>(settings[kMinP]);
    pack(row, row.weights, least, [](int64_t) { return true; }, scores, true, ids);
    total = sum_of(row.weights, row.n);
  }
  if (settings[kTypicalP] < 1.0) {
    surprises(row, keys, largest, temperature, total);
    total = keep_mass(row, keys, total, settings[kTypicalP] * total, buffers, scores, ids);
  }

  constexpr int64_t kBlock = 64 * V::kWidth;
  const double target = a.uniform[r] * total;
  double before = 0.0;
  int64_t found = -1;
  for (int64_t b = 0; b < row.n && found < 0; b += kBlock) {
    const int64_t end = b + kBlock < row.n ? b + kBlock : row.n;
    const double mass = sum_of(row.weights + b, end - b);
    // The block's own sum may round differently from its tokens one by one: such a block is looked
    // into as well, and the next one if nothing is found.
    if (before + mass * (1.0 + 1e-6) < target && end < row.n) {
      before += mass;
      continue;
    }
    double passed = before;
    for (int64_t i = b; i < end; ++i) {
      if (!(row.weights[i] > A(0))) continue;
      passed += static_cast<double>(row.weights[i]);
      if (passed > target) {
        found = i;
        break;
      }
    }
    before += mass;
  }
  if (found < 0) {  // u * total rounded up to the total
    found = row.n - 1;
    while (found > 0 && !(row.weights[found] > A(0))) --found;
  }
  a.ids[r] = row.ids == nullptr ? found : row.ids[found];
  if (a.log_probs != nullptr) {
    static_cast<A*>(a.log_probs)[r] = static_cast<A>(
        (static_cast<double>(row.scores[found]) - largest) / temperature - ::log(total));
  }
}

}  // namespace

void sample_rows(const SampleArgs& a, int64_t begin, int64_t end) {
  LMFAST_DISPATCH_DTYPE(a.dtype, scalar_t, {
    for (int64_t r = begin; r < end; ++r) draw_row<scalar_t>(a, r);
  })
}

}  // namespace lmfast::LMFAST_ISA
