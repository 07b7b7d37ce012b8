#include "attention_binding.h"

namespace lmfast {
namespace {

using torch::headeronly::ScalarType;

std::vector<int64_t> per_row(const std::optional<Tensor>& t, int64_t batch, int64_t otherwise,
                             const char* name) {
  std::vector<int64_t> values(static_cast<size_t>(batch), otherwise);
  if (!t.has_value()) return values;
  LMFAST_CHECK(t->is_cpu() && t->scalar_type() == ScalarType::Long && t->dim() == 1 &&
                   t->size(0) == batch && t->is_contiguous(),
               name, " must be a contiguous int64 CPU vector of ", batch, " elements");
  const int64_t* data = static_cast<const int64_t*>(t->const_data_ptr());
  values.assign(data, data + batch);
  return values;
}

const float* per_head(const std::optional<Tensor>& t, int64_t heads, const char* name) {
  if (!t.has_value()) return nullptr;
  LMFAST_CHECK(t->is_cpu() && t->scalar_type() == ScalarType::Float && t->dim() == 1 &&
                   t->size(0) == heads && t->is_contiguous(),
               name, " must be a contiguous float32 CPU vector of ", heads, " elements");
  return static_cast<const float*>(t->const_data_ptr());
}

MaskKind mask_kind(const Tensor& mask) {
  switch (mask.scalar_type()) {
    case ScalarType::Bool:
      return MaskKind::kBool;
    case ScalarType::Float:
      return MaskKind::kF32;
    case ScalarType::BFloat16:
      return MaskKind::kBF16;
    case ScalarType::Half:
      return MaskKind::kF16;
    default:
      LMFAST_CHECK(false, "mask must be bool, float32, bfloat16 or float16");
  }
  return MaskKind::kNone;
}

}  // namespace

AttentionTensor attention_tensor(const Tensor& t, const char* name) {
  check_rows(t, name);
  LMFAST_CHECK(t.dim() == 4, name, " must have 4 dimensions, got ", t.dim());
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

AttentionCall::AttentionCall(const Tensor& q, const Tensor& k, const Tensor& v,
                             const AttentionOptions& o) {
  AttentionArgs& a = args;
  a.dtype = dtype_of(q, "q");
  LMFAST_CHECK(a.dtype != DType::kF64, "float64 attention has no kernel");
  LMFAST_CHECK(dtype_of(k, "k") == a.dtype && dtype_of(v, "v") == a.dtype,
               "k and v must have q's dtype");
  a.q = attention_tensor(q, "q");
  a.k = attention_tensor(k, "k");
  a.v = attention_tensor(v, "v");
  check_same_shape(k, v, "k", "v");
  a.batch = q.size(0);
  a.heads = q.size(1);
  a.length = q.size(2);
  a.head_dim = q.size(3);
  a.kv_heads = k.size(1);
  a.keys = k.size(2);
  LMFAST_CHECK(k.size(0) == a.batch && k.size(3) == a.head_dim,
               "k and v must have q's batch and head size");
  LMFAST_CHECK(a.kv_heads > 0 && a.heads % a.kv_heads == 0, "q has ", a.heads,
               " heads, which is no multiple of the ", a.kv_heads, " of k and v");
  a.causal = o.causal;
  a.window = o.window;
  a.softcap = static_cast<float>(o.softcap);
  a.scale = static_cast<float>(o.scale);
  lengths_ = per_row(o.lengths, a.batch, a.keys, "lengths");
  for (const int64_t n : lengths_) {
    LMFAST_CHECK(n >= 0 && n <= a.keys, "lengths must lie between 0 and the ", a.keys,
                 " keys there are, got ", n);
  }
  offsets_ = per_row(o.offsets, a.batch, o.offset.value_or(0), "q_offset");
  if (!o.offsets.has_value() && !o.offset.has_value()) {
    for (size_t b = 0; b < offsets_.size(); ++b) offsets_[b] = lengths_[b] - a.length;
  }
  a.offsets = offsets_.data();
  a.lengths = lengths_.data();
  a.sinks = per_head(o.sinks, a.heads, "sinks");
  a.alibi = per_head(o.alibi, a.heads, "alibi");
  if (o.mask.has_value()) {
    const Tensor& m = *o.mask;
    LMFAST_CHECK(m.is_cpu() && m.dim() == 4 && m.size(0) == a.batch && m.size(1) == a.heads &&
                     m.size(2) == a.length && m.size(3) == a.keys,
                 "mask must be a CPU tensor expanded to (B, H, T, S)");
    a.mask_kind = mask_kind(m);
    a.mask = m.const_data_ptr();
    for (int d = 0; d < 4; ++d) a.mask_stride[d] = m.stride(d);
  }
  a.ranges = 1;
}

}  // namespace lmfast
