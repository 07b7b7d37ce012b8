// linear_cross_entropy in blocks of tokens, with products in fp32 or, on AVX512-BF16, in bf16: each
// phase over threads.
#include <algorithm>

#include "linear_cross_entropy.h"
#include "scratch.h"

namespace lmfast {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kProbsBytes = 25 << 20;  // of a block, where the vocabulary allows
constexpr int64_t kMaxSlices = 32;         // threads that a block can use

// What the kernels' buffers take, and fewer tokens than `least` make too little of a pass over
// dweight.
struct BlockSize {
  int64_t least, most, group, bytes_of_prob;
};
constexpr BlockSize kF32 = {64, 192, kLceGroup, 4}, kBf16 = {128, 256, kLceBf16Block, 2};

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Tokens per block: as many as the buffers and the last-level cache take, in equal blocks.
int64_t block_lanes(const LceProblem& p, const BlockSize& size) {
  const int64_t fitting = kProbsBytes / (size.bytes_of_prob * p.classes) / 64 * 64;
  const int64_t most = std::clamp(fitting, size.least, size.most);
  const int64_t blocks = (p.tokens + most - 1) / most;
  return round_up((p.tokens + blocks - 1) / blocks, size.group);
}

template <class Kernel, class Args>
void run(Kernel kernel, const Args& args, int64_t range) {
  parallel_for(0, range, 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// The kernels with bf16 products need memory of their own.
template <class Kernel>
void run_slices(Kernel kernel, const LceBlockArgs& args, bool bf16) {
  if (!bf16) return run(kernel, args, args.slices);
  for_each_unit(args.slices, lce_bf16_layout(args).bytes, [&](void* scratch, int64_t slice) {
    LceBlockArgs mine = args;
    mine.scratch = static_cast<char*>(scratch);
    kernel(mine, slice, slice + 1);
  });
}

}  // namespace

void lce_run_blocks(LceCall& call, bool bf16) {
  const LceProblem& p = call.p;
  LceBlockArgs a{};
  a.p = p;
  const int64_t lanes = block_lanes(p, bf16 ? kBf16 : kF32);
  a.padded_width = round_up(p.width, kLceGroup);
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
  bool overflow[kBf16.most / kLceGroup];
  a.overflow = overflow;

  Tensor probs, dhidden_t, hidden_scaled, dweight, uniform;
  if (p.dhidden != nullptr) {
    a.dhidden_rows = bf16 ? a.padded_width : p.width;
    a.dhidden_panels = bf16;
    dhidden_t = floats(a.slices * a.dhidden_rows * lanes);
    a.dhidden_t = data(dhidden_t);
  }
  // The sums of dweight are kept where they belong if they can lie there in fp32.
  const bool direct = call.want_dweight && p.weight_dtype == DType::kF32 &&
                      call.dweight.is_contiguous() && p.width == a.padded_width;
  ScratchMemory pairs(nullptr, &std::free);
  if (bf16) {
    const int64_t hidden_bytes = a.padded_width * lanes * 2;
    const int64_t probs_bytes = keep ? round_up(p.classes, kLceBf16Block) * lanes * 2 : 0;
    pairs = allocate_scratch(2 * hidden_bytes + probs_bytes);
    a.hidden_pairs = static_cast<char*>(pairs.get());
    a.scaled_pairs = a.hidden_pairs + hidden_bytes;
    if (keep) a.probs_rows = a.scaled_pairs + hidden_bytes;
  }
  if (keep) {
    if (!bf16) {
      probs = floats(p.classes * lanes);
      a.probs = data(probs);
    }
    hidden_scaled = floats(lanes * a.padded_width);
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

  const auto forward = bf16 ? lce_bf16_forward_kernel() : lce_block_forward_kernel();
  const auto largest = bf16 ? lce_bf16_max_kernel() : lce_block_max_kernel();
  const auto gradient = bf16 ? lce_bf16_dweight_kernel() : lce_block_dweight_kernel();
  for (int64_t first = 0; first < p.tokens; first += lanes) {
    a.first_token = first;
    a.tokens = std::min(lanes, p.tokens - first);
    a.lanes = round_up(a.tokens, bf16 ? kBf16.group : kF32.group);
    a.redo = false;
    const int64_t groups = a.lanes / kLceGroup, columns = a.padded_width / kLceGroup;
    run(lce_block_pack_kernel(), a, groups);
    if (bf16) run(lce_bf16_pack_kernel(), a, columns);
    run_slices(forward, a, bf16);
    run(lce_block_finish_kernel(), a, groups);
    if (std::any_of(overflow, overflow + groups, [](bool o) { return o; })) {
      a.redo = true;
      run_slices(largest, a, bf16);
      run(lce_block_center_kernel(), a, groups);
      run_slices(forward, a, bf16);
      run(lce_block_finish_kernel(), a, groups);
    }
    if (bf16 && call.want_dweight) run(lce_bf16_scale_kernel(), a, columns);
    if (keep) run_slices(gradient, a, bf16);
    a.accumulate = true;
  }
  if (call.want_dweight && !direct) lce_store_dweight(call, a.dweight, a.padded_width);
}

}  // namespace lmfast
