// lmfast::linear_few_rows on the CPU: checks, threads, registration.
#include "kernels/linear_few_rows.h"

#include "linear_rows.h"

namespace lmfast {
namespace {

using torch::stable::parallel_for;

Tensor linear_few_rows(const Tensor& given, const Tensor& weight, const std::optional<Tensor>& bias,
                       bool relu) {
  LMFAST_CHECK(weight.dim() == 2 && weight.is_cpu(), "weight must be a CPU matrix");
  LinearFewRowsArgs a{};
  a.dtype = dtype_of(weight, "weight");
  a.columns = weight.size(0);
  a.depth = weight.size(1);
  a.by_columns = a.depth > 1 && weight.stride(1) != 1;
  LMFAST_CHECK(!a.by_columns || a.columns <= 1 || weight.stride(0) == 1,
               "weight must have contiguous rows or columns");
  a.stride = weight.stride(a.by_columns ? 1 : 0);
  a.weight = weight.const_data_ptr();
  a.relu = relu;
  const LinearRows x = linear_rows(given, a.depth, false);
  LMFAST_CHECK(x.dtype == a.dtype, "x must have weight's dtype");
  LMFAST_CHECK(x.rows <= kFewRows, "x must have at most ", kFewRows, " rows, got ", x.rows);
  a.rows = x.rows;
  a.x = x.floats;
  a.x_stride = x.stride;
  a.bias = bias_of(bias, x, a.columns);
  Tensor out = result_of(x, a.columns);
  a.out = out.mutable_data_ptr();
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
