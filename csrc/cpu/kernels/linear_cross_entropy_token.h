// What the finished softmax sums make of one token. For kernels only.
#pragma once

#include <math.h>

#include "linear_cross_entropy.h"

namespace lmfast::LMFAST_ISA {
namespace {

// A sum that reaches this is done again relative to the largest logit: coefficients near 1 / sum
// may become subnormal beyond.
constexpr float kLceLargestSum = 1e20f;

struct FinishedToken {
  double loss, lse;
  float weight;           // gradient by a logit is weight * its probability
  float coefficient;      // or coefficient * exp(logit - center)
  float target_gradient;  // gradient by the target's logit (capped), without smoothing's share
};

// others: sum of exp(logit - center) over all classes but the target.
inline FinishedToken finish_token(const LceProblem& p, float scale, float logit, float center,
                                  float others, double mean_logit) {
  const double target_prob = center == logit ? 1.0 : ::exp(double(logit) - center);
  const double sum = target_prob + others;
  const double log_sum = center == logit ? ::log1p(double(others)) : ::log(sum);
  FinishedToken f;
  f.lse = center + log_sum;
  const double slope = 1.0 + 2.0 * p.z_loss * f.lse;
  f.loss = center - double(logit) + log_sum + p.z_loss * f.lse * f.lse;
  // Of a target masked out by a bias of -inf the loss is infinite, and no 0 * inf.
  if (p.smoothing > 0.0f) {
    f.loss = (1.0 - p.smoothing) * f.loss + p.smoothing * (f.lse - mean_logit) +
             p.smoothing * p.z_loss * f.lse * f.lse;
  }
  f.weight = static_cast<float>(scale * slope);
  f.coefficient = static_cast<float>(scale * slope / sum);
  const double target = ((slope - 1.0) * target_prob - others) / sum + p.smoothing;
  f.target_gradient = static_cast<float>(scale * target);
  return f;
}

LMFAST_INLINE bool sum_overflows(float logit, float others) {
  return !(others < kLceLargestSum) || !(logit - logit == 0.0f);
}

}  // namespace
}  // namespace lmfast::LMFAST_ISA
