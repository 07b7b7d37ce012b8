// Scores with query rows as rows and 64 keys as lanes: their options, and what a row does not see.
// For the backward and for decoding.
#pragma once

#include "attention_block.h"

namespace lmfast::LMFAST_ISA {
namespace {

// Products of rows [t, t + n) to scores with scale, softcap, ALiBi and mask applied. With a
// softcap, `slope` gets the derivative of the capped score.
inline __attribute__((noinline)) void apply_options_by_rows(const AttentionArgs& a, int64_t b,
                                                            int64_t head, int64_t t, int n,
                                                            int64_t key, float* s, float* slope) {
  constexpr int W = VecF::kWidth;
  const VecF scale = VecF::set1(a.scale), one = VecF::set1(1.0f);
  const VecF cap = VecF::set1(a.softcap), inverse = VecF::set1(a.scale / a.softcap);
  alignas(64) float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<float>(i);
  const int count = static_cast<int>(a.keys - key < kLanes ? a.keys - key : kLanes);
  alignas(64) float bias[kLanes] = {};
  for (int j = 0; j < n && t + j < a.length; ++j) {
    if (a.mask_kind != MaskKind::kNone) {
      mask_row(a,
               b * a.mask_stride[0] + head * a.mask_stride[1] + (t + j) * a.mask_stride[2] +
                   key * a.mask_stride[3],
               count, bias);
    }
    const VecF distance = VecF::set1(static_cast<float>(key - a.offsets[b] - t - j));
    for (int i = 0; i < kLanes; i += W) {
      float* p = s + j * kLanes + i;
      VecF x = VecF::load(p);
      if (a.softcap > 0.0f) {
        const VecF y = tanh(x * inverse);
        (one - y * y).store(slope + j * kLanes + i);
        x = cap * y;
      } else {
        x = x * scale;
      }
      if (a.alibi != nullptr) {
        x = fmadd(VecF::set1(a.alibi[head]), distance + VecF::load(lanes + i), x);
      }
      if (a.mask_kind != MaskKind::kNone) x = add_mask(x, VecF::load(bias + i));
      x.store(p);
    }
  }
}

// -inf where row t + j does not see a key.
LMFAST_INLINE void hide_invisible_by_rows(const AttentionArgs& a, int64_t b, int64_t t, int n,
                                          int64_t key, int64_t past, float* s) {
  constexpr int W = VecF::kWidth;
  alignas(64) float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<float>(i);
  const VecF hidden = VecF::set1(-kInfinity);
  for (int j = 0; j < n && t + j < a.length; ++j) {
    const Span seen = visible_keys(a, b, t + j);
    if (seen.lo <= key && seen.hi >= past) continue;
    const VecF lo = VecF::set1(static_cast<float>(seen.lo - key));
    const VecF hi = VecF::set1(static_cast<float>(seen.hi - key));
    for (int i = 0; i < kLanes; i += W) {
      float* p = s + j * kLanes + i;
      const VecF lane = VecF::load(lanes + i);
      VecF x = select_less(lane, hi, VecF::load(p), hidden);
      select_less(lane, lo, hidden, x).store(p);
    }
  }
}

}  // namespace
}  // namespace lmfast::LMFAST_ISA
