// lmfast::linear_few_rows on the CPU: checks, threads, registration.
#include "kernels/linear_few_rows.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "scratch.h"

namespace lmfast {
namespace {

using torch::stable::new_empty;
using torch::stable::parallel_for;

Tensor linear_few_rows(const Tensor& given, const Tensor& weight, const std::optional<Tensor>& bias,
                       bool relu) {
  const bool as_it_lies = given.is_contiguous() || (given.dim() == 2 && given.stride(1) == 1);
  const Tensor x = as_it_lies ? given : torch::stable::contiguous(given);
  check_rows(x, "x");
  LMFAST_CHECK(weight.dim() == 2 && weight.is_cpu(), "weight must be a CPU matrix");
  LinearFewRowsArgs a{};
  a.dtype = dtype_of(weight, "weight");
  LMFAST_CHECK(a.dtype != DType::kF64 && dtype_of(x, "x") == a.dtype,
               "x must have weight's dtype, float32, bfloat16 or float16");
  const int64_t last = x.dim() - 1;
  a.columns = weight.size(0);
  a.depth = weight.size(1);
  LMFAST_CHECK(x.size(last) == a.depth, "x and weight must have rows of one length");
  std::vector<int64_t> shape;
  a.rows = 1;
  for (int64_t d = 0; d < last; ++d) {
    shape.push_back(x.size(d));
    a.rows *= x.size(d);
  }
  shape.push_back(a.columns);
  LMFAST_CHECK(a.rows <= kFewRows, "x must have at most ", kFewRows, " rows, got ", a.rows);
  a.by_columns = a.depth > 1 && weight.stride(1) != 1;
  LMFAST_CHECK(!a.by_columns || a.columns <= 1 || weight.stride(0) == 1,
               "weight must have contiguous rows or columns");
  a.stride = weight.stride(a.by_columns ? 1 : 0);
  a.weight = weight.const_data_ptr();
  a.relu = relu;
  if (bias.has_value()) {
    LMFAST_CHECK(bias->is_cpu() && bias->dim() == 1 && bias->size(0) == a.columns &&
                     bias->is_contiguous() && dtype_of(*bias, "bias") == a.dtype,
                 "bias must be a contiguous vector of ", a.columns, " elements of weight's dtype");
    a.bias = bias->const_data_ptr();
  }
  Tensor out = new_empty(x, shape);
  a.out = out.mutable_data_ptr();

  const int64_t x_stride = x.dim() == 2 ? x.stride(0) : a.depth;
  ScratchMemory wide = allocate_scratch(0);
  if (a.dtype == DType::kF32) {
    a.x = static_cast<const float*>(x.const_data_ptr());
    a.x_stride = x_stride;
  } else {
    wide = allocate_scratch(a.rows * a.depth * static_cast<int64_t>(sizeof(float)));
    float* floats = static_cast<float*>(wide.get());
    linear_few_rows_widen_kernel()({a.dtype, a.depth, x.const_data_ptr(), x_stride, floats}, 0,
                                   a.rows);
    a.x = floats;
    a.x_stride = a.depth;
  }
  const auto kernel = linear_few_rows_kernel();
  const int64_t units = (a.columns + kFewRowsColumns - 1) / kFewRowsColumns;
  parallel_for(0, units, grain_size(kFewRowsColumns * std::max<int64_t>(a.depth, 1)),
               [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmfast, CPU, m) {
  m.impl("linear_few_rows", TORCH_BOX(&linear_few_rows));
}

}  // namespace lmfast
