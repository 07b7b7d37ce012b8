// The gradients that the AMX passes of linear_cross_entropy leave in their accumulators, [column of
// hidden or weight][lane], as rows of hidden and weight; the targets' share is added here. For
// kernels only.
#pragma once

#include "linear_cross_entropy_amx_pack.h"

#if defined(__AMX_TILE__)

namespace lmfast::LMFAST_ISA {
namespace {

template <class W>
void gather_target_rows(const LceAmxArgs& a, int64_t begin, int64_t end) {
  const int64_t past = smaller(end, a.p.width), row = a.p.weight_row_stride;
  float* out = const_cast<float*>(a.target_rows);
  for (int64_t n = 0; n < a.padded_tokens; ++n) {
    for (int64_t e = begin; n >= a.p.tokens && e < past; ++e) out[e * a.padded_tokens + n] = 0.0f;
  }
  if (a.p.weight_column_stride == 1) {
    for (int64_t n = 0; n < a.p.tokens; ++n) {
      const W* w = static_cast<const W*>(a.p.weight) + a.p.target[n] * row;
      for (int64_t e = begin; e < past; e += 16) {
        const int count = lanes_of(past - e);
        float values[16];
        VecF::load(w + e, count).store(values);
        for (int i = 0; i < count; ++i) out[(e + i) * a.padded_tokens + n] = values[i];
      }
    }
    return;
  }
  for (int64_t e = begin; e < past; ++e) {
    const W* w = static_cast<const W*>(a.p.weight) + e * a.p.weight_column_stride;
    for (int64_t n = 0; n < a.p.tokens; ++n) {
      VecF::load(w + a.p.target[n], 1).store(out + e * a.padded_tokens + n, 1);
    }
  }
}

template <class H>
void store_dhidden(const LceAmxArgs& a, int64_t group, const float* acc, const float* coefficient) {
  const LceProblem& p = a.p;
  for (int64_t j = 0; j < 4; ++j) {
    const int64_t first = group * kLceLanes + 16 * j;
    const int64_t count = smaller(kTileRows, p.tokens - first);
    if (count <= 0) return;
    const VecF factor = VecF::load(coefficient + 16 * j);
    const VecF target = VecF::load(a.target_gradient + first, lanes_of(count));
    for (int64_t e = 0; e < p.width; e += 16) {
      __m512i t[16];
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i) {
        const VecF row = e + i < p.width
                             ? VecF::load(a.target_rows + (e + i) * a.padded_tokens + first)
                             : VecF::zero();
        const VecF sum = VecF::load(acc + (e + i) * kLceLanes + 16 * j);
        t[i] = _mm512_castps_si512(fmadd(sum, factor, row * target).v);
      }
      transpose_words(t);
      const int n = lanes_of(p.width - e);
      for (int64_t i = 0; i < count; ++i) {
        VecF grad = {_mm512_castsi512_ps(t[i])};
        if (p.mean_weight != nullptr) {
          grad = fmadd(VecF::set1(-p.scale[first + i] * p.smoothing),
                       VecF::load(p.mean_weight + e, n), grad);
        }
        grad.store(static_cast<H*>(p.dhidden) + p.row[first + i] * p.width + e, n);
      }
    }
  }
}

// What the targets among a group's classes add, before the accumulator is multiplied by `shared`.
template <class H>
void add_targets(const LceAmxArgs& a, int64_t group, float shared, float* acc) {
  for (int64_t i = a.group_begin[group]; i < a.group_begin[group + 1]; ++i) {
    const int64_t token = a.by_group[i], lane = a.p.target[token] - group * kLceLanes;
    const float grad = a.target_gradient[token] / shared;
    const H* h = static_cast<const H*>(a.p.hidden) + a.p.row[token] * a.p.hidden_stride;
    for (int64_t e = 0; e < a.p.width; e += 16) {
      const int n = lanes_of(a.p.width - e);
      float values[16];
      VecF::load(h + e, n).store(values);
      for (int j = 0; j < n; ++j) acc[(e + j) * kLceLanes + lane] += grad * values[j];
    }
    if (a.dbias != nullptr) acc[(a.out_tiles - 2) * kTileRows * kLceLanes + lane] += grad;
  }
}

template <class W>
void store_dweight(const LceAmxArgs& a, int64_t group, float shared, const float* acc) {
  const int64_t width = a.p.width;
  const VecF factor = VecF::set1(shared);
  for (int64_t j = 0; j < 4; ++j) {
    const int64_t first = group * kLceLanes + 16 * j;
    const int64_t count = smaller(kTileRows, a.p.classes - first);
    if (count <= 0) return;
    W* out = static_cast<W*>(a.dweight) + first * a.dweight_row_stride;
    if (a.dweight_column_stride != 1) {
      for (int64_t e = 0; e < width; ++e) {
        const VecF uniform = VecF::set1(a.uniform != nullptr ? a.uniform[e] : 0.0f);
        fmadd(VecF::load(acc + e * kLceLanes + 16 * j), factor, uniform)
            .store(out + e * a.dweight_column_stride, lanes_of(count));
      }
      continue;
    }
    for (int64_t e = 0; e < width; e += 16) {
      __m512i t[16];
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i) {
        t[i] = _mm512_loadu_si512(acc + (e + i) * kLceLanes + 16 * j);
      }
      transpose_words(t);
      const int n = lanes_of(width - e);
      const VecF uniform = a.uniform != nullptr ? VecF::load(a.uniform + e, n) : VecF::zero();
      for (int64_t i = 0; i < count; ++i) {
        fmadd({_mm512_castsi512_ps(t[i])}, factor, uniform)
            .store(out + i * a.dweight_row_stride + e, n);
      }
    }
  }
}

}  // namespace
}  // namespace lmfast::LMFAST_ISA

#endif
