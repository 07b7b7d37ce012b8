// Additive attention, backward.
//
// With w the weights and dw_ts = dcontext_t . values_s (+ what reaches the weights themselves),
// ds_ts = w_ts (dw_ts - sum_s w_ts dw_ts); with y = tanh(q_t + k_s) computed again,
// dq_t = v sum_s ds_ts (1 - y^2), dk_s = v sum_t ds_ts (1 - y^2), dv = sum_ts ds_ts y, and
// dvalues_s = sum_t w_ts dcontext_t.
//
// Floor: B T S A evaluations of tanh, as the forward; saving y instead would write and read 4 bytes
// for each, which takes longer. v leaves the sums, so an element costs tanh and five more
// operations. dk and dv stay in registers over the queries, dq is added to once per four keys.
// Sums are in blocks of 64 terms. A sequence's keys are split into as many parts as the shape
// says, whatever the number of threads, so it does not change the result.
#include "../simd_tanh.h"
#include "additive_attention_sums.h"

namespace lmfast::LMFAST_ISA {
namespace {

// dots[i] = row . rows[first + i] for i < N.
template <class T, int N>
LMFAST_INLINE void dot_rows(const T* row, const Rows<T>& rows, int64_t first, int64_t width,
                            float* dots) {
  constexpr int W = VecF::kWidth;
  VecF sums[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) sums[i] = VecF::zero();
  for (int64_t d = 0; d < width; d += W) {
    const int lanes = static_cast<int>(width - d < W ? width - d : W);
    const VecF x = load_part<1>(row + d, lanes);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      sums[i] = fmadd(x, load_part<1>(rows[first + i] + d, lanes), sums[i]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) dots[i] = sum(sums[i]);
}

template <class T>
void score_gradients(const AdditiveAttentionArgs& a, int64_t b, int64_t t) {
  const int64_t n = list_visible(a, b, 0, a.keys, a.visible), row = (b * a.queries + t) * a.keys;
  const T* dc = static_cast<const T*>(a.dcontext) + b * a.dcontext_batch + t * a.dcontext_row;
  const Rows<T> values{static_cast<const T*>(a.value) + b * a.value_batch, a.value_row, a.visible};
  const float* w = a.weights + row;
  float* ds = a.dscores + row;
  if (n < a.keys) memset(ds, 0, sizeof(float) * static_cast<size_t>(a.keys));
  double mean = 0.0;
  for (int64_t i = 0; i < n; i += kTogether) {
    float dots[kTogether];
    const int64_t m = n - i < kTogether ? n - i : kTogether;
    if (m == kTogether) {
      dot_rows<T, kTogether>(dc, values, i, a.value_dim, dots);
    } else {
      for (int64_t k = 0; k < m; ++k) dot_rows<T, 1>(dc, values, i + k, a.value_dim, dots + k);
    }
    for (int64_t k = 0; k < m; ++k) {
      const int32_t s = a.visible[i + k];
      const float dw = dots[k] + (a.dweights == nullptr ? 0.0f : a.dweights[row + s]);
      ds[s] = dw;
      mean += static_cast<double>(w[s]) * dw;
    }
  }
  const float center = static_cast<float>(mean);
  for (int64_t i = 0; i < n; ++i) {
    const int32_t s = a.visible[i];
    ds[s] = w[s] * (ds[s] - center);
  }
}

// One vector of the score dimension, N keys, queries [t0, t1): adds to dq, dk and dv, all without
// their factor v.
template <class T, int N>
LMFAST_INLINE void through_tanh(const float* q, const float* ds, int64_t keys, int64_t width,
                                const int32_t* key, const T* const* k, int64_t t0, int64_t t1,
                                int lanes, float* dq, VecF* dk, VecF& dv) {
  VecF k_row[N], dk_part[N], dv_part = VecF::zero();
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    k_row[i] = load_part<1>(k[i], lanes);
    dk_part[i] = VecF::zero();
  }
  for (int64_t t = t0; t < t1; ++t) {
    const VecF query = load_part<1>(q + t * width, lanes);
    VecF total = VecF::zero();
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      const VecF y = TanhFor<T>::of(query + k_row[i]), g = VecF::set1(ds[t * keys + key[i]]),
                 gy = g * y;
      const VecF slope = fmadd(VecF::zero() - gy, y, g);
      dk_part[i] = dk_part[i] + slope;
      total = total + slope;
      dv_part = dv_part + gy;
    }
    float* p = dq + t * width;
    const VecF before = load_part<1>(p, lanes);
    lanes >= VecF::kWidth ? (before + total).store(p) : (before + total).store(p, lanes);
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) dk[i] = dk[i] + dk_part[i];
  dv = dv + dv_part;
}

// dk of N visible keys, and their part of dq (T, A) and dv (A).
template <class T, int N>
LMFAST_INLINE void key_gradients(const AdditiveAttentionArgs& a, int64_t b, const Rows<T>& keys,
                                 const int32_t* key, int64_t first, float* dq, float* dv) {
  constexpr int W = VecF::kWidth;
  const int64_t width = a.score_dim;
  const float* q = a.query + b * a.queries * width;
  const float* ds = a.dscores + b * a.queries * a.keys;
  T* out = static_cast<T*>(a.dkey) + b * a.keys * width;
  for (int64_t j = 0; j < width; j += W) {
    const int lanes = static_cast<int>(width - j < W ? width - j : W);
    const T* k[N];
    VecF dk[N], dv_sum = load_part<1>(dv + j, lanes);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      k[i] = keys[first + i] + j;
      dk[i] = VecF::zero();
    }
    for (int64_t t = 0; t < a.queries; t += kAdditiveKeyBlock) {
      const int64_t end = t + kAdditiveKeyBlock < a.queries ? t + kAdditiveKeyBlock : a.queries;
      through_tanh<T, N>(q + j, ds, a.keys, width, key, k, t, end, lanes, dq + j, dk, dv_sum);
    }
    const VecF v = load_part<1>(a.v + j, lanes);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) (dk[i] * v).store(out + key[i] * width + j, lanes);
    dv_sum.store(dv + j, lanes);
  }
}

