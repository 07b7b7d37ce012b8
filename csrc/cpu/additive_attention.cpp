// lmfast::additive_attention and its backward on the CPU: checks, threads, registration.
#include "kernels/additive_attention.h"

#include <algorithm>
#include <optional>
#include <tuple>

#include "scratch.h"

namespace lmfast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::new_empty;
using torch::stable::parallel_for;

void check_float(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) {
  bool fits = t.is_cpu() && t.scalar_type() == ScalarType::Float && t.is_contiguous() &&
              t.dim() == static_cast<int64_t>(shape.size());
  int64_t d = 0;
  for (int64_t size : shape) fits = fits && t.size(d++) == size;
  LMFAST_CHECK(fits, name, " must be a contiguous float32 CPU tensor of the shape the others give");
}

void check_storage(const Tensor& t, const char* name, const Tensor& like,
                   std::initializer_list<int64_t> shape) {
  check_rows(t, name);
  bool fits = t.scalar_type() == like.scalar_type() && t.dim() == 3;
  int64_t d = 0;
  for (int64_t size : shape) fits = fits && t.size(d++) == size;
  LMFAST_CHECK(fits, name, " does not have the dtype or the shape the others give");
}

AdditiveAttentionArgs arguments(const Tensor& query, const Tensor& keys, const Tensor& values,
                                const Tensor& v, const std::optional<Tensor>& mask) {
  LMFAST_CHECK(query.dim() == 3 && keys.dim() == 3 && values.dim() == 3,
               "query, keys and values must have three dimensions");
  AdditiveAttentionArgs a{};
  a.dtype = dtype_of(keys, "keys");
  LMFAST_CHECK(a.dtype != DType::kF64, "no kernel for float64");
  a.batch = keys.size(0);
  a.queries = query.size(1);
  a.keys = keys.size(1);
  a.score_dim = keys.size(2);
  a.value_dim = values.size(2);
  LMFAST_CHECK(a.keys < INT32_MAX, "too many keys: ", a.keys);
  check_float(query, "query", {a.batch, a.queries, a.score_dim});
  check_float(v, "v", {a.score_dim});
  check_storage(keys, "keys", keys, {a.batch, a.keys, a.score_dim});
  check_storage(values, "values", keys, {a.batch, a.keys, a.value_dim});
  a.query = static_cast<const float*>(query.const_data_ptr());
  a.key = keys.const_data_ptr();
  a.key_batch = keys.stride(0);
  a.key_row = keys.stride(1);
  a.value = values.const_data_ptr();
  a.value_batch = values.stride(0);
  a.value_row = values.stride(1);
  a.v = static_cast<const float*>(v.const_data_ptr());
  if (mask.has_value()) {
    LMFAST_CHECK(mask->is_cpu() && mask->scalar_type() == ScalarType::Bool &&
                     mask->is_contiguous() && mask->dim() == 2 && mask->size(0) == a.batch &&
                     mask->size(1) == a.keys,
                 "mask must be a contiguous bool CPU tensor (B, S)");
    a.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
  }
  return a;
}

// Runs a kernel over units, each with `floats` of scratch and the list of keys.
void run(additive_attention_fwd_fn kernel, const AdditiveAttentionArgs& a, int64_t units,
         int64_t floats, int64_t elements_per_unit) {
  const int64_t bytes = (floats * 4 + 63) / 64 * 64;
  for_each_unit(
      units, bytes + (a.keys + 1) * 4,
      [&](void* scratch, int64_t unit) {
        AdditiveAttentionArgs mine = a;
        mine.scratch = static_cast<float*>(scratch);
        mine.visible = reinterpret_cast<int32_t*>(static_cast<char*>(scratch) + bytes);
        kernel(mine, unit, unit + 1);
      },
      grain_size(elements_per_unit));
}

