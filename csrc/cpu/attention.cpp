// lmfast::attention on the CPU: checks, threads, registration.
#include "kernels/attention.h"

#include <tuple>

#include "attention_binding.h"
#include "scratch.h"

namespace lmfast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::empty_like;
using torch::stable::new_empty;
using torch::stable::parallel_for;

// Enough units that threads even out; a range repeats the packing of the keys, so not too short.
int64_t query_ranges(const AttentionArgs& a) {
  constexpr int64_t kUnits = 64, kRowsPerRange = 256;
  const int64_t rows = a.heads / a.kv_heads * a.length, pairs = a.batch * a.kv_heads;
  return std::max<int64_t>(1, std::min(kUnits / std::max<int64_t>(1, pairs), rows / kRowsPerRange));
}

bool is_decoding(const AttentionArgs& a) {
  return a.heads / a.kv_heads * a.length <= kAttentionDecodeRows && a.head_dim <= 256;
}

void decode(const AttentionArgs& args, const Tensor& q) {
  constexpr int64_t kUnits = 64, kKeysPerSplit = 256;
  AttentionDecodeArgs a{};
  a.fwd = args;
  const int64_t pairs = args.batch * args.kv_heads, rows = args.heads / args.kv_heads * args.length;
  int64_t longest = 0;
  for (int64_t b = 0; b < args.batch; ++b) longest = std::max(longest, args.lengths[b]);
  const int64_t most = std::max<int64_t>(1, kUnits / std::max<int64_t>(1, pairs));
  const int64_t wanted = std::max<int64_t>(1, std::min(most, longest / kKeysPerSplit));
  a.keys_per_split = round_up(std::max<int64_t>(1, (longest + wanted - 1) / wanted), 64);
  a.splits = std::max<int64_t>(1, (longest + a.keys_per_split - 1) / a.keys_per_split);
  const int64_t record = round_up(args.head_dim, 16) + 2;
  Tensor partial = new_empty(q, {pairs * a.splits, rows, record}, ScalarType::Float);
  a.partial = static_cast<float*>(partial.mutable_data_ptr());
  const auto kernel = attention_decode_kernel();
  for_each_unit(
      pairs * a.splits, 0, [&](void*, int64_t unit) { kernel(a, unit, unit + 1); },
      grain_size(std::min(longest, a.keys_per_split) * args.head_dim * rows));
  const auto combine = attention_combine_kernel();
  parallel_for(0, pairs * rows, grain_size(a.splits * record),
               [&](int64_t begin, int64_t end) { combine(a, begin, end); });
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, bool causal,
                                     std::optional<int64_t> offset,
                                     const std::optional<Tensor>& offsets,
                                     const std::optional<Tensor>& lengths,
                                     const std::optional<Tensor>& mask, int64_t window,
                                     double softcap, const std::optional<Tensor>& sinks,
                                     const std::optional<Tensor>& alibi, double scale) {
  AttentionCall call(
      q, k, v, {causal, offset, offsets, lengths, mask, window, softcap, sinks, alibi, scale});
  AttentionArgs& a = call.args;
  Tensor out = empty_like(q);
  Tensor lse = new_empty(q, {a.batch, a.heads, a.length}, ScalarType::Float);
  a.out = attention_tensor(out, "out");
  a.lse = static_cast<float*>(lse.mutable_data_ptr());
  if (a.length > 0 && is_decoding(a)) {
    decode(a, q);
    return {out, lse};
  }
  a.ranges = query_ranges(a);
  const auto kernel = attention_fwd_kernel();
  const int64_t units = a.length > 0 ? a.batch * a.kv_heads * a.ranges : 0;
  for_each_unit(units, attention_fwd_scratch_bytes(a), [&](void* scratch, int64_t unit) {
    AttentionArgs mine = a;
    mine.scratch = scratch;
    kernel(mine, unit, unit + 1);
  });
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmfast, CPU, m) { m.impl("attention", TORCH_BOX(&attention)); }

}  // namespace lmfast
