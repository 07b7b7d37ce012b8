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

// Enough units that threads even out; a range repeats the packing of the keys, so not too short.
int64_t query_ranges(const AttentionArgs& a) {
  constexpr int64_t kUnits = 64, kRowsPerRange = 256;
  const int64_t rows = a.heads / a.kv_heads * a.length, pairs = a.batch * a.kv_heads;
  return std::max<int64_t>(1, std::min(kUnits / std::max<int64_t>(1, pairs), rows / kRowsPerRange));
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
