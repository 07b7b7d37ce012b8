// lmfast::quantised_linear on the CPU: checks, threads, registration.
#include "kernels/quantised_linear.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "scratch.h"

namespace lmfast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::new_empty;
using torch::stable::parallel_for;

Tensor quantised_linear(const Tensor& given, const Tensor& codes, const Tensor& scales,
                        const std::optional<Tensor>& bias) {
  const bool as_it_lies = given.is_contiguous() || (given.dim() == 2 && given.stride(1) == 1);
  const Tensor x = as_it_lies ? given : torch::stable::contiguous(given);
  check_rows(x, "x");
  const bool nibbles = codes.scalar_type() == ScalarType::Byte;
  LMFAST_CHECK(nibbles || codes.scalar_type() == ScalarType::Char, "codes must be int8 or uint8");
  LMFAST_CHECK(codes.is_cpu() && codes.dim() == 2 && (codes.size(1) <= 1 || codes.stride(1) == 1),
               "codes must be a CPU matrix with contiguous rows");
  QuantisedLinearArgs a{};
  a.dtype = dtype_of(x, "x");
  a.scale_type = dtype_of(scales, "scales");
  LMFAST_CHECK(a.dtype != DType::kF64 && a.scale_type != DType::kF64,
               "x and scales must be float32, bfloat16 or float16");
  a.nibbles = nibbles;
  const int64_t last = x.dim() - 1;
  a.columns = codes.size(0);
  a.depth = codes.size(1) * (nibbles ? 2 : 1);
  LMFAST_CHECK(x.size(last) == a.depth, "x must have rows of ", a.depth, " numbers");
  std::vector<int64_t> shape;
  a.rows = 1;
  for (int64_t d = 0; d < last; ++d) {
    shape.push_back(x.size(d));
    a.rows *= x.size(d);
  }
  shape.push_back(a.columns);
  a.codes = codes.const_data_ptr();
  a.stride = codes.stride(0);
  LMFAST_CHECK(scales.is_cpu() && scales.is_contiguous() && scales.dim() == (nibbles ? 2 : 1) &&
                   scales.size(0) == a.columns,
               "scales must be contiguous, with a row for each of codes");
  a.scales = scales.const_data_ptr();
  a.group = 2;
  if (nibbles) {
    a.scales_stride = scales.size(1);
    if (a.depth > 0) {
      LMFAST_CHECK(a.scales_stride > 0 && a.depth % a.scales_stride == 0 &&
                       a.depth / a.scales_stride % 2 == 0,
                   "groups must be even and divide the depth");
      a.group = a.depth / a.scales_stride;
    }
  }
  if (bias.has_value()) {
    LMFAST_CHECK(bias->is_cpu() && bias->dim() == 1 && bias->size(0) == a.columns &&
                     bias->is_contiguous() && dtype_of(*bias, "bias") == a.dtype,
                 "bias must be a contiguous vector of ", a.columns, " elements of x's dtype");
    a.bias = bias->const_data_ptr();
  }
  Tensor out = new_empty(x, shape);
  a.out = out.mutable_data_ptr();

  const int64_t x_stride = x.dim() == 2 ? x.stride(0) : a.depth;
  ScratchMemory floats = allocate_scratch(0);
  if (a.dtype == DType::kF32 && !nibbles) {
    a.x = static_cast<const float*>(x.const_data_ptr());
    a.x_stride = x_stride;
  } else {
    floats = allocate_scratch(a.rows * a.depth * static_cast<int64_t>(sizeof(float)));
    a.x = static_cast<float*>(floats.get());
    a.x_stride = a.depth;
    const QuantisedRowsArgs rows{
        a.dtype, nibbles, a.depth, x.const_data_ptr(), x_stride, static_cast<float*>(floats.get())};
    const auto lay_out = quantised_linear_rows_kernel();
    parallel_for(0, a.rows, grain_size(std::max<int64_t>(a.depth, 1)),
                 [&](int64_t begin, int64_t end) { lay_out(rows, begin, end); });
  }
  const auto kernel = quantised_linear_kernel();
  const int64_t units = (a.columns + kQuantisedColumns - 1) / kQuantisedColumns;
  const int64_t work = kQuantisedColumns * std::max<int64_t>(a.depth, 1);
  parallel_for(0, units, grain_size(work * std::max<int64_t>(a.rows, 1)),
               [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmfast, CPU, m) {
  m.impl("quantised_linear", TORCH_BOX(&quantised_linear));
}

}  // namespace lmfast
