// lmfast::rope and lmfast::rope_ on the CPU: checks, threads, registration.
#include "kernels/rope.h"

#include <optional>
#include <tuple>

#include "../common/tensor.h"
#include "rotation.h"

namespace lmfast {
namespace {

using torch::stable::empty_like;
using torch::stable::parallel_for;

RopeTensor describe(const Tensor& in, const Tensor& out, const char* name) {
  LMFAST_CHECK(in.dim() == 4, name, " must have 4 dimensions (B, heads, T, D), got ", in.dim());
  check_rows(in, name);
  check_rows(out, name);
  RopeTensor t{};
  t.in = in.const_data_ptr();
  t.out = out.mutable_data_ptr();
  t.heads = in.size(1);
  for (int d = 0; d < 3; ++d) {
    t.in_stride[d] = in.stride(d);
    t.out_stride[d] = out.stride(d);
  }
  return t;
}

void rotate(const Tensor& q, const Tensor& k, const Tensor& q_out, const Tensor& k_out,
            const Tensor& cos, const Tensor& sin, const std::optional<Tensor>& positions,
            int64_t offset, bool interleaved, bool inverse) {
  RopeArgs a{};
  a.dtype = dtype_of(q, "q");
  LMFAST_CHECK(dtype_of(k, "k") == a.dtype, "k must have q's dtype");
  a.q = describe(q, q_out, "q");
  a.k = describe(k, k_out, "k");
  a.batch = q.size(0);
  a.length = q.size(2);
  a.head_dim = q.size(3);
  LMFAST_CHECK(k.size(0) == a.batch && k.size(2) == a.length && k.size(3) == a.head_dim,
               "k must have q's batch, length and head size");
  a.interleaved = interleaved;
  a.inverse = inverse;
  set_rotation(cos, sin, positions, offset, a.batch, a);
  a.heads_innermost = a.q.in_stride[1] < a.q.in_stride[2];
  const int64_t vectors = a.batch * (a.q.heads + a.k.heads) * a.length;
  const auto kernel = rope_kernel();
  parallel_for(0, vectors, grain_size(a.head_dim),
               [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

std::tuple<Tensor, Tensor> rope(const Tensor& q, const Tensor& k, const Tensor& cos,
                                const Tensor& sin, const std::optional<Tensor>& positions,
                                int64_t offset, bool interleaved, bool inverse) {
  Tensor q_out = empty_like(q), k_out = empty_like(k);
  rotate(q, k, q_out, k_out, cos, sin, positions, offset, interleaved, inverse);
  return {q_out, k_out};
}

void rope_(Tensor q, Tensor k, const Tensor& cos, const Tensor& sin,
           const std::optional<Tensor>& positions, int64_t offset, bool interleaved) {
  rotate(q, k, q, k, cos, sin, positions, offset, interleaved, false);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmfast, CPU, m) {
  m.impl("rope", TORCH_BOX(&rope));
  m.impl("rope_", TORCH_BOX(&rope_));
}

}  // namespace lmfast
