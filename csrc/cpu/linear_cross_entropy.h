// What the two CPU implementations of linear_cross_entropy share: the checked call, and the buffers
// of its results.
#pragma once

#include <vector>

#include "../common/tensor.h"
#include "kernels/linear_cross_entropy.h"

namespace lmfast {

struct LceCall {
  LceProblem p{};
  std::vector<int64_t> row, target;
  std::vector<float> scale;
  Tensor dweight;             // empty unless wanted; the weight's dtype and stride order
  float* dbias = nullptr;     // (V,) or null
  bool want_dweight = false;  // p.dhidden says the same of dhidden
  Tensor like;                // a CPU tensor, to allocate from
};

Tensor lce_floats(const LceCall& call, int64_t count);

// dweight in fp32 [V][padded_width] -> call.dweight.
void lce_store_dweight(const LceCall& call, const float* from, int64_t padded_width);

// The weight and bias gradient that label smoothing gives every class; E in whole groups.
const float* lce_uniform(const LceCall& call, Tensor* buffer, float* bias);

// A block of tokens at a time, its exponentials kept. Products in fp32 at every instruction-set
// level, or in bf16 with has_bf16_products().
void lce_run_blocks(LceCall& call, bool bf16);

// Two passes over AMX tiles, without softcap. parts: 1 for factors rounded to bf16, 3 for fp32.
void lce_run_amx(LceCall& call, int parts);

}  // namespace lmfast
