// lmfast::linear_amx on the CPU: checks, chunks of the depth, threads, registration.
#include <algorithm>
#include <optional>

#include "bf16_products.h"
#include "kernels/linear_amx.h"
#include "product_operand.h"
#include "scratch.h"

namespace lmfast {
namespace {

using torch::stable::new_empty;
using torch::stable::parallel_for;

LinearOperand operand(const Tensor& t, const char* name) {
  const ProductOperand m = product_operand(t, name);
  return {m.data, m.by_columns, m.stride};
}

Tensor linear_amx(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                  bool relu, int64_t parts) {
  const bool products = current_isa() == Isa::kAvx512 && has_bf16_products();
  LMFAST_CHECK(current_isa() == Isa::kAmx || (products && parts == 1),
               "linear_amx needs a processor with AMX, or with AVX512-BF16 for one part");
  LMFAST_CHECK(parts == 1 || parts == 3, "parts must be 1 or 3, got ", parts);
  LinearAmxArgs a{};
  a.a = operand(x, "x");
  a.b = operand(weight, "weight");
  LMFAST_CHECK(x.size(1) == weight.size(1), "x and weight must have rows of one length");
  a.rows = x.size(0);
  a.columns = weight.size(0);
  a.depth = x.size(1);
  a.parts = static_cast<int>(parts);
  a.relu = relu;
  if (bias.has_value()) {
    LMFAST_CHECK(bias->is_cpu() && bias->dim() == 1 && bias->size(0) == a.columns &&
                     bias->is_contiguous() && dtype_of(*bias, "bias") == DType::kF32,
                 "bias must be a contiguous float32 vector of ", a.columns, " elements");
    a.bias = static_cast<const float*>(bias->const_data_ptr());
  }
  Tensor out = new_empty(x, {a.rows, a.columns});
  a.out = static_cast<float*>(out.mutable_data_ptr());

  // A chunk of the depth keeps a block of x in half of the second-level cache.
  const int64_t chunk = parts == 1 ? 64 : 24;
  constexpr int64_t kBlockBytes = 1 << 20;
  const int64_t all_steps = std::max<int64_t>(1, (a.depth + 31) / 32);
  const int64_t longest = std::min(all_steps, chunk);
  const int64_t panel = parts * kPanelStep * longest;
  const int64_t panels = (a.columns + 31) / 32;
  // As even as they get, the same number for every thread: who gets which changes no sum.
  const int64_t most = 32 * std::clamp<int64_t>(kBlockBytes / panel, 1, 8);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t blocks = ((a.rows + most - 1) / most + threads - 1) / threads * threads;
  a.block = std::max<int64_t>(1, (a.rows + 32 * blocks - 1) / (32 * blocks)) * 32;
  a.hot_steps = parts == 1 ? 8 : chunk;
  const ScratchMemory packed = allocate_scratch(panels * panel);
  a.packed_b = static_cast<char*>(packed.get());
  const auto pack = linear_amx_pack_kernel();
  const auto multiply = linear_amx_multiply_kernel();
  const int64_t units = (a.rows + a.block - 1) / a.block;
  for (int64_t step = 0; step < all_steps; step += longest) {
    a.first = 32 * step;
    a.steps = std::min(longest, all_steps - step);
    a.is_first = step == 0;
    a.is_last = step + a.steps == all_steps;
    parallel_for(0, panels, grain_size(32 * 32 * a.steps),
                 [&](int64_t begin, int64_t end) { pack(a, begin, end); });
    for_each_unit(units, a.block / 32 * (kLinearTileBytes + panel), [&](void* scratch, int64_t i) {
      LinearAmxArgs mine = a;
      mine.scratch = scratch;
      multiply(mine, i, i + 1);
    });
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmfast, CPU, m) { m.impl("linear_amx", TORCH_BOX(&linear_amx)); }

}  // namespace lmfast
