#include "attention_binding.h"

#include <algorithm>

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

const float* scales_of(const Tensor& scales, const Tensor& k, int64_t (&stride)[2]) {
  LMFAST_CHECK(scales.is_cpu() && scales.scalar_type() == ScalarType::Float && scales.dim() == 3 &&
                   scales.size(0) == k.size(0) && scales.size(1) == k.size(1) &&
                   scales.size(2) == k.size(2) && (scales.size(2) <= 1 || scales.stride(2) == 1),
               "scales must be float32 CPU tensors (R, Hkv, C) with unit stride in C");
  stride[0] = scales.stride(0);
  stride[1] = scales.stride(1);
  return static_cast<const float*>(scales.const_data_ptr());
}

}  // namespace

Stored stored_type(const Tensor& k) {
  switch (k.scalar_type()) {
    case ScalarType::Float:
      return Stored::kF32;
    case ScalarType::BFloat16:
      return Stored::kBF16;
    case ScalarType::Half:
      return Stored::kF16;
    case ScalarType::Char:
      return Stored::kI8;
    default:
      LMFAST_CHECK(false, "keys and values must be float32, bfloat16, float16 or int8");
  }
  return Stored::kF32;
}

AttentionTensor attention_tensor(const Tensor& t, const char* name) {
  check_rows(t, name);
  LMFAST_CHECK(t.dim() == 4, name, " must have 4 dimensions, got ", t.dim());
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

void AttentionCall::set_shapes(const Tensor& q, const Tensor& k, const Tensor& v, bool table) {
  AttentionArgs& a = args;
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
  LMFAST_CHECK((table || k.size(0) == a.batch) && k.size(3) == a.head_dim,
               "k and v must have q's batch and head size");
  LMFAST_CHECK(a.head_dim <= 256, "the kernels take head sizes to 256, got ", a.head_dim);
  LMFAST_CHECK(a.kv_heads > 0 && a.heads % a.kv_heads == 0, "q has ", a.heads,
               " heads, which is no multiple of the ", a.kv_heads, " of k and v");
}

void AttentionCall::set_storage(const Tensor& k, const AttentionCache* cache) {
  AttentionStorage& s = args.stored;
  s = {stored_type(k), nullptr, 0, nullptr, nullptr, {}, {}};
  if (cache == nullptr) {
    LMFAST_CHECK(dtype_of(k, "k") == args.dtype, "k and v must have q's dtype");
    return;
  }
  LMFAST_CHECK((s.type == Stored::kI8) == cache->key_scales.has_value() &&
                   cache->key_scales.has_value() == cache->value_scales.has_value(),
               "int8 storage, and no other, has scales");
  if (s.type == Stored::kI8) {
    s.key_scales = scales_of(*cache->key_scales, k, s.key_scale_stride);
    s.value_scales = scales_of(*cache->value_scales, k, s.value_scale_stride);
  }
  if (!cache->table.has_value()) return;
  const Tensor& table = *cache->table;
  LMFAST_CHECK(
      table.is_cpu() && table.scalar_type() == ScalarType::Int && table.dim() == 2 &&
          table.is_contiguous() && table.size(0) == args.batch &&
          table.size(1) * kAttentionTableBlock == round_up(args.keys, kAttentionTableBlock),
      "table must be a contiguous int32 CPU tensor (B, ceil(C / ", kAttentionTableBlock, "))");
  s.table = static_cast<const int32_t*>(table.const_data_ptr());
  s.table_row = table.size(1);
  for (int64_t b = 0; b < args.batch; ++b) {
    const int64_t blocks = (lengths_[b] + kAttentionTableBlock - 1) / kAttentionTableBlock;
    for (int64_t j = 0; j < blocks; ++j) {
      const int32_t row = s.table[b * s.table_row + j];
      LMFAST_CHECK(row >= 0 && row < k.size(0), "table[", b, ", ", j, "] must be one of the ",
                   k.size(0), " rows of storage, got ", row);
    }
  }
}

void AttentionCall::set_mask(const Tensor& m) {
  AttentionArgs& a = args;
  LMFAST_CHECK(m.is_cpu() && m.dim() == 4 && m.size(0) == a.batch && m.size(1) == a.heads &&
                   m.size(2) == a.length && m.size(3) == a.keys,
               "mask must be a CPU tensor expanded to (B, H, T, S)");
  if (m.numel() == 0) return;  // and without memory, also where a row of it is expanded to none
  a.mask_kind = mask_kind(m);
  a.mask = m.const_data_ptr();
  for (int d = 0; d < 4; ++d) a.mask_stride[d] = m.stride(d);
  if (find_runs(m)) a.mask_kind = MaskKind::kNone;
}

// Whether the mask shows every query one run of keys that moves on with the queries; then `runs`
// says all of it.
bool AttentionCall::find_runs(const Tensor& m) {
  AttentionArgs& a = args;
  if ((m.stride(1) != 0 && a.heads > 1) || (m.stride(3) != 1 && a.keys > 1)) return false;
  const int64_t rows = m.stride(2) == 0 ? 1 : a.length, batch = m.stride(0) == 0 ? 1 : a.batch;
  std::vector<int64_t> found(static_cast<size_t>(2 * batch * rows));
  const AttentionMaskArgs mask{a.mask_kind, a.mask,      rows,        a.keys,
                               m.stride(0), m.stride(2), found.data()};
  const auto kernel = attention_mask_runs_kernel();
  // Most masks that are no runs show it in their first row, before the others are read.
  kernel(mask, 0, std::min<int64_t>(1, batch * rows));
  if (!found.empty() && found[0] < 0) return false;
  torch::stable::parallel_for(0, batch * rows, grain_size(a.keys),
                              [&](int64_t begin, int64_t end) { kernel(mask, begin, end); });
  runs_.resize(static_cast<size_t>(2 * batch * a.length));
  for (int64_t b = 0; b < batch; ++b) {
    int64_t lo = 0, hi = 0;
    for (int64_t t = 0; t < a.length; ++t) {
      const int64_t* run = found.data() + 2 * (b * rows + (rows > 1 ? t : 0));
      if (run[0] < 0) return false;
      const bool empty = run[0] == run[1];
      if (!empty && (run[0] < lo || run[1] < hi)) return false;
      lo = empty ? hi : run[0];
      hi = empty ? hi : run[1];
      runs_[2 * (b * a.length + t)] = lo;
      runs_[2 * (b * a.length + t) + 1] = hi;
    }
  }
  a.runs = runs_.data();
  a.runs_batch = batch > 1 ? 2 * a.length : 0;
  return true;
}

AttentionCall::AttentionCall(const Tensor& q, const Tensor& k, const Tensor& v,
                             const AttentionOptions& o, const AttentionCache* cache) {
  AttentionArgs& a = args;
  a.dtype = dtype_of(q, "q");
  LMFAST_CHECK(a.dtype != DType::kF64, "float64 attention has no kernel");
  LMFAST_CHECK(v.scalar_type() == k.scalar_type(), "v must have k's dtype");
  set_shapes(q, k, v, cache != nullptr && cache->table.has_value());
  a.causal = o.causal;
  a.window = o.window;
  a.softcap = static_cast<float>(o.softcap);
  a.scale = static_cast<float>(o.scale);
  lengths_ = per_row(o.lengths, a.batch, a.keys, "lengths");
  for (const int64_t n : lengths_) {
    LMFAST_CHECK(n >= 0 && n <= a.keys, "lengths must lie between 0 and the ", a.keys,
                 " keys there are, got ", n);
  }
  set_storage(k, cache);
  constexpr int64_t kFarthest = int64_t{1} << 61;
  const int64_t offset = o.offset.value_or(0);
  LMFAST_CHECK(offset >= -kFarthest && offset <= kFarthest,
               "q_offset must lie between -2**61 and 2**61, got ", offset);
  offsets_ = per_row(o.offsets, a.batch, o.offset.value_or(0), "q_offset");
  if (!o.offsets.has_value() && !o.offset.has_value()) {
    for (size_t b = 0; b < offsets_.size(); ++b) offsets_[b] = lengths_[b] - a.length;
  }
  a.offsets = offsets_.data();
  a.lengths = lengths_.data();
  a.sinks = per_head(o.sinks, a.heads, "sinks");
  a.alibi = per_head(o.alibi, a.heads, "alibi");
  if (o.mask.has_value()) set_mask(*o.mask);
  a.ranges = a.splits = 1;
  a.keys_per_split = a.keys;
}

}  // namespace lmfast
