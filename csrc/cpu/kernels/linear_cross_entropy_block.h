// Shared by the kernels of linear_cross_entropy that work in blocks of tokens. For kernels only.
#pragma once

#include "../simd.h"
#include "../simd_tanh.h"
#include "linear_cross_entropy.h"

namespace lmfast::LMFAST_ISA {
namespace {

// Of E at a time: an operand panel of 64 lanes is 64 KB.
constexpr int64_t kDepth = 256;

LMFAST_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// softcap * tanh(logit / softcap), and that tanh.
LMFAST_INLINE VecF capped(VecF logit, float softcap, VecF* ratio) {
  *ratio = tanh(logit / VecF::set1(softcap));
  return VecF::set1(softcap) * *ratio;
}

// What the block's targets among the classes first .. past - 1 add to dweight and dbias.
inline void add_targets(const LceBlockArgs& a, int64_t first, int64_t past) {
  for (int64_t n = 0; n < a.tokens; ++n) {
    const int64_t target = a.p.target[a.first_token + n];
    if (target < first || target >= past) continue;
    if (a.dbias != nullptr) a.dbias[target] += a.target_gradient[n];
    if (a.dweight == nullptr) continue;
    float* row = a.dweight + target * a.padded_width;
    for (int64_t e = 0; e < a.p.width; ++e) {
      row[e] += a.target_gradient[n] * a.hidden_t[e * a.lanes + n];
    }
  }
}

}  // namespace
}  // namespace lmfast::LMFAST_ISA
