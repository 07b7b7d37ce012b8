// lmfast::rope and lmfast::rope_ on the CPU: checks, threads, registration.
#include "kernels/rope.h"

#include <optional>
#include <tuple>

#include "../common/tensor.h"

namespace lmfast {
namespace {

using torch::headeronly::ScalarType;
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

// Positions come from memory or from an offset; every one must have a row in the tables.
void check_positions(const std::optional<Tensor>& positions, int64_t offset, int64_t batch,
                     int64_t length, int64_t rows, RopeArgs& a) {
  int64_t lowest = offset, highest = offset + length - 1;
  if (positions.has_value()) {
    const Tensor& p = *positions;
    LMFAST_CHECK(p.is_cpu() && p.scalar_type() == ScalarType::Long && p.is_contiguous(),
                 "positions must be a contiguous int64 CPU tensor");
    const bool per_row = p.dim() == 1 && p.size(0) == batch;
    const bool per_token = p.dim() == 2 && p.size(0) == batch && p.size(1) == length;
    LMFAST_CHECK(per_row || per_token, "positions must have shape (B,) or (B, T)");
    const int64_t* data = static_cast<const int64_t*>(p.const_data_ptr());
    (per_row ? a.starts : a.positions) = data;
    if (p.numel() > 0) lowest = highest = data[0];
    for (int64_t i = 0; i < p.numel(); ++i) {
      lowest = data[i] < lowest ? data[i] : lowest;
      highest = data[i] > highest ? data[i] : highest;
    }
    if (per_row) highest += length - 1;
  }
  if (batch == 0 || length == 0) return;
  LMFAST_CHECK(lowest >= 0 && highest < rows, "positions reach from ", lowest, " to ", highest,
               " but cos and sin have rows for 0 to ", rows - 1,
               "; build longer tables with rope_tables(length, ...)");
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
  LMFAST_CHECK(
      cos.is_cpu() && sin.is_cpu() && cos.dim() == 2 && cos.is_contiguous() && sin.is_contiguous(),
      "cos and sin must be contiguous CPU matrices (length, rotary / 2)");
  check_same_shape(cos, sin, "cos", "sin");
  const DType table = dtype_of(cos, "cos");
  LMFAST_CHECK(table == dtype_of(sin, "sin") &&
                   (table == DType::kF32 || (table == DType::kF64 && a.dtype == DType::kF64)),
               "cos and sin must be float32, or float64 with float64 q and k");
  a.fp64_tables = table == DType::kF64;
  a.rotary = 2 * cos.size(1);
  LMFAST_CHECK(a.rotary <= a.head_dim, "the tables rotate ", a.rotary,
               " dimensions but the head size is ", a.head_dim);
  a.interleaved = interleaved;
  a.inverse = inverse;
  a.cos = cos.const_data_ptr();
  a.sin = sin.const_data_ptr();
  a.offset = offset;
  check_positions(positions, offset, a.batch, a.length, cos.size(0), a);
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
