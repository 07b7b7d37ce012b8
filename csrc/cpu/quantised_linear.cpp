// lmfast::quantised_linear on the CPU: checks, threads, registration.
#include "kernels/quantised_linear.h"

#include "linear_rows.h"

namespace lmfast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;

Tensor quantised_linear(const Tensor& given, const Tensor& codes, const Tensor& scales,
                        const std::optional<Tensor>& bias) {
  QuantisedLinearArgs a{};
  a.nibbles = codes.scalar_type() == ScalarType::Byte;
  LMFAST_CHECK(a.nibbles || codes.scalar_type() == ScalarType::Char, "codes must be int8 or uint8");
  LMFAST_CHECK(codes.is_cpu() && codes.dim() == 2 && (codes.size(1) <= 1 || codes.stride(1) == 1),
               "codes must be a CPU matrix with contiguous rows");
  a.columns = codes.size(0);
  a.depth = codes.size(1) * (a.nibbles ? 2 : 1);
  a.codes = codes.const_data_ptr();
  a.stride = codes.stride(0);
  a.scale_type = dtype_of(scales, "scales");
  LMFAST_CHECK(a.scale_type != DType::kF64, "scales must be float32, bfloat16 or float16");
  LMFAST_CHECK(scales.is_cpu() && scales.is_contiguous() && scales.dim() == (a.nibbles ? 2 : 1) &&
                   scales.size(0) == a.columns,
               "scales must be contiguous, with a row for each of codes");
  a.scales = scales.const_data_ptr();
  a.group = 2;
  if (a.nibbles) {
    a.scales_stride = scales.size(1);
    if (a.depth > 0) {
      LMFAST_CHECK(a.scales_stride > 0 && a.depth % a.scales_stride == 0 &&
                       a.depth / a.scales_stride % 2 == 0,
                   "groups must be even and divide the depth");
      a.group = a.depth / a.scales_stride;
    }
  }
  const LinearRows x = linear_rows(given, a.depth, a.nibbles);
  a.dtype = x.dtype;
  a.rows = x.rows;
  a.x = x.floats;
  a.x_stride = x.stride;
  a.bias = bias_of(bias, x, a.columns);
  Tensor out = result_of(x, a.columns);
  a.out = out.mutable_data_ptr();
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
