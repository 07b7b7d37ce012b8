// Additive attention, forward: score_ts = v . tanh(q_t + k_s), weights = softmax over the visible
// keys, context_t = sum_s weights_ts values_s, for queries and keys that are projected already.
//
// Floor: B T S A evaluations of tanh; the context adds one multiplication per value, keys and
// values are read once per 8 query rows. The (B, T, S, A) sums and their tanh, which plain PyTorch
// writes and reads again, exist in registers only. Scores of a row stay in L1, and since the
// weights are a result anyway, an online softmax would save nothing: maximum, exponentials and sum
// are S operations a row beside S A of tanh. Hidden keys are skipped, so padding costs no time and
// NaN in it has no effect.
#include "../simd_tanh.h"
#include "additive_attention_sums.h"

namespace lmfast::LMFAST_ISA {
namespace {

// Asks for the row at p + i. Never faults, so any row will do.
template <class T>
LMFAST_INLINE void prefetch(const T* p, int64_t i) {
  __builtin_prefetch(reinterpret_cast<const char*>(p + i));
}

// scores[i] = v . tanh(q + keys[first + i]) for i < N. Meanwhile the same rows of the values and
// the keys' next N, as far as `last`, are asked for: a decoder step with few queries waits for
// memory otherwise (64 sequences of 50 keys of 256 floats: 514 us on one core, 353 with it).
template <class T, int N>
LMFAST_INLINE void score_keys(const float* q, const float* v, const Rows<T>& keys, int64_t first,
                              int64_t width, const Rows<T>& values, int64_t last, float* scores) {
  constexpr int W = VecF::kWidth;
  const T *k[N], *next[N], *value[N];
  VecF sums[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    k[i] = keys[first + i];
    next[i] = keys[first + i + N < last ? first + i + N : last];
    value[i] = values[first + i];
    sums[i] = VecF::zero();
  }
  int64_t j = 0;
  for (; j + W <= width; j += W) {
    const VecF qj = VecF::load(q + j), vj = VecF::load(v + j);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      prefetch(next[i], j);
      prefetch(value[i], j);
      sums[i] = fmadd(vj, TanhFor<T>::of(qj + VecF::load(k[i] + j)), sums[i]);
    }
  }
  if (j < width) {  // lanes behind the end are 0 * tanh(0)
    const int n = static_cast<int>(width - j);
    const VecF qj = VecF::load(q + j, n), vj = VecF::load(v + j, n);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i)
      sums[i] = fmadd(vj, TanhFor<T>::of(qj + VecF::load(k[i] + j, n)), sums[i]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) scores[i] = sum(sums[i]);
}

// Scores of n > 0 keys to weights, in place; the row has room for whole vectors.
LMFAST_INLINE void softmax(float* row, int64_t n) {
  constexpr int W = VecF::kWidth;
  for (int64_t j = n; j % W != 0; ++j) row[j] = -INFINITY;
  VecF top = VecF::load(row);
  for (int64_t j = W; j < n; j += W) top = max(top, VecF::load(row + j));
  const VecF center = VecF::set1(hmax(top));
  VecF total = VecF::zero();
  for (int64_t j = 0; j < n; j += W) {
    const VecF e = exp(VecF::load(row + j) - center);
    e.store(row + j);
    total = total + e;
  }
  const VecF scale = VecF::set1(1.0f / sum(total));
  for (int64_t j = 0; j < n; j += W) (VecF::load(row + j) * scale).store(row + j);
}

template <class T>
void fwd_unit(const AdditiveAttentionArgs& a, int64_t b, int64_t t0, int64_t rows) {
  constexpr int W = VecF::kWidth;
  const int64_t n = list_visible(a, b, 0, a.keys, a.visible);
  const int64_t pitch = (a.keys + W - 1) / W * W;
  const float* q = a.query + (b * a.queries + t0) * a.score_dim;
  const Rows<T> keys{static_cast<const T*>(a.key) + b * a.key_batch, a.key_row, a.visible};
  const Rows<T> values{static_cast<const T*>(a.value) + b * a.value_batch, a.value_row, a.visible};
  int64_t s = 0;
  for (; s + kTogether <= n; s += kTogether) {
    for (int64_t r = 0; r < rows; ++r) {
      score_keys<T, kTogether>(q + r * a.score_dim, a.v, keys, s, a.score_dim, values, n - 1,
                               a.scratch + r * pitch + s);
    }
  }
  for (; s < n; ++s) {
    for (int64_t r = 0; r < rows; ++r) {
      score_keys<T, 1>(q + r * a.score_dim, a.v, keys, s, a.score_dim, values, n - 1,
                       a.scratch + r * pitch + s);
    }
  }
  T* out[kAdditiveRows];
  for (int64_t r = 0; r < rows; ++r) {
    float* row = a.scratch + r * pitch;
    float* weights = a.weights + (b * a.queries + t0 + r) * a.keys;
    out[r] = static_cast<T*>(a.context) + (b * a.queries + t0 + r) * a.value_dim;
    if (n > 0) softmax(row, n);
    if (n < a.keys) memset(weights, 0, sizeof(float) * static_cast<size_t>(a.keys));
    for (int64_t i = 0; i < n; ++i) weights[a.visible[i]] = row[i];
  }
  int64_t r = 0;
  for (; r + kTogether <= rows; r += kTogether) {
    weighted_rows<T, T, kTogether>(a.scratch + r * pitch, pitch, 1, nullptr, values, n, a.value_dim,
                                   out + r);
  }
  for (; r < rows; ++r) {
    weighted_rows<T, T, 1>(a.scratch + r * pitch, pitch, 1, nullptr, values, n, a.value_dim,
                           out + r);
  }
}

template <class T>
void fwd_units(const AdditiveAttentionArgs& a, int64_t begin, int64_t end) {
  const int64_t per_sequence = (a.queries + kAdditiveRows - 1) / kAdditiveRows;
  for (int64_t u = begin; u < end; ++u) {
    const int64_t t0 = u % per_sequence * kAdditiveRows, left = a.queries - t0;
    fwd_unit<T>(a, u / per_sequence, t0, left < kAdditiveRows ? left : kAdditiveRows);
  }
}

}  // namespace

void additive_attention_fwd(const AdditiveAttentionArgs& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::kF32:
      return fwd_units<float>(a, begin, end);
    case DType::kBF16:
      return fwd_units<bf16>(a, begin, end);
    case DType::kF16:
      return fwd_units<f16>(a, begin, end);
    case DType::kF64:
      return;
  }
}

}  // namespace lmfast::LMFAST_ISA
