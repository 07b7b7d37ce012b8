// The AMX passes of linear_cross_entropy: sizes, buffers, order.
#include "kernels/linear_cross_entropy_amx.h"

#include <algorithm>

#include "linear_cross_entropy.h"

namespace lmfast {
namespace {

using torch::stable::parallel_for;

// Accumulators and packed lanes of the groups a thread works on at once stay in its share of L2;
// four at least, as a chunk is packed once for all of them.
constexpr int64_t kGroupBytes = 1400 * 1024;
constexpr int64_t kFewestGroups = 4, kMostGroups = 64;

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Shares `groups` among threads, and each share into equal rounds.
void plan_workers(LceAmxArgs& a, int64_t groups) {
  const LceAmxLayout at = lce_amx_layout(a);
  a.groups = groups;
  a.workers = std::min<int64_t>(groups, torch::stable::get_num_threads());
  const int64_t share = (groups + a.workers - 1) / a.workers;
  const int64_t most =
      std::clamp(kGroupBytes / at.group_bytes, kFewestGroups, std::min(share, kMostGroups));
  const int64_t rounds = (share + most - 1) / most;
  a.groups_at_once = (share + rounds - 1) / rounds;
  a.worker_bytes = round_up(at.groups + a.groups_at_once * at.group_bytes, 64) + 64;
}

template <class Kernel>
void run(Kernel kernel, const LceAmxArgs& args, int64_t range) {
  parallel_for(0, range, 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// Tokens in the order of their targets' groups.
void sort_by_group(const LceProblem& p, int64_t groups, std::vector<int64_t>& order,
                   std::vector<int64_t>& begin) {
  begin.assign(groups + 1, 0);
  order.resize(p.tokens);
  for (int64_t i = 0; i < p.tokens; ++i) ++begin[p.target[i] / kLceLanes + 1];
  for (int64_t g = 0; g < groups; ++g) begin[g + 1] += begin[g];
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  for (int64_t i = 0; i < p.tokens; ++i) order[next[p.target[i] / kLceLanes]++] = i;
}

}  // namespace

void lce_run_amx(LceCall& call, int parts) {
  const LceProblem& p = call.p;
  LceAmxArgs a{};
  a.p = p;
  a.parts = parts;
  a.depth = round_up(p.width, 32);
  a.row_bytes = 2 * a.depth + 64;  // not a power of two: rows would meet in one cache set
  a.out_tiles = a.depth / 16;
  a.chunk = parts == 1 ? 256 : 128;
  a.want_product = p.dhidden != nullptr;
  const auto bytes = [&](int64_t count) { return lce_floats(call, (count + 3) / 4 + 16); };
  const auto data = [](const Tensor& t) {
    const auto address = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
    return reinterpret_cast<char*>((address + 63) / 64 * 64);
  };

  const int64_t token_groups = (p.tokens + kLceLanes - 1) / kLceLanes;
  a.padded_tokens = token_groups * kLceLanes;
  const Tensor target_rows = lce_floats(call, p.width * a.padded_tokens);
  const Tensor per_token = lce_floats(call, 3 * p.tokens);
  a.target_rows = static_cast<float*>(target_rows.mutable_data_ptr());
  a.center = static_cast<float*>(per_token.mutable_data_ptr());
  a.weight = a.center + p.tokens;
  a.target_gradient = a.weight + p.tokens;
  run(lce_amx_target_rows_kernel(), a, round_up(p.width, 16) / 16);
  {
    plan_workers(a, token_groups);
    const Tensor scratch = bytes(a.workers * a.worker_bytes);
    a.scratch = data(scratch);
    run(lce_amx_tokens_kernel(), a, a.workers);
  }
  if (!call.want_dweight && call.dbias == nullptr) return;

  a.dbias = call.dbias;
  a.out_tiles += call.dbias != nullptr ? 2 : 0;
  const bool equal = std::all_of(a.weight, a.weight + p.tokens,
                                 [&](float w) { return w == a.weight[0] && w != 0.0f; });
  a.shared_weight = equal ? a.weight[0] : 0.0f;
  if (call.want_dweight) {
    a.dweight = call.dweight.mutable_data_ptr();
    a.dweight_row_stride = call.dweight.stride(0);
    a.dweight_column_stride = p.width <= 1 ? 1 : call.dweight.stride(1);
  }
  Tensor uniform;
  if (p.smoothing > 0) a.uniform = lce_uniform(call, &uniform, &a.uniform_bias);

  const int64_t chunks = (p.tokens + a.chunk - 1) / a.chunk;
  const LceAmxLayout at = lce_amx_layout(a);
  a.packed_bytes = round_up(at.chunk + 16 * a.depth * 4, 64);
  const Tensor packed = bytes(chunks * a.packed_bytes);
  a.packed = data(packed);
  run(lce_amx_pack_kernel(), a, chunks);

  const int64_t class_groups = (p.classes + kLceLanes - 1) / kLceLanes;
  std::vector<int64_t> order, begin;
  sort_by_group(p, class_groups, order, begin);
  a.by_group = order.data();
  a.group_begin = begin.data();
  plan_workers(a, class_groups);
  const Tensor scratch = bytes(a.workers * a.worker_bytes);
  a.scratch = data(scratch);
  run(lce_amx_classes_kernel(), a, a.workers);
}

}  // namespace lmfast
