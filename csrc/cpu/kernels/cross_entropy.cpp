// Cross-entropy of given logits, and its gradient, row by row.
//
// Floor: memory traffic, logits read once and dlogits written once. A row (128 KB at 32 k classes
// in fp32) is read three times, for the maximum, the sum of exponentials and the gradient, of which
// the last two come from L2. The gradient may overwrite the logits: a row is finished before its
// place is used. Short chains: sums of 32 vectors are finished before they are added.
#include "cross_entropy.h"

#include "../simd.h"

namespace lmfast::LMFAST_ISA {
namespace {

template <class T, class F>
LMFAST_INLINE void each_vector(int64_t begin, int64_t end, const F& f) {
  constexpr int W = VecOf<T>::kWidth;
  for (int64_t i = begin; i < end; i += W) f(i, static_cast<int>(end - i < W ? end - i : W));
}

// The first n lanes of x, `other` in the rest.
template <class V>
LMFAST_INLINE V lanes_or(V x, int n, double other) {
  typename V::scalar values[V::kWidth];
  x.store(values);
  for (int i = n; i < V::kWidth; ++i) values[i] = static_cast<typename V::scalar>(other);
  return V::load(values);
}

template <class T>
void row(const CrossEntropyArgs& a, int64_t r) {
  using V = VecOf<T>;
  using A = AccOf<T>;
  constexpr int64_t kBlock = 32 * V::kWidth;
  const int64_t target = a.targets[r], classes = a.classes;
  const T* x = static_cast<const T*>(a.logits) + r * a.stride;
  T* dx = a.dlogits == nullptr ? nullptr : static_cast<T*>(a.dlogits) + r * a.dstride;
  if (target == a.ignore_index) {
    a.loss[r] = 0.0;
    if (dx != nullptr) memset(dx, 0, sizeof(T) * static_cast<size_t>(classes));
    return;
  }
  V most = V::set1(-INFINITY);
  each_vector<T>(0, classes, [&](int64_t i, int n) {
    most = max(most, n == V::kWidth ? V::load(x + i) : lanes_or(V::load(x + i, n), n, -INFINITY));
  });
  // A row of -inf has no maximum to subtract; its sum is 0 and its loss NaN, as PyTorch's.
  const A largest = hmax(most);
  const V center = V::set1(largest);
  double sum_exp = 0.0, sum_below = 0.0;
  for (int64_t b = 0; b < classes; b += kBlock) {
    V exps = V::zero(), below = V::zero();
    each_vector<T>(b, b + kBlock < classes ? b + kBlock : classes, [&](int64_t i, int n) {
      const V v = n == V::kWidth ? V::load(x + i) : V::load(x + i, n);
      const V d = v - center, e = exp(d);
      exps = exps + (n == V::kWidth ? e : lanes_or(e, n, 0.0));
      below = below + (n == V::kWidth ? d : lanes_or(d, n, 0.0));
    });
    sum_exp += sum(exps);
    sum_below += sum(below);
  }
  A chosen_lane[V::kWidth];
  V::load(x + target, 1).store(chosen_lane);
  const double chosen = chosen_lane[0], log_sum = ::log(sum_exp), lse = largest + log_sum;
  double loss = (largest - chosen) + log_sum;
  // Apart, as infinite logits (classes masked out) times 0, or one minus another, would be NaN.
  if (a.smoothing > 0.0) {
    loss = (1.0 - a.smoothing) * loss +
           a.smoothing * (log_sum - sum_below / static_cast<double>(classes));
  }
  a.loss[r] = loss + a.z_loss * lse * lse;
  if (dx == nullptr) return;
  const double scale = a.scale[r], slope = 1.0 + 2.0 * a.z_loss * lse;
  const V factor = V::set1(static_cast<A>(scale * slope / sum_exp));
  const V share = V::set1(static_cast<A>(-scale * a.smoothing / classes));
  each_vector<T>(0, classes, [&](int64_t i, int n) {
    const V v = n == V::kWidth ? V::load(x + i) : V::load(x + i, n);
    const V grad = fmadd(exp(v - center), factor, share);
    n == V::kWidth ? grad.store(dx + i) : grad.store(dx + i, n);
  });
  const double prob = ::exp(chosen - largest) / sum_exp;
  const double grad = scale * (slope * prob - (1.0 - a.smoothing) - a.smoothing / classes);
  V::set1(static_cast<A>(grad)).store(dx + target, 1);
}

}  // namespace

void cross_entropy_rows(const CrossEntropyArgs& a, int64_t begin, int64_t end) {
  LMFAST_DISPATCH_DTYPE(a.dtype, scalar_t, {
    for (int64_t r = begin; r < end; ++r) row<scalar_t>(a, r);
  })
}

}  // namespace lmfast::LMFAST_ISA
