// What bindings of the products with few rows share: rows of x as floats, the bias, the result.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "kernels/linear_rows.h"
#include "scratch.h"

namespace lmfast {

struct LinearRows {
  Tensor x;  // what is read, unless `memory` is
  DType dtype = DType::kF32;
  int64_t rows = 1, depth = 0;
  std::vector<int64_t> shape;  // of the result, but for its columns
  ScratchMemory memory{nullptr, &std::free};
  const float* floats = nullptr;
  int64_t stride = 0;
};

// (..., depth) as rows of floats: as they lie where they are fp32, otherwise, and with `apart`
// (even numbers of a row first, then odd ones), in memory that lives as long as what is returned.
inline LinearRows linear_rows(const Tensor& given, int64_t depth, bool apart) {
  const bool as_it_lies = given.is_contiguous() || (given.dim() == 2 && given.stride(1) == 1);
  LinearRows r;
  r.x = as_it_lies ? given : torch::stable::contiguous(given);
  check_rows(r.x, "x");
  r.dtype = dtype_of(r.x, "x");
  LMFAST_CHECK(r.dtype != DType::kF64, "x must be float32, bfloat16 or float16");
  const int64_t last = r.x.dim() - 1;
  LMFAST_CHECK(r.x.size(last) == depth, "x must have rows of ", depth, " numbers");
  r.depth = depth;
  for (int64_t d = 0; d < last; ++d) {
    r.shape.push_back(r.x.size(d));
    r.rows *= r.x.size(d);
  }
  const int64_t x_stride = r.x.dim() == 2 ? r.x.stride(0) : depth;
  if (r.dtype == DType::kF32 && !apart) {
    r.floats = static_cast<const float*>(r.x.const_data_ptr());
    r.stride = x_stride;
    return r;
  }
  r.memory = allocate_scratch(r.rows * depth * static_cast<int64_t>(sizeof(float)));
  float* floats = static_cast<float*>(r.memory.get());
  const LinearRowsArgs args{r.dtype, apart, depth, r.x.const_data_ptr(), x_stride, floats};
  const auto kernel = linear_rows_kernel();
  torch::stable::parallel_for(0, r.rows, grain_size(std::max<int64_t>(depth, 1)),
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  r.floats = floats;
  r.stride = depth;
  return r;
}

// The elements of a bias of `columns`, or null.
inline const void* bias_of(const std::optional<Tensor>& bias, const LinearRows& x,
                           int64_t columns) {
  if (!bias.has_value()) return nullptr;
  LMFAST_CHECK(bias->is_cpu() && bias->dim() == 1 && bias->size(0) == columns &&
                   bias->is_contiguous() && dtype_of(*bias, "bias") == x.dtype,
               "bias must be a contiguous vector of ", columns, " elements of x's dtype");
  return bias->const_data_ptr();
}

// An empty (..., columns) in x's dtype.
inline Tensor result_of(const LinearRows& x, int64_t columns) {
  std::vector<int64_t> shape = x.shape;
  shape.push_back(columns);
  return torch::stable::new_empty(x.x, shape);
}

}  // namespace lmfast
