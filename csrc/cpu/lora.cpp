// lmfast::lora_update_ and its backward on the CPU: checks, threads, registration.
#include "kernels/lora.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../common/tensor.h"

namespace lmfast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::new_empty;
using torch::stable::parallel_for;

ScalarType accumulator(DType dtype) {
  return dtype == DType::kF64 ? ScalarType::Double : ScalarType::Float;
}

// The distance between the rows of a matrix.
int64_t check_matrix(const Tensor& t, const char* name, DType dtype, int64_t rows,
                     int64_t columns) {
  check_rows(t, name);
  LMFAST_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, " must be (", rows,
               ", ", columns, ")");
  LMFAST_CHECK(dtype_of(t, name) == dtype, name, " has another dtype than the rest");
  return t.stride(0);
}

// Copies (rows, columns) with any strides and between storage types; factors are small.
template <class From, class To>
void copy_matrix(const From* from, int64_t from_row, int64_t from_column, To* to, int64_t to_row,
                 int64_t to_column, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      to[i * to_row + j * to_column] = static_cast<To>(from[i * from_row + j * from_column]);
    }
  }
}

// Calls f with a null pointer to the type that numbers of `dtype` are read as.
template <class F>
void with_number(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kF64:
      return f(static_cast<double*>(nullptr));
    case DType::kF32:
      return f(static_cast<float*>(nullptr));
    case DType::kBF16:
      return f(static_cast<torch::headeronly::BFloat16*>(nullptr));
    case DType::kF16:
      return f(static_cast<torch::headeronly::Half*>(nullptr));
  }
}

// A factor as kernels read it: (R, columns), contiguous, in the type of sums. A transposed one is
// given as (columns, R).
Tensor packed(const Tensor& t, const char* name, DType dtype, int64_t rank, int64_t columns,
              bool transposed) {
  LMFAST_CHECK(t.is_cpu() && t.dim() == 2 && t.size(transposed) == rank &&
                   t.size(!transposed) == columns && dtype_of(t, name) == dtype,
               name, " does not fit");
  Tensor out = new_empty(t, {rank, columns}, accumulator(dtype));
  with_number(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto copy = [&](auto* to) {
      copy_matrix(static_cast<const T*>(t.const_data_ptr()), t.stride(transposed),
                  t.stride(!transposed), to, columns, 1, rank, columns);
    };
    void* to = out.mutable_data_ptr();
    dtype == DType::kF64 ? copy(static_cast<double*>(to)) : copy(static_cast<float*>(to));
  });
  return out;
}

// The gradient of a factor from its sums (R, columns).
Tensor unpacked(const Tensor& sums, const Tensor& like, bool transposed) {
  const int64_t rank = sums.size(0), columns = sums.size(1);
  const DType dtype = dtype_of(like, "like");
  if (!transposed && dtype_of(sums, "sums") == dtype) return sums;
  Tensor out = new_empty(
      like, transposed ? std::vector<int64_t>{columns, rank} : std::vector<int64_t>{rank, columns});
  with_number(dtype, [&](auto* to) {
    using T = std::remove_pointer_t<decltype(to)>;
    const auto copy = [&](const auto* from) {
      copy_matrix(from, columns, 1, static_cast<T*>(out.mutable_data_ptr()),
                  transposed ? 1 : columns, transposed ? rank : 1, rank, columns);
    };
    const void* from = sums.const_data_ptr();
    dtype == DType::kF64 ? copy(static_cast<const double*>(from))
                         : copy(static_cast<const float*>(from));
  });
  return out;
}

void run_rows(const LoraRowsArgs& a, int64_t rows) {
  const auto kernel = lora_rows_kernel();
  const int64_t work = std::max<int64_t>(a.rank, 1) * (a.depth + (a.out == nullptr ? 0 : a.width));
  // Multiples of four rows: the kernel's tile.
  const int64_t tiles = (rows + 3) / 4;
  parallel_for(0, tiles, grain_size(work),
               [&](int64_t begin, int64_t end) { kernel(a, begin * 4, std::min(end * 4, rows)); });
}

