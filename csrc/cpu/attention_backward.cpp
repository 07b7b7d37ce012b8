// lmfast::attention_backward on the CPU: checks, threads, registration.
#include <tuple>

#include "attention_binding.h"
#include "attention_division.h"
#include "kernels/attention.h"
#include "scratch.h"

namespace lmfast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::empty_like;
using torch::stable::new_empty;
using torch::stable::parallel_for;

// Enough units that threads even out; ranges of keys repeat the packing of the queries, and have
// partial sums of dQ each.
int64_t key_ranges(const AttentionArgs& a) {
  constexpr int64_t kUnits = 16, kKeysPerRange = 256;
  const int64_t pairs = std::max<int64_t>(1, a.batch * a.kv_heads);
  return std::max<int64_t>(1, std::min(kUnits / pairs, a.keys / kKeysPerRange));
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& sums, bool causal, std::optional<int64_t> offset,
    const std::optional<Tensor>& offsets, const std::optional<Tensor>& lengths,
    const std::optional<Tensor>& mask, int64_t window, double softcap,
    const std::optional<Tensor>& sinks, const std::optional<Tensor>& alibi, double scale) {
  AttentionCall call(
      q, k, v, {causal, offset, offsets, lengths, mask, window, softcap, sinks, alibi, scale});
  AttentionBwdArgs a{};
  AttentionArgs& f = a.fwd;
  f = call.args;
  check_same_shape(q, out, "q", "out");
  check_same_shape(q, dout, "q", "dout");
  LMFAST_CHECK(dtype_of(out, "out") == f.dtype && dtype_of(dout, "dout") == f.dtype,
               "out and dout must have q's dtype");
  LMFAST_CHECK(sums.is_cpu() && sums.scalar_type() == ScalarType::Float && sums.is_contiguous() &&
                   sums.numel() == 2 * f.batch * f.heads * f.length,
               "sums must be a contiguous float32 CPU tensor (2, B, H, T)");
  Tensor dq = empty_like(q), dk = empty_like(k), dv = empty_like(v);
  f.out = attention_tensor(out, "out");
  f.reference = static_cast<float*>(sums.mutable_data_ptr());
  f.sum = f.reference + f.batch * f.heads * f.length;
  a.dout = attention_tensor(dout, "dout");
  a.dq = attention_tensor(dq, "dq");
  a.dk = attention_tensor(dk, "dk");
  a.dv = attention_tensor(dv, "dv");
  f.ranges = key_ranges(f);
  const bool tiles = on_tiles(f);
  a.dq_width = round_up(f.head_dim, tiles ? 32 : 16);
  Tensor partial;
  if (f.ranges > 1) {
    partial = new_empty(q, {f.batch * f.ranges, f.heads, f.length, a.dq_width}, ScalarType::Float);
    a.dq_partial = static_cast<float*>(partial.mutable_data_ptr());
  }
  const auto kernel = tiles ? attention_bwd_amx_kernel() : attention_bwd_kernel();
  for_each_unit(f.batch * f.kv_heads * f.ranges, attention_bwd_scratch_bytes(f),
                [&](void* scratch, int64_t unit) {
                  AttentionBwdArgs mine = a;
                  mine.fwd.scratch = scratch;
                  kernel(mine, unit, unit + 1);
                });
  if (f.ranges > 1) {
    const auto reduce = attention_reduce_kernel();
    const AttentionReduceArgs r{a};
    parallel_for(0, f.batch * f.heads * f.length, grain_size(f.head_dim * f.ranges),
                 [&](int64_t begin, int64_t end) { reduce(r, begin, end); });
  }
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmfast, CPU, m) {
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace lmfast
