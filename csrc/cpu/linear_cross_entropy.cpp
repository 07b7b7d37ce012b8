// lmfast::linear_cross_entropy on the CPU: checks, rows to leave out, registration.
#include "linear_cross_entropy.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>

#include "bf16_products.h"

namespace lmfast {

using torch::stable::empty_like;
using torch::stable::new_empty;
using torch::stable::parallel_for;

Tensor lce_floats(const LceCall& call, int64_t count) {
  return new_empty(call.like, {std::max<int64_t>(count, 1)}, torch::headeronly::ScalarType::Float);
}

void lce_store_dweight(const LceCall& call, const float* from, int64_t padded_width) {
  const LceConvertArgs a{call.p.weight_dtype,
                         call.p.width,
                         padded_width,
                         from,
                         call.dweight.mutable_data_ptr(),
                         call.dweight.stride(0),
                         call.dweight.stride(1)};
  const auto kernel = lce_convert_kernel();
  parallel_for(0, call.p.classes, grain_size(call.p.width),
               [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

const float* lce_uniform(const LceCall& call, Tensor* buffer, float* bias) {
  const int64_t groups = (call.p.width + kLceGroup - 1) / kLceGroup;
  *buffer = lce_floats(call, groups * kLceGroup);
  const LceHiddenSumArgs a{call.p, -call.p.smoothing / static_cast<float>(call.p.classes),
                           static_cast<float*>(buffer->mutable_data_ptr())};
  const auto kernel = lce_hidden_sum_kernel();
  parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  double total = 0.0;
  for (float s : call.scale) total += s;
  *bias = static_cast<float>(total * a.factor);
  return a.out;
}

namespace {

enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

const float* float_vector(const std::optional<Tensor>& t, int64_t size, const char* name) {
  if (!t.has_value()) return nullptr;
  LMFAST_CHECK(t->is_cpu() && t->dim() == 1 && t->size(0) == size && t->is_contiguous() &&
                   dtype_of(*t, name) == DType::kF32,
               name, " must be a contiguous float32 CPU vector of ", size, " elements");
  return static_cast<const float*>(t->const_data_ptr());
}

// Element size in bytes of a kernel type.
int64_t size_of(DType dtype) { return dtype == DType::kF64 ? 8 : dtype == DType::kF32 ? 4 : 2; }

// Rows that have a target, their targets and the gradients of their losses.
void select_rows(LceCall& call, const Tensor& targets, const float* dloss, int64_t ignore_index,
                 int64_t reduction) {
  const int64_t rows = targets.size(0);
  const int64_t* target = static_cast<const int64_t*>(targets.const_data_ptr());
  call.row.reserve(rows);
  call.target.reserve(rows);
  for (int64_t i = 0; i < rows; ++i) {
    if (target[i] == ignore_index) continue;
    LMFAST_CHECK(target[i] >= 0 && target[i] < call.p.classes, "targets must be in [0, ",
                 call.p.classes, ") or ignore_index ", ignore_index, ", got ", target[i]);
    call.row.push_back(i);
    call.target.push_back(target[i]);
  }
  call.p.tokens = static_cast<int64_t>(call.row.size());
  call.scale.resize(call.p.tokens);
  const float shared = reduction == kMean ? 1.0f / std::max<int64_t>(call.p.tokens, 1) : 1.0f;
  for (int64_t i = 0; i < call.p.tokens; ++i) {
    const float incoming = dloss == nullptr ? 1.0f : dloss[reduction == kNone ? call.row[i] : 0];
    call.scale[i] = shared * incoming;
  }
  call.p.row = call.row.data();
  call.p.target = call.target.data();
  call.p.scale = call.scale.data();
}

void zero_ignored_rows(const LceCall& call, int64_t rows, int64_t row_bytes) {
  char* out = static_cast<char*>(call.p.dhidden);
  size_t next = 0;
  for (int64_t i = 0; i < rows; ++i) {
    if (next < call.row.size() && call.row[next] == i) {
      ++next;
    } else {
      std::memset(out + i * row_bytes, 0, row_bytes);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy(
    const Tensor& hidden, const Tensor& weight, const Tensor& targets,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& dloss,
    const std::optional<Tensor>& mean, int64_t ignore_index, int64_t reduction,
    double label_smoothing, double z_loss, double softcap, bool bf16, bool want_dhidden,
    bool want_dweight, bool want_dbias) {
  check_rows(hidden, "hidden");
  LMFAST_CHECK(hidden.dim() == 2 && weight.dim() == 2 && weight.is_cpu() &&
                   weight.size(1) == hidden.size(1) && weight.size(0) > 0,
               "hidden must be (N, E) and weight (V, E) with V > 0 on the CPU");
  LMFAST_CHECK(targets.is_cpu() && targets.dim() == 1 && targets.size(0) == hidden.size(0) &&
                   targets.is_contiguous() &&
                   targets.scalar_type() == torch::headeronly::ScalarType::Long,
               "targets must be a contiguous int64 CPU vector with one element per row of hidden");
  LceCall call;
  call.like = hidden;
  LceProblem& p = call.p;
  p.hidden_dtype = dtype_of(hidden, "hidden");
  p.weight_dtype = dtype_of(weight, "weight");
  LMFAST_CHECK(p.hidden_dtype != DType::kF64 && p.weight_dtype != DType::kF64,
               "hidden and weight must not be float64");
  p.classes = weight.size(0);
  p.width = weight.size(1);
  p.hidden = hidden.const_data_ptr();
  p.hidden_stride = hidden.stride(0);
  p.weight = weight.const_data_ptr();
  // The stride of a dimension of one element means nothing; 1 is as good.
  p.weight_row_stride = p.classes == 1 ? 1 : weight.stride(0);
  p.weight_column_stride = p.width <= 1 ? 1 : weight.stride(1);
  LMFAST_CHECK(p.weight_row_stride == 1 || p.weight_column_stride == 1,
               "weight must have stride 1 in one of its dimensions");
  p.bias = float_vector(bias, p.classes, "bias");
  p.mean_weight = float_vector(mean, p.width + 2, "mean");
  p.mean_bias = 0.0;
  if (p.mean_weight != nullptr) {
    p.mean_bias = double(p.mean_weight[p.width]) + double(p.mean_weight[p.width + 1]);
  }
  LMFAST_CHECK((label_smoothing > 0) == (p.mean_weight != nullptr),
               "mean must be given with label_smoothing and only then");
  LMFAST_CHECK(label_smoothing == 0 || softcap == 0, "no label_smoothing with softcap");
  LMFAST_CHECK(reduction >= kNone && reduction <= kSum, "reduction must be 0, 1 or 2");
  p.smoothing = static_cast<float>(label_smoothing);
  p.z_loss = static_cast<float>(z_loss);
  p.softcap = static_cast<float>(softcap);
  const float* incoming = float_vector(dloss, reduction == kNone ? targets.size(0) : 1, "dloss");
  select_rows(call, targets, incoming, ignore_index, reduction);

  const auto kFloat = torch::headeronly::ScalarType::Float;
  const int64_t rows = hidden.size(0);
  std::vector<double> losses(p.tokens);
  p.loss = losses.data();
  Tensor dhidden = new_empty(hidden, {want_dhidden ? rows : 0, p.width});
  if (want_dhidden) {
    p.dhidden = dhidden.mutable_data_ptr();
    zero_ignored_rows(call, rows, p.width * size_of(p.hidden_dtype));
  }
  call.want_dweight = want_dweight;
  call.dweight = want_dweight ? empty_like(weight) : new_empty(weight, {0});
  Tensor dbias = new_empty(hidden, {want_dbias ? p.classes : 0}, kFloat);
  if (want_dbias) call.dbias = static_cast<float*>(dbias.mutable_data_ptr());

  if (p.tokens > 0) {
    const bool rounded = bf16 || (p.hidden_dtype == DType::kBF16 && p.weight_dtype == DType::kBF16);
    if (current_isa() == Isa::kAmx && p.softcap == 0) {
      lce_run_amx(call, rounded ? 1 : 3);
    } else {
      lce_run_blocks(call, rounded && current_isa() >= Isa::kAvx512 && has_bf16_products());
    }
  } else {
    if (want_dweight) torch::stable::zero_(call.dweight);
    if (want_dbias) torch::stable::zero_(dbias);
  }

  Tensor loss =
      reduction == kNone ? new_empty(hidden, {rows}, kFloat) : new_empty(hidden, {}, kFloat);
  float* out = static_cast<float*>(loss.mutable_data_ptr());
  if (reduction == kNone) {
    std::fill(out, out + rows, 0.0f);
    for (int64_t i = 0; i < p.tokens; ++i) out[call.row[i]] = p.loss[i];
  } else {
    double sum = 0.0;
    for (int64_t i = 0; i < p.tokens; ++i) sum += p.loss[i];
    *out = static_cast<float>(reduction == kMean ? sum / std::max<int64_t>(p.tokens, 1) : sum);
  }
  return {loss, dhidden, call.dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmfast, CPU, m) {
  m.impl("linear_cross_entropy", TORCH_BOX(&linear_cross_entropy));
}

}  // namespace lmfast