std::tuple<Tensor, Tensor> additive_attention(const Tensor& query, const Tensor& keys,
                                              const Tensor& values, const Tensor& v,
                                              const std::optional<Tensor>& mask) {
  AdditiveAttentionArgs a = arguments(query, keys, values, v, mask);
  Tensor context = new_empty(keys, {a.batch, a.queries, a.value_dim});
  Tensor weights = new_empty(query, {a.batch, a.queries, a.keys});
  a.context = context.mutable_data_ptr();
  a.weights = static_cast<float*>(weights.mutable_data_ptr());
  const int64_t blocks = (a.queries + kAdditiveRows - 1) / kAdditiveRows;
  const int64_t rows = std::min(kAdditiveRows, a.queries);
  run(additive_attention_fwd_kernel(), a, a.batch * blocks, kAdditiveRows * (a.keys + 16),
      rows * a.keys * (a.score_dim + a.value_dim));
  return {context, weights};
}

// Sums over `count` slices of `size` floats, in the order of the slices.
void sum_slices(const float* slices, int64_t count, int64_t size, float* out) {
  for (int64_t i = 0; i < size; ++i) {
    double total = 0.0;
    for (int64_t k = 0; k < count; ++k) total += slices[k * size + i];
    out[i] = static_cast<float>(total);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> additive_attention_backward(
    const Tensor& dcontext, const std::optional<Tensor>& dweights, const Tensor& query,
    const Tensor& keys, const Tensor& values, const Tensor& v, const std::optional<Tensor>& mask,
    const Tensor& weights) {
  // Enough parts for many cores when there are few sequences, each of 64 keys at least.
  constexpr int64_t kUnits = 32;
  AdditiveAttentionArgs a = arguments(query, keys, values, v, mask);
  check_storage(dcontext, "dcontext", keys, {a.batch, a.queries, a.value_dim});
  check_float(weights, "weights", {a.batch, a.queries, a.keys});
  a.dcontext = dcontext.const_data_ptr();
  a.dcontext_batch = dcontext.stride(0);
  a.dcontext_row = dcontext.stride(1);
  a.weights = const_cast<float*>(static_cast<const float*>(weights.const_data_ptr()));
  if (dweights.has_value()) {
    check_float(*dweights, "dweights", {a.batch, a.queries, a.keys});
    a.dweights = static_cast<const float*>(dweights->const_data_ptr());
  }
  a.blocks = std::max<int64_t>(
      1, std::min(kUnits / std::max<int64_t>(1, a.batch), a.keys / kAdditiveKeyBlock));
  const int64_t size = a.queries * a.score_dim;
  Tensor dkeys = new_empty(keys, {a.batch, a.keys, a.score_dim});
  Tensor dvalues = new_empty(keys, {a.batch, a.keys, a.value_dim});
  Tensor dquery = new_empty(query, {a.batch, a.queries, a.score_dim});
  Tensor dv = new_empty(query, {a.score_dim});
  Tensor dscores = new_empty(query, {a.batch, a.queries, a.keys});
  Tensor dquery_parts = a.blocks > 1 ? new_empty(query, {a.batch * a.blocks * size}) : dquery;
  Tensor dv_parts = new_empty(query, {a.batch * a.blocks * a.score_dim});
  a.dscores = static_cast<float*>(dscores.mutable_data_ptr());
  a.dquery = static_cast<float*>(dquery_parts.mutable_data_ptr());
  a.dv = static_cast<float*>(dv_parts.mutable_data_ptr());
  a.dkey = dkeys.mutable_data_ptr();
  a.dvalue = dvalues.mutable_data_ptr();
  run(additive_attention_bwd_scores_kernel(), a, a.batch * a.queries, 0, a.keys * a.value_dim);
  run(additive_attention_bwd_kernel(), a, a.batch * a.blocks, size + a.score_dim,
      a.keys / a.blocks * size);
  sum_slices(a.dv, a.batch * a.blocks, a.score_dim, static_cast<float*>(dv.mutable_data_ptr()));
  if (a.blocks > 1) {
    float* out = static_cast<float*>(dquery.mutable_data_ptr());
    parallel_for(0, a.batch, grain_size(a.blocks * size), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        sum_slices(a.dquery + b * a.blocks * size, a.blocks, size, out + b * size);
      }
    });
  }
  return {dquery, dkeys, dvalues, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmfast, CPU, m) {
  m.impl("additive_attention", TORCH_BOX(&additive_attention));
  m.impl("additive_attention_backward", TORCH_BOX(&additive_attention_backward));
}

}  // namespace lmfast
