// lmfast::rope_append on the CPU: checks, threads, registration.
#include "kernels/rope_append.h"

#include <optional>

#include "../common/tensor.h"
#include "rotation.h"

namespace lmfast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;

NewTokens new_tokens(const Tensor& t, const char* name) {
  LMFAST_CHECK(t.dim() == 4, name, " must have 4 dimensions (B, heads, T, D), got ", t.dim());
  check_rows(t, name);
  return {t.const_data_ptr(), t.size(1), {t.stride(0), t.stride(1), t.stride(2)}};
}

CacheStorage cache_storage(const Tensor& t, const std::optional<Tensor>& scales, const char* name) {
  LMFAST_CHECK(t.dim() == 4, name, " must have 4 dimensions (rows, heads, columns, D), got ",
               t.dim());
  check_rows(t, name);
  CacheStorage s{t.mutable_data_ptr(), {t.stride(0), t.stride(1), t.stride(2)}, nullptr, {0, 0, 0}};
  if (scales.has_value()) {
    bool fits =
        scales->is_cpu() && scales->scalar_type() == ScalarType::Float && scales->dim() == 3;
    for (int d = 0; fits && d < 3; ++d) {
      fits = scales->size(d) == t.size(d);
      s.scale_stride[d] = scales->stride(d);
    }
    LMFAST_CHECK(fits, "the scales of ", name,
                 " must be a float32 CPU tensor (rows, heads, columns)");
    s.scales = static_cast<float*>(scales->mutable_data_ptr());
  }
  return s;
}

// Threads, and the loop itself, would write the same memory more than once.
void check_not_expanded(const Tensor& t, const char* name) {
  for (int d = 0; d < 4; ++d) {
    LMFAST_CHECK(t.size(d) <= 1 || t.stride(d) != 0, name, " is written to, and is expanded");
  }
}

void check_range(const int64_t* values, int64_t count, int64_t limit, const char* name) {
  for (int64_t i = 0; i < count; ++i) {
    LMFAST_CHECK(values[i] >= 0 && values[i] < limit, name, " must lie in 0..", limit - 1, ", got ",
                 values[i]);
  }
}

void rope_append(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& keys,
                 const Tensor& values, const std::optional<Tensor>& key_scales,
                 const std::optional<Tensor>& value_scales, const Tensor& slots,
                 const std::optional<Tensor>& tokens, const std::optional<Tensor>& cos,
                 const std::optional<Tensor>& sin, const std::optional<Tensor>& positions,
                 int64_t offset, bool interleaved) {
  RopeAppendArgs a{};
  a.dtype = dtype_of(q, "q");
  LMFAST_CHECK(dtype_of(k, "k") == a.dtype && dtype_of(v, "v") == a.dtype,
               "k and v must have q's dtype");
  a.q = new_tokens(q, "q");
  a.k = new_tokens(k, "k");
  a.v = new_tokens(v, "v");
  check_same_shape(k, v, "k", "v");
  const int64_t batch = k.size(0);
  a.length = k.size(2);
  a.head_dim = k.size(3);
  LMFAST_CHECK(q.size(0) == batch && q.size(2) == a.length && q.size(3) == a.head_dim,
               "q must have the batch, length and head size of k");
  a.keys = cache_storage(keys, key_scales, "keys");
  a.values = cache_storage(values, value_scales, "values");
  check_same_shape(keys, values, "keys", "values");
  LMFAST_CHECK(keys.size(1) == a.k.heads && keys.size(3) == a.head_dim,
               "keys must have the heads and head size of k");
  LMFAST_CHECK(keys.scalar_type() == values.scalar_type(), "keys and values must have one dtype");
  a.quantised = keys.scalar_type() == ScalarType::Char;
  if (a.quantised) {
    LMFAST_CHECK(a.keys.scales != nullptr && a.values.scales != nullptr,
                 "int8 storage needs key_scales and value_scales");
    LMFAST_CHECK(a.dtype != DType::kF64, "no int8 storage of float64");
    LMFAST_CHECK(a.head_dim <= kMaxAppendHeadDim, "int8 storage takes head sizes to ",
                 kMaxAppendHeadDim, ", got ", a.head_dim);
  } else {
    LMFAST_CHECK(a.keys.scales == nullptr && a.values.scales == nullptr,
                 "key_scales and value_scales are for int8 storage");
    a.storage = dtype_of(keys, "keys");
    LMFAST_CHECK((a.storage == DType::kF64) == (a.dtype == DType::kF64),
                 "float64 is stored as float64 only");
  }
  if (cos.has_value()) check_not_expanded(q, "q");
  check_not_expanded(keys, "keys");
  check_not_expanded(values, "values");
  a.columns = keys.size(2);
  a.interleaved = interleaved;
  a.slots = indices(slots, "slots");
  a.tokens = indices(tokens, "tokens");
  const int64_t count = slots.numel();
  LMFAST_CHECK(tokens.has_value() ? tokens->numel() == count : count == batch * a.length,
               "slots must have one entry per token");
  check_range(a.slots, count, keys.size(0) * a.columns, "slots");
  if (a.tokens != nullptr) check_range(a.tokens, count, batch * a.length, "tokens");
  LMFAST_CHECK(cos.has_value() == sin.has_value(), "cos and sin go together");
  if (cos.has_value()) {
    a.rotated = true;
    set_rotation(*cos, *sin, positions, offset, batch, a);
    a.q_vectors = batch * a.length * a.q.heads;
  }
  const auto kernel = rope_append_kernel();
  parallel_for(0, a.q_vectors + count * 2 * a.k.heads, grain_size(a.head_dim),
               [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmfast, CPU, m) { m.impl("rope_append", TORCH_BOX(&rope_append)); }

}  // namespace lmfast
