// lmfast::rms_norm, add_rms_norm and their backward on the CPU: checks, threads, registration.
#include "kernels/rms_norm.h"

#include <algorithm>
#include <optional>
#include <tuple>

#include "../common/tensor.h"

namespace lmfast {
namespace {

using torch::stable::empty_like;
using torch::stable::new_empty;
using torch::stable::parallel_for;

struct Weight {
  const void* data = nullptr;
  DType dtype = DType::kF32;
};

Weight check_weight(const std::optional<Tensor>& weight, DType dtype, int64_t width) {
  if (!weight.has_value()) return {nullptr, dtype};
  const Tensor& w = *weight;
  LMFAST_CHECK(w.is_cpu() && w.dim() == 1 && w.size(0) == width && w.is_contiguous(),
               "weight must be a contiguous CPU vector of ", width, " elements");
  const DType type = dtype_of(w, "weight");
  LMFAST_CHECK(type == dtype || type == DType::kF32, "weight must have x's dtype or be float32");
  return {w.const_data_ptr(), type};
}

// Weight gradients are summed over blocks of rows whose size depends on the shape alone: short
// chains of additions, at least 8 rows so that the partial sums stay small beside x.
int64_t rows_per_block(int64_t width) {
  constexpr int64_t kElements = 32768;
  return std::clamp<int64_t>(kElements / std::max<int64_t>(1, width), 8, 32);
}

void forward(const Tensor& x, const Tensor* residual, const std::optional<Tensor>& weight,
             double eps, const Tensor& y, const Tensor* sum) {
  check_rows(x, "x");
  check_rows(y, "y");
  RmsNormFwdArgs a{};
  a.dtype = dtype_of(x, "x");
  a.width = x.size(x.dim() - 1);
  a.eps = eps;
  const Weight w = check_weight(weight, a.dtype, a.width);
  a.weight = w.data;
  a.weight_dtype = w.dtype;
  a.x = x.const_data_ptr();
  a.y = y.mutable_data_ptr();
  if (residual != nullptr) {
    check_rows(*residual, "residual");
    check_rows(*sum, "sum");
    check_same_shape(x, *residual, "x", "residual");
    LMFAST_CHECK(dtype_of(*residual, "residual") == a.dtype, "residual must have x's dtype");
    a.residual = residual->const_data_ptr();
    a.sum = sum->mutable_data_ptr();
  }
  a.rows = row_layout({&x, &y, residual, sum});
  const auto kernel = rms_norm_fwd_kernel();
  parallel_for(0, a.rows.count, grain_size(a.width),
               [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

Tensor rms_norm(const Tensor& x, const std::optional<Tensor>& weight, double eps) {
  Tensor y = empty_like(x);
  forward(x, nullptr, weight, eps, y, nullptr);
  return y;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual,
                                        const std::optional<Tensor>& weight, double eps) {
  Tensor y = empty_like(x), sum = empty_like(x);
  forward(x, &residual, weight, eps, y, &sum);
  return {y, sum};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy, const Tensor& x,
                                             const std::optional<Tensor>& weight, double eps,
                                             const std::optional<Tensor>& dsum, bool need_dweight) {
  check_rows(x, "x");
  check_rows(dy, "dy");
  check_same_shape(x, dy, "x", "dy");
  RmsNormBwdArgs a{};
  a.dtype = dtype_of(x, "x");
  LMFAST_CHECK(dtype_of(dy, "dy") == a.dtype, "dy must have x's dtype");
  a.width = x.size(x.dim() - 1);
  a.eps = eps;
  const Weight w = check_weight(weight, a.dtype, a.width);
  a.weight = w.data;
  a.weight_dtype = w.dtype;
  Tensor dx = empty_like(x);
  a.x = x.const_data_ptr();
  a.dy = dy.const_data_ptr();
  a.dx = dx.mutable_data_ptr();
  if (dsum.has_value()) {
    check_rows(*dsum, "dsum");
    check_same_shape(x, *dsum, "x", "dsum");
    LMFAST_CHECK(dtype_of(*dsum, "dsum") == a.dtype, "dsum must have x's dtype");
    a.dsum = dsum->const_data_ptr();
  }
  a.rows = row_layout({&x, &dy, &dx, dsum.has_value() ? &*dsum : nullptr});
  a.rows_per_block = rows_per_block(a.width);
  const int64_t blocks = (a.rows.count + a.rows_per_block - 1) / a.rows_per_block;

  const bool dweight_wanted = need_dweight && weight.has_value();
  const bool fp64 = a.dtype == DType::kF64;
  Tensor dweight = dweight_wanted ? empty_like(*weight) : new_empty(x, {0});
  Tensor partial;
  if (dweight_wanted) {
    const auto type =
        fp64 ? torch::headeronly::ScalarType::Double : torch::headeronly::ScalarType::Float;
    partial = new_empty(x, {blocks, a.width}, type);
    a.dweight_blocks = partial.mutable_data_ptr();
  }
  const auto kernel = rms_norm_bwd_kernel();
  parallel_for(0, blocks, grain_size(a.width * a.rows_per_block),
               [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  if (dweight_wanted) {
    RmsNormDweightArgs r{fp64,    w.dtype,          blocks,
                         a.width, a.dweight_blocks, dweight.mutable_data_ptr()};
    const auto reduce = rms_norm_dweight_kernel();
    // Columns are independent; whole cache lines to a thread.
    constexpr int64_t kLine = 64;
    const int64_t lines = (a.width + kLine - 1) / kLine;
    parallel_for(0, lines, grain_size(kLine * blocks), [&](int64_t begin, int64_t end) {
      reduce(r, begin * kLine, std::min(end * kLine, a.width));
    });
  }
  return {dx, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmfast, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace lmfast
