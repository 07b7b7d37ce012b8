// lmfast::recurrent_bf16_forward and recurrent_bf16_backward on the CPU: the loops over time of
// elman_rnn, lstm and gru with bf16 products, on AMX or by AVX512-BF16.
#include "kernels/recurrent_bf16.h"

#include <tuple>

#include "bf16_products.h"
#include "recurrent_schedule.h"

namespace lmfast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::new_empty;
using torch::stable::new_zeros;

// A contiguous CPU tensor (first, second) of bf16.
const bf16* narrow(const Tensor& t, const char* name, int64_t first, int64_t second) {
  LMFAST_CHECK(t.is_cpu() && dtype_of(t, name) == DType::kBF16 && t.is_contiguous(), name,
               " must be a contiguous bfloat16 CPU tensor");
  LMFAST_CHECK(t.dim() == 2 && t.size(0) == first && t.size(1) == second, name,
               " has a wrong shape");
  return static_cast<const bf16*>(t.const_data_ptr());
}
const bf16* narrow(const std::optional<Tensor>& t, const char* name, int64_t first,
                   int64_t second) {
  return t.has_value() ? narrow(*t, name, first, second) : nullptr;
}
bf16* narrow_out(Tensor& t) { return static_cast<bf16*>(t.mutable_data_ptr()); }

void check_shape(const RecurrentShape& s) {
  LMFAST_CHECK(current_isa() == Isa::kAmx || (current_isa() == Isa::kAvx512 && has_bf16_products()),
               "bf16 recurrent loops need AMX or AVX512-BF16");
  LMFAST_CHECK(s.cell != Cell::kGruTextbook && s.hidden % 32 == 0,
               "bf16 recurrent loops need a hidden size that is a multiple of 32, got ", s.hidden);
}