// total += part, which becomes zero.
LMFAST_INLINE void move_into(float* total, float* part, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    total[i] += part[i];
    part[i] = 0.0f;
  }
}

template <class T>
void bwd_keys(const AdditiveAttentionArgs& a, int64_t b, int64_t begin, int64_t end, float* dq,
              float* dq_part, float* dv, float* dv_part) {
  const int64_t n = list_visible(a, b, begin, end, a.visible);
  const int64_t width = a.score_dim, size = a.queries * width;
  T* dkey = static_cast<T*>(a.dkey) + b * a.keys * width;
  T* dvalue = static_cast<T*>(a.dvalue) + b * a.keys * a.value_dim;
  if (n < end - begin) {
    memset(dkey + begin * width, 0, sizeof(T) * static_cast<size_t>((end - begin) * width));
    memset(dvalue + begin * a.value_dim, 0,
           sizeof(T) * static_cast<size_t>((end - begin) * a.value_dim));
  }
  const Rows<T> keys{static_cast<const T*>(a.key) + b * a.key_batch, a.key_row, a.visible};
  const Rows<T> dcontext{static_cast<const T*>(a.dcontext) + b * a.dcontext_batch, a.dcontext_row,
                         nullptr};
  const float* w = a.weights + b * a.queries * a.keys;
  for (int64_t i = 0; i < n; ++i) {
    T* out = dvalue + a.visible[i] * a.value_dim;
    weighted_rows<T, T, 1>(w + a.visible[i], 0, a.keys, nullptr, dcontext, a.queries, a.value_dim,
                           &out);
  }
  for (int64_t i = 0; i < n;) {
    if (n - i >= kTogether) {
      key_gradients<T, kTogether>(a, b, keys, a.visible + i, i, dq_part, dv_part);
      i += kTogether;
    } else {
      key_gradients<T, 1>(a, b, keys, a.visible + i, i, dq_part, dv_part);
      ++i;
    }
    if (i % kAdditiveKeyBlock == 0 || i == n) {
      move_into(dq, dq_part, size);
      move_into(dv, dv_part, width);
    }
  }
}

template <class T>
void bwd_units(const AdditiveAttentionArgs& a, int64_t begin, int64_t end) {
  const int64_t width = a.score_dim, size = a.queries * width;
  float *dq_part = a.scratch, *dv_part = a.scratch + size;
  for (int64_t u = begin; u < end; ++u) {
    const int64_t b = u / a.blocks, block = u % a.blocks;
    float *dq = a.dquery + u * size, *dv = a.dv + u * width;
    memset(dq, 0, sizeof(float) * static_cast<size_t>(size));
    memset(dv, 0, sizeof(float) * static_cast<size_t>(width));
    memset(a.scratch, 0, sizeof(float) * static_cast<size_t>(size + width));
    bwd_keys<T>(a, b, a.keys * block / a.blocks, a.keys * (block + 1) / a.blocks, dq, dq_part, dv,
                dv_part);
    for (int64_t t = 0; t < a.queries; ++t) {
      for (int64_t j = 0; j < width; ++j) dq[t * width + j] *= a.v[j];
    }
  }
}

template <class T>
void bwd_score_units(const AdditiveAttentionArgs& a, int64_t begin, int64_t end) {
  for (int64_t u = begin; u < end; ++u) score_gradients<T>(a, u / a.queries, u % a.queries);
}

}  // namespace

void additive_attention_bwd_scores(const AdditiveAttentionArgs& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::kF32:
      return bwd_score_units<float>(a, begin, end);
    case DType::kBF16:
      return bwd_score_units<bf16>(a, begin, end);
    case DType::kF16:
      return bwd_score_units<f16>(a, begin, end);
    case DType::kF64:
      return;
  }
}

void additive_attention_bwd(const AdditiveAttentionArgs& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::kF32:
      return bwd_units<float>(a, begin, end);
    case DType::kBF16:
      return bwd_units<bf16>(a, begin, end);
    case DType::kF16:
      return bwd_units<f16>(a, begin, end);
    case DType::kF64:
      return;
  }
}

}  // namespace lmfast::LMFAST_ISA