// y += scale (x a) b, and x a.
Tensor lora_update_(const Tensor& y, const Tensor& x, const Tensor& a, const Tensor& b,
                    double scale) {
  const DType dtype = dtype_of(x, "x");
  LMFAST_CHECK(x.dim() == 2 && a.dim() == 2 && b.dim() == 2, "x, a and b must be matrices");
  const int64_t rows = x.size(0), rank = b.size(0);
  LoraRowsArgs args{};
  args.dtype = dtype;
  args.rank = rank;
  args.depth = x.size(1);
  args.width = b.size(1);
  args.inner_scale = 1.0;
  args.out_scale = scale;
  args.x_stride = check_matrix(x, "x", dtype, rows, args.depth);
  args.out_stride = check_matrix(y, "y", dtype, rows, args.width);
  const Tensor a_rows = packed(a, "a", dtype, rank, args.depth, true);
  const Tensor b_rows = packed(b, "b", dtype, rank, args.width, false);
  Tensor inner = new_empty(x, {rows, rank}, accumulator(dtype));
  args.x = x.const_data_ptr();
  args.x_factor = a_rows.const_data_ptr();
  args.inner = inner.mutable_data_ptr();
  args.out = y.mutable_data_ptr();
  args.out_factor = b_rows.const_data_ptr();
  run_rows(args, rows);
  return inner;
}

// The gradients of a and b; dx += scale (dy b^T) a^T where dx is given.
std::tuple<Tensor, Tensor> lora_update_backward_(const std::optional<Tensor>& dx, const Tensor& dy,
                                                 const Tensor& x, const Tensor& inner,
                                                 const Tensor& a, const Tensor& b, double scale) {
  const DType dtype = dtype_of(x, "x");
  LMFAST_CHECK(x.dim() == 2 && a.dim() == 2 && b.dim() == 2, "x, a and b must be matrices");
  const int64_t rows = x.size(0), depth = x.size(1), width = b.size(1), rank = b.size(0);
  const Tensor a_rows = packed(a, "a", dtype, rank, depth, true);
  const Tensor b_rows = packed(b, "b", dtype, rank, width, false);
  LMFAST_CHECK(inner.is_cpu() && inner.scalar_type() == accumulator(dtype) && inner.dim() == 2 &&
                   inner.size(0) == rows && inner.size(1) == rank && inner.is_contiguous(),
               "inner does not fit");
  LoraRowsArgs args{};
  args.dtype = dtype;
  args.rank = rank;
  args.depth = width;
  args.width = depth;
  args.inner_scale = scale;
  args.out_scale = 1.0;
  args.x_stride = check_matrix(dy, "dy", dtype, rows, width);
  const int64_t x_stride = check_matrix(x, "x", dtype, rows, depth);
  Tensor dinner = new_empty(x, {rows, rank}, accumulator(dtype));
  args.x = dy.const_data_ptr();
  args.x_factor = b_rows.const_data_ptr();
  args.inner = dinner.mutable_data_ptr();
  if (dx.has_value()) {
    args.out_stride = check_matrix(*dx, "dx", dtype, rows, depth);
    args.out = dx->mutable_data_ptr();
    args.out_factor = a_rows.const_data_ptr();
  }
  run_rows(args, rows);

  Tensor da = new_empty(x, {rank, depth}, accumulator(dtype));
  Tensor db = new_empty(x, {rank, width}, accumulator(dtype));
  const LoraSumsArgs of_a{dtype,
                          rank,
                          rows,
                          depth,
                          1.0,
                          dinner.const_data_ptr(),
                          x.const_data_ptr(),
                          x_stride,
                          da.mutable_data_ptr()};
  const LoraSumsArgs of_b{dtype,  rank,          rows,
                          width,  scale,         inner.const_data_ptr(),
                          args.x, args.x_stride, db.mutable_data_ptr()};
  const auto kernel = lora_sums_kernel();
  // Strips of columns: whole cache lines of bf16, a part of the first-level cache.
  constexpr int64_t kStrip = 64;
  const int64_t strips_a = (depth + kStrip - 1) / kStrip, strips_b = (width + kStrip - 1) / kStrip;
  parallel_for(0, strips_a + strips_b,
               grain_size(kStrip * std::max<int64_t>(rank, 1) * std::max<int64_t>(rows, 1)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   const bool first = i < strips_a;
                   const LoraSumsArgs& of = first ? of_a : of_b;
                   const int64_t column = (first ? i : i - strips_a) * kStrip;
                   kernel(of, column, std::min(column + kStrip, of.width));
                 }
               });
  return {unpacked(da, a, true), unpacked(db, b, false)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmfast, CPU, m) {
  m.impl("lora_update_", TORCH_BOX(&lora_update_));
  m.impl("lora_update_backward_", TORCH_BOX(&lora_update_backward_));
}

}  // namespace lmfast
