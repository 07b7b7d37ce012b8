// lmfast::attention and lmfast::cached_attention on the CPU: checks, registration.
#include "kernels/attention.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "attention_binding.h"

namespace lmfast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::empty_like;
using torch::stable::new_empty;

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, bool causal,
                                     std::optional<int64_t> offset,
                                     const std::optional<Tensor>& offsets,
                                     const std::optional<Tensor>& lengths,
                                     const std::optional<Tensor>& mask, int64_t window,
                                     double softcap, const std::optional<Tensor>& sinks,
                                     const std::optional<Tensor>& alibi, double scale,
                                     bool for_gradient) {
  AttentionCall call(
      q, k, v, {causal, offset, offsets, lengths, mask, window, softcap, sinks, alibi, scale});
  AttentionArgs& a = call.args;
  Tensor out = empty_like(q);
  Tensor sums = new_empty(q, {for_gradient ? 2 : 0, a.batch, a.heads, a.length}, ScalarType::Float);
  a.out = attention_tensor(out, "out");
  if (for_gradient) {
    a.reference = static_cast<float*>(sums.mutable_data_ptr());
    a.sum = a.reference + a.batch * a.heads * a.length;
  }
  run_attention(a);
  return {out, sums};
}

Tensor cached_attention(const Tensor& q, const Tensor& keys, const Tensor& values,
                        const Tensor& lengths, const std::optional<Tensor>& table,
                        const std::optional<Tensor>& key_scales,
                        const std::optional<Tensor>& value_scales, std::optional<int64_t> window,
                        std::optional<double> softcap, const std::optional<Tensor>& sinks,
                        const std::optional<Tensor>& alibi, std::optional<double> scale) {
  LMFAST_CHECK(q.dim() == 4, "q must have 4 dimensions, got ", q.dim());
  LMFAST_CHECK(window.value_or(1) > 0, "window must be positive");
  const double cap = softcap.value_or(1);
  LMFAST_CHECK(cap >= 1e-30 && cap <= 1e30, "softcap must lie between 1e-30 and 1e30, got ", cap);
  const AttentionCache cache{table, key_scales, value_scales};
  AttentionOptions options{};
  options.causal = true;
  options.lengths = lengths;
  // Beyond any position, and small enough to be added to one.
  options.window = std::min<int64_t>(window.value_or(0), int64_t{1} << 61);
  options.softcap = softcap.value_or(0);
  options.sinks = sinks;
  options.alibi = alibi;
  options.scale = scale.value_or(1.0 / std::sqrt(std::max<double>(1.0, q.size(3))));
  AttentionCall call(q, keys, values, options, &cache);
  Tensor out = empty_like(q);
  call.args.out = attention_tensor(out, "out");
  run_attention(call.args);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmfast, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("cached_attention", TORCH_BOX(&cached_attention));
}

}  // namespace lmfast
