// lmfast::recurrent_forward and recurrent_backward on the CPU: the loops over time of elman_rnn,
// lstm and gru. Checks, packing, division over threads, registration.
#include <tuple>

#include "recurrent_schedule.h"

namespace lmfast {
namespace {

using torch::stable::new_empty;
using torch::stable::new_zeros;
using torch::stable::parallel_for;

// W_hh repacked; the panels are divided over threads.
ScratchMemory pack(const RecurrentShape& s, const Tensor& w_hh, recurrent_pack_fwd_fn kernel,
                   int64_t units) {
  const int64_t gates = gates_of(s.cell);
  LMFAST_CHECK(w_hh.is_cpu() && dtype_of(w_hh, "w_hh") == DType::kF32 && w_hh.dim() == 2 &&
                   w_hh.size(0) == gates * s.hidden && w_hh.size(1) == s.hidden,
               "w_hh must be a float32 CPU matrix (gates * hidden, hidden)");
  const int64_t panels = (s.hidden + units - 1) / units;
  ScratchMemory packed = allocate_scratch(panels * units * gates * s.hidden * 4);
  RecurrentPackArgs a{
      s.cell,         s.hidden,       static_cast<const float*>(w_hh.const_data_ptr()),
      w_hh.stride(0), w_hh.stride(1), static_cast<float*>(packed.get())};
  parallel_for(0, panels, grain_size(units * gates * s.hidden),
               [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return packed;
}

RecurrentPanels panels_of(Cell cell) {
  RecurrentPanels panels{};
  recurrent_panels_kernel()({cell, &panels}, 0, 1);
  return panels;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> recurrent_forward(
    Tensor projected, Tensor w_hh, std::optional<Tensor> hidden_bias, std::optional<Tensor> h0,
    std::optional<Tensor> c0, std::optional<Tensor> batch_sizes, int64_t batch, int64_t cell,
    bool reverse, bool keep) {
  const int64_t rows = projected.size(0), hidden = w_hh.size(1);
  const Steps steps(cell, reverse, rows, batch, hidden, batch_sizes);
  const RecurrentShape& s = steps.shape;
  const bool lstm = s.cell == Cell::kLstm;
  const int64_t kept = keep ? kept_gates_of(s.cell) : 0;
  RecurrentFwdArgs a{};
  a.shape = s;
  a.projected = floats(projected, "projected", {rows, gates_of(s.cell) * hidden});
  a.hidden_bias = floats(hidden_bias, "hidden_bias", {hidden});
  a.h0 = floats(h0, "h0", {batch, hidden});
  const float* c_start = floats(c0, "c0", {batch, hidden});

  Tensor y = new_empty(projected, {rows, hidden});
  Tensor h_n = new_empty(projected, {batch, hidden});
  Tensor c_n = new_zeros(projected, {lstm ? batch : 0, hidden});
  Tensor gates = new_empty(projected, {kept != 0 ? rows : 0, kept * hidden});
  Tensor cells = new_empty(projected, {keeps_cells(s.cell) && keep ? rows : 0, hidden});
  a.y = writable(y);
  a.c = writable(c_n);
  if (kept != 0) a.gates = writable(gates);
  if (keeps_cells(s.cell) && keep) a.cells = writable(cells);
  const ScratchMemory between =
      allocate_scratch(rounds_of(s.cell) == 2 ? 2 * batch * hidden * 4 : 0);
  a.between = static_cast<float*>(between.get());
  if (lstm && c_start != nullptr) std::memcpy(a.c, c_start, 4 * batch * hidden);

  if (rows > 0) {
    const int64_t units = panels_of(s.cell).fwd;
    const ScratchMemory packed = pack(s, w_hh, recurrent_pack_fwd_kernel(), units);
    a.packed = static_cast<const float*>(packed.get());
    run_steps(a, units, 4, recurrent_fwd_rows_kernel(), recurrent_fwd_together_kernel());
  }
  // The state after each sequence's last step.
  float* last = writable(h_n);
  if (rows == 0) {
    a.h0 != nullptr ? std::memcpy(last, a.h0, 4 * batch * hidden)
                    : std::memset(last, 0, 4 * batch * hidden);
  }
  int64_t t = reverse ? 0 : s.steps - 1;
  for (int64_t b = 0; rows > 0 && b < batch; ++b) {
    while (s.sizes[t] <= b) --t;
    std::memcpy(last + b * hidden, a.y + (s.offsets[t] + b) * hidden, 4 * hidden);
  }
  return {y, h_n, c_n, gates, cells};
}

std::tuple<Tensor, Tensor> recurrent_backward(std::optional<Tensor> dy, std::optional<Tensor> dh_n,
                                              std::optional<Tensor> dc_n, Tensor y, Tensor gates,
                                              Tensor cells, Tensor w_hh, std::optional<Tensor> h0,
                                              std::optional<Tensor> c0,
                                              std::optional<Tensor> batch_sizes, int64_t batch,
                                              int64_t cell, bool reverse) {
  const int64_t rows = y.size(0), hidden = w_hh.size(1);
  const Steps steps(cell, reverse, rows, batch, hidden, batch_sizes);
  const RecurrentShape& s = steps.shape;
  const bool lstm = s.cell == Cell::kLstm;
  const int64_t kept = kept_gates_of(s.cell);
  RecurrentBwdArgs a{};
  a.shape = s;
  a.y = floats(y, "y", {rows, hidden});
  a.dy = floats(dy, "dy", {rows, hidden});
  a.dh_n = floats(dh_n, "dh_n", {batch, hidden});
  a.h0 = floats(h0, "h0", {batch, hidden});
  a.c0 = floats(c0, "c0", {batch, hidden});
  if (kept != 0) a.gates = floats(gates, "gates", {rows, kept * hidden});
  if (lstm) a.cells = floats(cells, "cells", {rows, hidden});
  const float* dc = floats(dc_n, "dc_n", {batch, hidden});

  Tensor dgates = new_empty(y, {rows, gate_gradients_of(s.cell) * hidden});
  Tensor carry = new_zeros(y, {kept != 0 ? batch : 0, hidden});
  a.dgates = writable(dgates);
  a.carry = writable(carry);
  if (lstm && dc != nullptr) std::memcpy(a.carry, dc, 4 * batch * hidden);
  if (rows > 0) {
    const int64_t units = panels_of(s.cell).bwd;
    const ScratchMemory packed = pack(s, w_hh, recurrent_pack_bwd_kernel(), units);
    a.packed = static_cast<const float*>(packed.get());
    run_steps(a, units, 4, recurrent_bwd_rows_kernel(), recurrent_bwd_together_kernel());
  }
  return {dgates, carry};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmfast, CPU, m) {
  m.impl("recurrent_forward", TORCH_BOX(&recurrent_forward));
  m.impl("recurrent_backward", TORCH_BOX(&recurrent_backward));
}

}  // namespace lmfast
