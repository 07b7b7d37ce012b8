// The fp32 phases of linear_cross_entropy: a loop over blocks of tokens, each phase over threads.
#include <algorithm>

#include "linear_cross_entropy.h"

namespace lmfast {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kMaxLanes = 192;         // of the kernels' buffers
constexpr int64_t kProbsBytes = 25 << 20;  // of a block, where the vocabulary allows
constexpr int64_t kMaxSlices = 32;         // threads that a block can use

int64_t whole_groups(int64_t n) { return (n + kLceGroup - 1) / kLceGroup * kLceGroup; }

// Tokens per block: as many as the buffers and the last-level cache take, in equal blocks.
int64_t block_lanes(const LceProblem& p) {
  const int64_t fitting = kProbsBytes / (4 * p.classes) / 64 * 64;
  const int64_t most = std::clamp<int64_t>(fitting, 64, kMaxLanes);
  const int64_t blocks = (p.tokens + most - 1) / most;
  return whole_groups((p.tokens + blocks - 1) / blocks);
}

template <class Kernel, class Args>
void run(Kernel kernel, const Args& args, int64_t range) {
  parallel_for(0, range, 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace

void lce_run_f32(LceCall& call) {
  const LceProblem& p = call.p;
  LceBlockArgs a{};
  a.p = p;
  const int64_t lanes = block_lanes(p);
  a.padded_width = whole_groups(p.width);
  a.slices = std::clamp<int64_t>(p.classes / 512, 1, kMaxSlices);
  const bool keep = call.want_dweight || call.dbias != nullptr;

  const auto floats = [&](int64_t count) { return lce_floats(call, count); };
  const auto data = [](const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); };
  const Tensor hidden_t = floats(p.width * lanes), per_lane = floats(5 * lanes);
  const Tensor sums = floats(a.slices * lanes);
  a.hidden_t = data(hidden_t);
  a.sums = data(sums);
  a.target_logit = data(per_lane);
  a.center = a.target_logit + lanes;
  a.coefficient = a.center + lanes;
  a.target_gradient = a.coefficient + lanes;
  a.target_slope = a.target_gradient + lanes;
  bool overflow[kMaxLanes / kLceGroup];
  a.overflow = overflow;

  Tensor probs, dhidden_t, hidden_scaled, dweight, uniform;
  if (p.dhidden != nullptr) {
    dhidden_t = floats(a.slices * p.width * lanes);
    a.dhidden_t = data(dhidden_t);
  }
  // The sums of dweight are kept where they belong if they can lie there in fp32.
  const bool direct = call.want_dweight && p.weight_dtype == DType::kF32 &&
                      call.dweight.is_contiguous() && p.width == a.padded_width;
  if (keep) {
    probs = floats(p.classes * lanes);
    hidden_scaled = floats(lanes * a.padded_width);
    a.probs = data(probs);
    a.hidden_scaled = data(hidden_scaled);
    a.dbias = call.dbias;
  }
  if (call.want_dweight) {
    dweight = direct ? call.dweight : floats(p.classes * a.padded_width);
    a.dweight = data(dweight);
  }
  if (keep && p.smoothing > 0) {
    a.uniform = lce_uniform(call, &uniform, &a.uniform_bias);
  }

  for (int64_t first = 0; first < p.tokens; first += lanes) {
    a.first_token = first;
    a.tokens = std::min(lanes, p.tokens - first);
    a.lanes = whole_groups(a.tokens);
    a.redo = false;
    const int64_t groups = a.lanes / kLceGroup;
    run(lce_block_pack_kernel(), a, groups);
    run(lce_block_forward_kernel(), a, a.slices);
    run(lce_block_finish_kernel(), a, groups);
    if (std::any_of(overflow, overflow + groups, [](bool o) { return o; })) {
      a.redo = true;
      run(lce_block_max_kernel(), a, a.slices);
      run(lce_block_center_kernel(), a, groups);
      run(lce_block_forward_kernel(), a, a.slices);
      run(lce_block_finish_kernel(), a, groups);
    }
    if (keep) run(lce_block_dweight_kernel(), a, a.slices);
    a.accumulate = true;
  }
  if (call.want_dweight && !direct) lce_store_dweight(call, a.dweight, a.padded_width);
}

}  // namespace lmfast
