// lmfast::rope and lmfast::rope_ on the GPU: checks, launch, registration.
#include <algorithm>
#include <optional>
#include <tuple>

#include "kernels/rope.cuh"
#include "launch.h"

namespace lmfast::gpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::empty_like;
using torch::stable::accelerator::DeviceGuard;

RopeOperand describe(const Tensor& in, const Tensor& out, const Tensor& q, const char* name) {
  LMFAST_CHECK(in.dim() == 4, name, " must have 4 dimensions (B, heads, T, D), got ", in.dim());
  check_gpu_rows(in, q, name);
  check_gpu_rows(out, q, name);
  RopeOperand operand{};
  operand.in = in.const_data_ptr();
  operand.out = out.mutable_data_ptr();
  operand.heads = static_cast<int>(in.size(1));
  for (int d = 0; d < 3; ++d) {
    operand.in_stride[d] = in.stride(d);
    operand.out_stride[d] = out.stride(d);
  }
  return operand;
}

void check_table(const Tensor& table, const Tensor& q, const char* name) {
  check_gpu_rows(table, q, name);
  LMFAST_CHECK(table.dim() == 2 && table.is_contiguous(), name,
               " must be a contiguous matrix (length, rotary / 2)");
  LMFAST_CHECK(dtype_of(table, name) == DType::kF32, name, " must be float32");
}

void check_positions(const Tensor& positions, const Tensor& q, Rope& p) {
  LMFAST_CHECK(positions.is_cuda() && positions.get_device_index() == q.get_device_index() &&
                   positions.scalar_type() == ScalarType::Long && positions.is_contiguous(),
               "positions must be a contiguous int64 tensor on q's GPU");
  p.per_token = positions.dim() == 2;
  LMFAST_CHECK(positions.dim() >= 1 && positions.dim() <= 2 && positions.size(0) == q.size(0) &&
                   (!p.per_token || positions.size(1) == p.length),
               "positions must have shape (B,) or (B, T)");
  p.positions = static_cast<const int64_t*>(positions.const_data_ptr());
}

// Whether a head can be walked in vectors of n elements; the tables then are aligned as well.
bool divides(const Rope& p, int n, bool interleaved) {
  const int rotating = interleaved ? p.rotary : p.rotary / 2;
  return rotating % n == 0 && (p.head_dim - p.rotary) % n == 0 &&
         reinterpret_cast<uintptr_t>(p.cos) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(p.sin) % 16 == 0;
}

template <typename T, int N>
void launch(const Rope& p, bool interleaved, int64_t tokens, cudaStream_t stream) {
  const int vectors = rope_vectors(p, N, interleaved);
  const int heads = p.q.heads + p.k.heads;
  const int x = std::min(vectors, kRopeThreads);
  const int y = std::min(kRopeThreads / x, heads);
  // With fewer tokens than multiprocessors, the heads of a token are shared out.
  const int64_t wanted = 2 * multiprocessors() / std::max<int64_t>(1, tokens);
  const int64_t shares = std::clamp<int64_t>(wanted, 1, (heads + y - 1) / y);
  const dim3 grid(static_cast<unsigned>(tokens), static_cast<unsigned>(shares));
  const dim3 block(x, y);
  if (interleaved) {
    rope_kernel<T, N, true><<<grid, block, 0, stream>>>(p);
  } else {
    rope_kernel<T, N, false><<<grid, block, 0, stream>>>(p);
  }
  check_launch("rope_kernel");
}

void rotate(const Tensor& q, const Tensor& k, const Tensor& q_out, const Tensor& k_out,
            const Tensor& cos, const Tensor& sin, const std::optional<Tensor>& positions,
            int64_t offset, bool interleaved, bool inverse, bool inplace) {
  const DType dtype = dtype_of(q, "q");
  LMFAST_CHECK(dtype_of(k, "k") == dtype, "k must have q's dtype");
  Rope p{};
  p.q = describe(q, q_out, q, "q");
  p.k = describe(k, k_out, q, "k");
  LMFAST_CHECK(k.size(0) == q.size(0) && k.size(2) == q.size(2) && k.size(3) == q.size(3),
               "k must have q's batch, length and head size");
  LMFAST_CHECK(q.size(2) < (1 << 30) && q.size(3) < (1 << 20), "q is too large");
  p.length = static_cast<int>(q.size(2));
  p.head_dim = static_cast<int>(q.size(3));
  check_table(cos, q, "cos");
  check_table(sin, q, "sin");
  check_same_shape(cos, sin, "cos", "sin");
  LMFAST_CHECK(2 * cos.size(1) <= p.head_dim, "the tables rotate ", 2 * cos.size(1),
               " dimensions but the head size is ", p.head_dim);
  p.rotary = static_cast<int>(2 * cos.size(1));
  p.cos = static_cast<const float*>(cos.const_data_ptr());
  p.sin = static_cast<const float*>(sin.const_data_ptr());
  p.table_rows = cos.size(0);
  p.offset = offset;
  p.inverse = inverse;
  p.inplace = inplace;
  if (positions.has_value()) check_positions(*positions, q, p);
  const int64_t tokens = q.size(0) * q.size(2);
  if (tokens == 0 || p.head_dim == 0 || p.q.heads + p.k.heads == 0) return;
  LMFAST_CHECK(tokens < (int64_t{1} << 31), "too many tokens for one launch: ", tokens);
  const DeviceGuard guard(q.get_device_index());
  const cudaStream_t stream = current_stream(q);
  with_type(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    constexpr int kVector = kFullVector<T>;
    if (divides(p, kVector, interleaved) && aligned({&q, &k, &q_out, &k_out})) {
      launch<T, kVector>(p, interleaved, tokens, stream);
    } else {
      launch<T, 1>(p, interleaved, tokens, stream);
    }
  });
}

std::tuple<Tensor, Tensor> rope(const Tensor& q, const Tensor& k, const Tensor& cos,
                                const Tensor& sin, const std::optional<Tensor>& positions,
                                int64_t offset, bool interleaved, bool inverse) {
  Tensor q_out = empty_like(q), k_out = empty_like(k);
  rotate(q, k, q_out, k_out, cos, sin, positions, offset, interleaved, inverse, false);
  return {q_out, k_out};
}

void rope_(Tensor q, Tensor k, const Tensor& cos, const Tensor& sin,
           const std::optional<Tensor>& positions, int64_t offset, bool interleaved) {
  rotate(q, k, q, k, cos, sin, positions, offset, interleaved, false, true);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmfast, CUDA, m) {
  m.impl("rope", TORCH_BOX(&rope));
  m.impl("rope_", TORCH_BOX(&rope_));
}

}  // namespace lmfast::gpu
