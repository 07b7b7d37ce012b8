// lmfast::rms_norm, add_rms_norm and their backward on the GPU: checks, launches, registration.
#include <algorithm>
#include <optional>
#include <tuple>

#include "kernels/rms_norm.cuh"
#include "launch.h"

namespace lmfast::gpu {
namespace {

using torch::stable::empty_like;
using torch::stable::new_empty;
using torch::stable::accelerator::DeviceGuard;

struct Weight {
  const void* data = nullptr;
  DType dtype = DType::kF32;
};

Weight check_weight(const std::optional<Tensor>& weight, const Tensor& x, DType dtype) {
  if (!weight.has_value()) return {nullptr, dtype};
  const Tensor& w = *weight;
  const int64_t width = x.size(x.dim() - 1);
  check_gpu_rows(w, x, "weight");
  LMFAST_CHECK(w.dim() == 1 && w.size(0) == width, "weight must be a vector of ", width,
               " elements");
  const DType type = dtype_of(w, "weight");
  LMFAST_CHECK(type == dtype || type == DType::kF32, "weight must have x's dtype or be float32");
  return {w.const_data_ptr(), type};
}

void check_operand(const Tensor& t, const Tensor& x, const char* name) {
  check_gpu_rows(t, x, name);
  check_same_shape(x, t, "x", name);
  LMFAST_CHECK(t.scalar_type() == x.scalar_type(), name, " must have x's dtype");
}

int width_of(const Tensor& x) {
  const int64_t width = x.size(x.dim() - 1);
  LMFAST_CHECK(width <= (1 << 30), "rows of more than 2^30 elements are not supported");
  return static_cast<int>(width);
}

dim3 block_of(int vectors, int most) {
  const BlockShape shape = rms_norm_block(vectors, most);
  return dim3(shape.threads_per_row, shape.rows);
}

unsigned blocks_for(int64_t rows, const dim3& block) {
  const int64_t blocks = (rows + block.y - 1) / block.y;
  LMFAST_CHECK(blocks < (int64_t{1} << 31), "too many rows for one launch: ", rows);
  return static_cast<unsigned>(blocks);
}

// Calls launch(Type<T>, Type<W>, vector length as an integral constant).
template <typename Launch>
void with_types(DType dtype, DType weight, bool vectors, Launch launch) {
  with_type(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const auto with_vector = [&](auto w) {
      if (vectors) {
        launch(t, w, std::integral_constant<int, kFullVector<T>>{});
      } else {
        launch(t, w, std::integral_constant<int, 1>{});
      }
    };
    if (weight == dtype) {
      with_vector(t);
    } else {
      with_vector(Type<float>{});
    }
  });
}

bool vector_width(const Tensor& x, int width) {
  return width % (16 / static_cast<int>(x.element_size())) == 0;
}

void forward(const Tensor& x, const Tensor* residual, const std::optional<Tensor>& weight,
             double eps, const Tensor& y, const Tensor* sum) {
  check_gpu_rows(x, x, "x");
  check_gpu_rows(y, x, "the result");
  RmsNormFwd p{};
  const DType dtype = dtype_of(x, "x");
  p.width = width_of(x);
  p.eps = static_cast<float>(eps);
  const Weight w = check_weight(weight, x, dtype);
  p.weight = w.data;
  p.x = x.const_data_ptr();
  p.y = y.mutable_data_ptr();
  if (residual != nullptr) {
    check_operand(*residual, x, "residual");
    p.residual = residual->const_data_ptr();
    p.sum = sum->mutable_data_ptr();
  }
  p.rows = row_layout({&x, &y, residual, sum});
  if (p.rows.count == 0 || p.width == 0) return;
  const Tensor* weight_tensor = weight.has_value() ? &*weight : nullptr;
  const bool vectors = vector_width(x, p.width) && aligned({&x, &y, residual, sum, weight_tensor});
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x);
  with_types(dtype, w.dtype, vectors, [&](auto t, auto w_type, auto n) {
    using T = typename decltype(t)::type;
    using W = typename decltype(w_type)::type;
    const dim3 block = block_of(p.width / n, kMaxFwdThreads);
    rms_norm_fwd_kernel<T, W, n><<<blocks_for(p.rows.count, block), block, 0, stream>>>(p);
  });
  check_launch("rms_norm_fwd_kernel");
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
  check_gpu_rows(x, x, "x");
  check_operand(dy, x, "dy");
  RmsNormBwd p{};
  const DType dtype = dtype_of(x, "x");
  p.width = width_of(x);
  p.eps = static_cast<float>(eps);
  const Weight w = check_weight(weight, x, dtype);
  p.weight = w.data;
  Tensor dx = empty_like(x);
  p.x = x.const_data_ptr();
  p.dy = dy.const_data_ptr();
  p.dx = dx.mutable_data_ptr();
  const Tensor* dsum_tensor = dsum.has_value() ? &*dsum : nullptr;
  if (dsum_tensor != nullptr) {
    check_operand(*dsum_tensor, x, "dsum");
    p.dsum = dsum_tensor->const_data_ptr();
  }
  p.rows = row_layout({&x, &dy, &dx, dsum_tensor});
  const bool dweight_wanted = need_dweight && weight.has_value();
  Tensor dweight = dweight_wanted ? empty_like(*weight) : new_empty(x, {0});
  if (p.rows.count == 0 || p.width == 0) {
    if (dweight_wanted) torch::stable::zero_(dweight);
    return {dx, dweight};
  }
  const Tensor* weight_tensor = weight.has_value() ? &*weight : nullptr;
  const bool vectors =
      vector_width(x, p.width) && aligned({&x, &dy, &dx, dsum_tensor, weight_tensor});
  const int per_vector = vectors ? 16 / static_cast<int>(x.element_size()) : 1;
  const dim3 block = block_of(p.width / per_vector, kMaxBwdThreads);

  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x);
  // 512 threads per multiprocessor have 64 KB of loads under way, enough to cover the memory's
  // latency; more blocks would only write more partial rows.
  const unsigned most = multiprocessors() * std::max(1u, 512 / (block.x * block.y));
  const unsigned blocks = std::min(blocks_for(p.rows.count, block), most);
  Tensor partial =
      new_empty(x, {dweight_wanted ? blocks : 0, p.width}, torch::headeronly::ScalarType::Float);
  if (dweight_wanted) p.partial = static_cast<float*>(partial.mutable_data_ptr());
  with_types(dtype, w.dtype, vectors, [&](auto t, auto w_type, auto n) {
    using T = typename decltype(t)::type;
    using W = typename decltype(w_type)::type;
    rms_norm_bwd_kernel<T, W, n><<<blocks, block, 0, stream>>>(p);
  });
  check_launch("rms_norm_bwd_kernel");
  if (dweight_wanted) {
    with_type(w.dtype, [&](auto w_type) {
      using W = typename decltype(w_type)::type;
      const unsigned columns = (p.width + kSumColumns - 1) / kSumColumns;
      add_partial_rows_kernel<<<columns, dim3(kSumColumns, kSumSlices), 0, stream>>>(
          p.partial, static_cast<W*>(dweight.mutable_data_ptr()), static_cast<int>(blocks),
          p.width);
    });
    check_launch("add_partial_rows_kernel");
  }
  return {dx, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmfast, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace lmfast::gpu
