// Where a sorted row would pass a mass, without sorting it. For sample.cpp only.
//
// Weighted quickselect: the threshold is bracketed by two of 64 sampled keys, one pass adds up what
// lies above the bracket and packs what lies in it, which is a fifth of the row, and so on. A row
// of n costs about 1.3 n however its weights lie; a full sort costs n log n with mispredictions, a
// histogram n scattered additions of 1.5 ns each.
#pragma once

#include "../simd.h"

namespace lmfast::LMFAST_ISA {
namespace {

// threshold: the key at which the mass, counted from the largest key down, reaches the target.
// above: mass of the larger keys, which is less than the target.
template <class A>
struct Crossing {
  A threshold;
  double above;
};

// Four arrays to pack into, each as long as the row and a vector more.
template <class A>
struct SelectBuffers {
  A* keys[2];
  A* weights[2];
};

struct Bracketed {
  double above, inside;
  int64_t count;  // of those inside
};

// Adds up weights (ones where null) of keys > hi, and packs keys in [lo, hi] with theirs; without
// lo or hi themselves where the end is open.
template <bool kOpenLow, bool kOpenHigh, class A>
LMFAST_INLINE Bracketed bracket(const A* keys, const A* weights, int64_t n, A lo, A hi, A* out_keys,
                                A* out_weights) {
  double above = 0.0, inside = 0.0;
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const A key = keys[i], w = weights == nullptr ? A(1) : weights[i];
    const bool over = kOpenHigh ? key >= hi : key > hi;
    const bool in = (kOpenLow ? key > lo : key >= lo) && !over;
    above += over ? w : A(0);
    inside += in ? w : A(0);
    out_keys[count] = key;
    out_weights[count] = w;
    count += in;
  }
  return {above, inside, count};
}

#if defined(__AVX512F__)
template <bool kOpenLow, bool kOpenHigh>
LMFAST_INLINE Bracketed bracket(const float* keys, const float* weights, int64_t n, float lo,
                                float hi, float* out_keys, float* out_weights) {
  constexpr int64_t kBlock = 16 * 64;  // sums of so many are finished before they are added
  const __m512 low = _mm512_set1_ps(lo), high = _mm512_set1_ps(hi), one = _mm512_set1_ps(1.0f);
  double above = 0.0, inside = 0.0;
  int64_t count = 0;
  for (int64_t b = 0; b < n; b += kBlock) {
    const int64_t end = b + kBlock < n ? b + kBlock : n;
    __m512 sum_above = _mm512_setzero_ps(), sum_inside = _mm512_setzero_ps();
    for (int64_t i = b; i < end; i += 16) {
      const __mmask16 lanes = end - i >= 16 ? __mmask16(0xffff) : __mmask16((1u << (end - i)) - 1);
      const __m512 key = _mm512_maskz_loadu_ps(lanes, keys + i);
      const __m512 w = weights == nullptr ? one : _mm512_maskz_loadu_ps(lanes, weights + i);
      const __mmask16 over =
          _mm512_mask_cmp_ps_mask(lanes, key, high, kOpenHigh ? _CMP_GE_OQ : _CMP_GT_OQ);
      const __mmask16 from =
          _mm512_mask_cmp_ps_mask(lanes, key, low, kOpenLow ? _CMP_GT_OQ : _CMP_GE_OQ);
      const __mmask16 in = __mmask16(from & ~over);
      sum_above = _mm512_mask_add_ps(sum_above, over, sum_above, w);
      if (in == 0) continue;
      sum_inside = _mm512_mask_add_ps(sum_inside, in, sum_inside, w);
      _mm512_storeu_ps(out_keys + count, _mm512_maskz_compress_ps(in, key));
      _mm512_storeu_ps(out_weights + count, _mm512_maskz_compress_ps(in, w));
      count += __builtin_popcount(in);
    }
    above += static_cast<double>(_mm512_reduce_add_ps(sum_above));
    inside += static_cast<double>(_mm512_reduce_add_ps(sum_inside));
  }
  return {above, inside, count};
}
#endif

// Sorts few keys, largest first, with their weights.
template <class A>
LMFAST_INLINE void sort_few(A* keys, A* weights, int64_t n) {
  for (int64_t i = 1; i < n; ++i) {
    const A key = keys[i], w = weights[i];
    int64_t j = i;
    for (; j > 0 && keys[j - 1] < key; --j) {
      keys[j] = keys[j - 1];
      weights[j] = weights[j - 1];
    }
    keys[j] = key;
    weights[j] = w;
  }
}

// `total`: of all weights, the number of keys where weights is null. 0 < target.
template <class A>
Crossing<A> find_crossing(const A* keys, const A* weights, int64_t n, double total, double target,
                          const SelectBuffers<A>& buffers) {
  constexpr int64_t kSample = 64, kMargin = 6;
  const A infinity = static_cast<A>(INFINITY);
  const Crossing<A> everything{-infinity, 0.0};
  double base = 0.0;  // mass of the keys known to be above
  int into = 0;
  A few_keys[kSample], few_weights[kSample];
  for (;;) {
    if (n == 0) return everything;
    const int64_t m = n < kSample ? n : kSample;
    double sampled = 0.0;
    for (int64_t i = 0; i < m; ++i) {
      const int64_t at = i * n / m;
      few_keys[i] = keys[at];
      few_weights[i] = weights == nullptr ? A(1) : weights[at];
      sampled += few_weights[i];
    }
    sort_few(few_keys, few_weights, m);
    if (n <= kSample) {
      double mass = base, greater = base;
      for (int64_t i = 0; i < n; ++i) {
        if (i > 0 && few_keys[i] != few_keys[i - 1]) greater = mass;
        mass += few_weights[i];
        if (mass >= target) return {few_keys[i], greater};
      }
      return everything;  // the sums differ in their last digits: no token is left out
    }
    const double share = total > 0.0 ? (target - base) / total : 0.0;
    int64_t q = 0;
    double mass = few_weights[0];
    while (q + 1 < m && mass < share * sampled) mass += few_weights[++q];
    A hi = q >= kMargin ? few_keys[q - kMargin] : infinity;
    A lo = q + kMargin < m ? few_keys[q + kMargin] : -infinity;
    if (hi == infinity && lo == -infinity) hi = lo = few_keys[q];
    A* out_keys = buffers.keys[into];
    A* out_weights = buffers.weights[into];
    into ^= 1;
    Bracketed found = bracket<false, false>(keys, weights, n, lo, hi, out_keys, out_weights);
    if (found.count == n && lo != hi) {  // nothing gained: one key parts the rest for certain
      hi = lo = few_keys[q];
      found = bracket<false, false>(keys, weights, n, lo, hi, out_keys, out_weights);
    }
    if (target <= base + found.above) {
      total = found.above;
      found = bracket<true, false>(keys, weights, n, hi, infinity, out_keys, out_weights);
    } else if (target <= base + found.above + found.inside) {
      base += found.above;
      if (lo == hi) return {lo, base};
      total = found.inside;
    } else {
      base += found.above + found.inside;
      if (lo == -infinity) return everything;
      total -= found.above + found.inside;
      found = bracket<false, true>(keys, weights, n, -infinity, lo, out_keys, out_weights);
    }
    keys = out_keys;
    weights = out_weights;
    n = found.count;
  }
}

}  // namespace
}  // namespace lmfast::LMFAST_ISA