ScratchMemory pack(const RecurrentShape& s, const Tensor& w_hh, bool backward) {
  const int64_t gates = gates_of(s.cell);
  RecurrentBf16PackArgs a{s.cell, backward, s.hidden, dtype_of(w_hh, "w_hh"), nullptr, nullptr};
  LMFAST_CHECK(w_hh.is_cpu() && w_hh.is_contiguous() && w_hh.dim() == 2 &&
                   w_hh.size(0) == gates * s.hidden &&
                   (a.dtype == DType::kF32 || a.dtype == DType::kBF16),
               "w_hh must be a contiguous float32 or bfloat16 CPU matrix (gates * hidden, hidden)");
  ScratchMemory packed = allocate_scratch(recurrent_bf16_pack_bytes(s.cell, backward, s.hidden));
  a.w = w_hh.const_data_ptr();
  a.packed = packed.get();
  const auto kernel = recurrent_bf16_pack_kernel();
  const int64_t units = recurrent_bf16_units(s.cell, backward);
  torch::stable::parallel_for(0, recurrent_bf16_panels(s.cell, backward, s.hidden),
                              grain_size(units * gates * s.hidden),
                              [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return packed;
}

// y, y unrounded (empty unless wide), h_n, c_n, gates, cells.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> recurrent_bf16_forward(
    Tensor projected, Tensor w_hh, std::optional<Tensor> bias, std::optional<Tensor> hidden_bias,
    std::optional<Tensor> h0, std::optional<Tensor> c0, std::optional<Tensor> batch_sizes,
    int64_t batch, int64_t cell, bool reverse, bool keep, bool wide) {
  const int64_t rows = projected.size(0), hidden = w_hh.size(1);
  const Steps steps(cell, reverse, rows, batch, hidden, batch_sizes);
  const RecurrentShape& s = steps.shape;
  check_shape(s);
  const bool lstm = s.cell == Cell::kLstm;
  const int64_t kept = keep ? kept_gates_of(s.cell) : 0;
  RecurrentBf16FwdArgs a{};
  a.shape = s;
  a.projected = narrow(projected, "projected", rows, gates_of(s.cell) * hidden);
  a.bias = floats(bias, "bias", {gates_of(s.cell) * hidden});
  a.hidden_bias = floats(hidden_bias, "hidden_bias", {hidden});
  const float* h_start = floats(h0, "h0", {batch, hidden});
  const float* c_start = floats(c0, "c0", {batch, hidden});

  Tensor y = new_empty(projected, {rows, hidden});
  Tensor y_wide = new_empty(projected, {wide ? rows : 0, hidden}, ScalarType::Float);
  Tensor h_n = new_zeros(projected, {batch, hidden}, ScalarType::Float);
  Tensor c_n = new_zeros(projected, {lstm ? batch : 0, hidden}, ScalarType::Float);
  Tensor gates = new_empty(projected, {kept != 0 ? rows : 0, kept * hidden});
  Tensor cells = new_empty(projected, {lstm && keep ? rows : 0, hidden});
  Tensor first;
  if (h_start != nullptr) {
    std::memcpy(writable(h_n), h_start, 4 * batch * hidden);
    first = torch::stable::to(*h0, ScalarType::BFloat16);
    a.h0 = narrow(first, "h0", batch, hidden);
  }
  if (lstm && c_start != nullptr) std::memcpy(writable(c_n), c_start, 4 * batch * hidden);
  a.h = writable(h_n);
  a.c = writable(c_n);
  a.y = narrow_out(y);
  if (wide) a.y_wide = writable(y_wide);
  if (kept != 0) a.gates = narrow_out(gates);
  if (lstm && keep) a.cells = narrow_out(cells);
  if (rows > 0) {
    const ScratchMemory packed = pack(s, w_hh, false);
    a.packed = packed.get();
    run_steps(a, recurrent_bf16_units(s.cell, false), 2, recurrent_bf16_fwd_rows_kernel(),
              recurrent_bf16_fwd_together_kernel());
  }
  return {y, y_wide, h_n, c_n, gates, cells};
}

std::tuple<Tensor, Tensor> recurrent_bf16_backward(
    std::optional<Tensor> dy, std::optional<Tensor> dh_n, std::optional<Tensor> dc_n, Tensor y,
    Tensor gates, Tensor cells, Tensor w_hh, std::optional<Tensor> h0, std::optional<Tensor> c0,
    std::optional<Tensor> batch_sizes, int64_t batch, int64_t cell, bool reverse) {
  const int64_t rows = y.size(0), hidden = w_hh.size(1);
  const Steps steps(cell, reverse, rows, batch, hidden, batch_sizes);
  const RecurrentShape& s = steps.shape;
  check_shape(s);
  const bool lstm = s.cell == Cell::kLstm;
  const int64_t kept = kept_gates_of(s.cell);
  RecurrentBf16BwdArgs a{};
  a.shape = s;
  a.y = narrow(y, "y", rows, hidden);
  if (dy.has_value()) {
    a.dy_dtype = dtype_of(*dy, "dy");
    a.dy = a.dy_dtype == DType::kF32 ? static_cast<const void*>(floats(*dy, "dy", {rows, hidden}))
                                     : narrow(*dy, "dy", rows, hidden);
  }
  a.dh_n = floats(dh_n, "dh_n", {batch, hidden});
  a.h0 = narrow(h0, "h0", batch, hidden);
  a.c0 = narrow(c0, "c0", batch, hidden);
  if (kept != 0) a.gates = narrow(gates, "gates", rows, kept * hidden);
  if (lstm) a.cells = narrow(cells, "cells", rows, hidden);
  const float* dc = floats(dc_n, "dc_n", {batch, hidden});

  Tensor dgates = new_empty(y, {rows, gate_gradients_of(s.cell) * hidden});
  Tensor carry = new_zeros(y, {kept != 0 ? batch : 0, hidden}, ScalarType::Float);
  a.dgates = narrow_out(dgates);
  a.carry = writable(carry);
  if (lstm && dc != nullptr) std::memcpy(a.carry, dc, 4 * batch * hidden);
  if (rows > 0) {
    const ScratchMemory packed = pack(s, w_hh, true);
    a.packed = packed.get();
    run_steps(a, recurrent_bf16_units(s.cell, true), 2, recurrent_bf16_bwd_rows_kernel(),
              recurrent_bf16_bwd_together_kernel());
  }
  return {dgates, carry};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmfast, CPU, m) {
  m.impl("recurrent_bf16_forward", TORCH_BOX(&recurrent_bf16_forward));
  m.impl("recurrent_bf16_backward", TORCH_BOX(&recurrent_bf16_backward));
}

}  // namespace lmfast
