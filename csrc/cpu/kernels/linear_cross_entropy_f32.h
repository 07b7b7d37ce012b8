// Shared by the fp32 kernels of linear_cross_entropy. For kernels only.
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

}  // namespace
}  // namespace lmfast::LMFAST_ISA
