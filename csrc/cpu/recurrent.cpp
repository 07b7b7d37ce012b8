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

using Given = std::optional<Tensor>;

// One direction of a layer, from the checks to what the operator returns.
struct Forward {
  Steps steps;
  RecurrentFwdArgs a{};
  Tensor y, h_n, c_n, gates, cells;
  ScratchMemory between{nullptr, &std::free}, packed{nullptr, &std::free};
  int64_t units;

  Forward(const Tensor& projected, const Tensor& w_hh, const Given& hidden_bias, const Given& h0,
          const Given& c0, const Given& batch_sizes, int64_t batch, int64_t cell, bool reverse,
          bool keep)
      : steps(cell, reverse, projected.size(0), batch, w_hh.size(1), batch_sizes) {
    const RecurrentShape& s = steps.shape;
    const int64_t rows = projected.size(0), hidden = s.hidden;
    const bool lstm = s.cell == Cell::kLstm;
    const int64_t kept = keep ? kept_gates_of(s.cell) : 0;
    const bool keeps = keeps_cells(s.cell) && keep;
    a.shape = s;
    a.projected = floats(projected, "projected", {rows, gates_of(s.cell) * hidden});
    a.hidden_bias = floats(hidden_bias, "hidden_bias", {hidden});
    a.h0 = floats(h0, "h0", {batch, hidden});
    const float* c_start = floats(c0, "c0", {batch, hidden});
    y = new_empty(projected, {rows, hidden});
    h_n = new_empty(projected, {batch, hidden});
    c_n = new_zeros(projected, {lstm ? batch : 0, hidden});
    gates = new_empty(projected, {kept != 0 ? rows : 0, kept * hidden});
    cells = new_empty(projected, {keeps ? rows : 0, hidden});
    a.y = writable(y);
    a.c = writable(c_n);
    if (kept != 0) a.gates = writable(gates);
    if (keeps) a.cells = writable(cells);
    between = allocate_scratch(rounds_of(s.cell) == 2 ? 2 * batch * hidden * 4 : 0);
    a.between = static_cast<float*>(between.get());
    if (lstm && c_start != nullptr) std::memcpy(a.c, c_start, 4 * batch * hidden);
    units = panels_of(s.cell).fwd;
    if (rows == 0) return;
    packed = pack(s, w_hh, recurrent_pack_fwd_kernel(), units);
    a.packed = static_cast<const float*>(packed.get());
  }

  void run() {
    if (steps.shape.steps == 0) return;
    run_steps(a, units, 4, recurrent_fwd_rows_kernel(), recurrent_fwd_together_kernel());
  }
  void run_alone() { recurrent_fwd_rows_kernel()(a, 0, a.shape.batch); }

  // The state after each sequence's last step.
  void finish() {
    const RecurrentShape& s = a.shape;
    float* last = writable(h_n);
    if (s.steps == 0) {
      a.h0 != nullptr ? std::memcpy(last, a.h0, 4 * s.batch * s.hidden)
                      : std::memset(last, 0, 4 * s.batch * s.hidden);
      return;
    }
    int64_t t = s.reverse ? 0 : s.steps - 1;
    for (int64_t b = 0; b < s.batch; ++b) {
      while (s.sizes[t] <= b) --t;
      std::memcpy(last + b * s.hidden, a.y + (s.offsets[t] + b) * s.hidden, 4 * s.hidden);
    }
  }
};

struct Backward {
  Steps steps;
  RecurrentBwdArgs a{};
  Tensor dgates, carry;
  ScratchMemory packed{nullptr, &std::free};
  int64_t units;

  Backward(const Given& dy, const Given& dh_n, const Given& dc_n, const Tensor& y,
           const Tensor& gates, const Tensor& cells, const Tensor& w_hh, const Given& h0,
           const Given& c0, const Given& batch_sizes, int64_t batch, int64_t cell, bool reverse)
      : steps(cell, reverse, y.size(0), batch, w_hh.size(1), batch_sizes) {
    const RecurrentShape& s = steps.shape;
    const int64_t rows = y.size(0), hidden = s.hidden;
    const bool lstm = s.cell == Cell::kLstm;
    const int64_t kept = kept_gates_of(s.cell);
    a.shape = s;
    a.y = floats(y, "y", {rows, hidden});
    a.dy = floats(dy, "dy", {rows, hidden});
    a.dh_n = floats(dh_n, "dh_n", {batch, hidden});
    a.h0 = floats(h0, "h0", {batch, hidden});
    a.c0 = floats(c0, "c0", {batch, hidden});
    if (kept != 0) a.gates = floats(gates, "gates", {rows, kept * hidden});
    if (lstm) a.cells = floats(cells, "cells", {rows, hidden});
    const float* dc = floats(dc_n, "dc_n", {batch, hidden});
    dgates = new_empty(y, {rows, gate_gradients_of(s.cell) * hidden});
    carry = new_zeros(y, {kept != 0 ? batch : 0, hidden});
    a.dgates = writable(dgates);
    a.carry = writable(carry);
    if (lstm && dc != nullptr) std::memcpy(a.carry, dc, 4 * batch * hidden);
    units = panels_of(s.cell).bwd;
    if (rows == 0) return;
    packed = pack(s, w_hh, recurrent_pack_bwd_kernel(), units);
    a.packed = static_cast<const float*>(packed.get());
  }

  void run() {
    if (steps.shape.steps == 0) return;
    run_steps(a, units, 4, recurrent_bwd_rows_kernel(), recurrent_bwd_together_kernel());
  }
  void run_alone() { recurrent_bwd_rows_kernel()(a, 0, a.shape.batch); }
};

// Both directions of a layer: one to a thread where that keeps the threads busy, without any
// barrier; else one after the other, each by all threads.
template <class Run>
void run_both(Run& first, Run& second) {
  const RecurrentShape& s = first.a.shape;
  if (s.steps > 0 && one_direction_to_a_thread(s)) {
    torch::stable::parallel_for(0, 2, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) (i == 0 ? first : second).run_alone();
    });
    return;
  }
  first.run();
  second.run();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> recurrent_forward(Tensor projected, Tensor w_hh,
                                                                     Given hidden_bias, Given h0,
                                                                     Given c0, Given batch_sizes,
                                                                     int64_t batch, int64_t cell,
                                                                     bool reverse, bool keep) {
  Forward f(projected, w_hh, hidden_bias, h0, c0, batch_sizes, batch, cell, reverse, keep);
  f.run();
  f.finish();
  return {f.y, f.h_n, f.c_n, f.gates, f.cells};
}

std::tuple<Tensor, Tensor> recurrent_backward(Given dy, Given dh_n, Given dc_n, Tensor y,
                                              Tensor gates, Tensor cells, Tensor w_hh, Given h0,
                                              Given c0, Given batch_sizes, int64_t batch,
                                              int64_t cell, bool reverse) {
  Backward b(dy, dh_n, dc_n, y, gates, cells, w_hh, h0, c0, batch_sizes, batch, cell, reverse);
  b.run();
  return {b.dgates, b.carry};
}

// Operands of the forward direction, then of the reverse one; an empty list stands for None.
using Both = std::vector<Tensor>;

Given at(const Both& list, size_t direction) {
  return list.empty() ? Given() : Given(list[direction]);
}
void check_both(const Both& list, const char* name, bool may_be_empty) {
  LMFAST_CHECK(list.size() == 2 || (may_be_empty && list.empty()), name,
               " must have one tensor for each direction, got ", list.size());
}

Both recurrent_forward_both(Both projected, Both w_hh, Both hidden_bias, Both h0, Both c0,
                            Given batch_sizes, int64_t batch, int64_t cell, bool keep) {
  check_both(projected, "projected", false);
  check_both(w_hh, "w_hh", false);
  check_both(hidden_bias, "hidden_bias", true);
  check_both(h0, "h0", true);
  check_both(c0, "c0", true);
  const auto make = [&](size_t i) {
    return Forward(projected[i], w_hh[i], at(hidden_bias, i), at(h0, i), at(c0, i), batch_sizes,
                   batch, cell, i == 1, keep);
  };
  Forward first = make(0), second = make(1);
  run_both(first, second);
  first.finish();
  second.finish();
  return {first.y,  first.h_n,  first.c_n,  first.gates,  first.cells,
          second.y, second.h_n, second.c_n, second.gates, second.cells};
}

Both recurrent_backward_both(Both dy, Both dh_n, Both dc_n, Both y, Both gates, Both cells,
                             Both w_hh, Both h0, Both c0, Given batch_sizes, int64_t batch,
                             int64_t cell) {
  for (const auto& [list, name] :
       {std::pair{&y, "y"}, {&gates, "gates"}, {&cells, "cells"}, {&w_hh, "w_hh"}}) {
    check_both(*list, name, false);
  }
  for (const auto& [list, name] :
       {std::pair{&dy, "dy"}, {&dh_n, "dh_n"}, {&dc_n, "dc_n"}, {&h0, "h0"}, {&c0, "c0"}}) {
    check_both(*list, name, true);
  }
  const auto make = [&](size_t i) {
    return Backward(at(dy, i), at(dh_n, i), at(dc_n, i), y[i], gates[i], cells[i], w_hh[i],
                    at(h0, i), at(c0, i), batch_sizes, batch, cell, i == 1);
  };
  Backward first = make(0), second = make(1);
  run_both(first, second);
  return {first.dgates, first.carry, second.dgates, second.carry};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmfast, CPU, m) {
  m.impl("recurrent_forward", TORCH_BOX(&recurrent_forward));
  m.impl("recurrent_backward", TORCH_BOX(&recurrent_backward));
  m.impl("recurrent_forward_both", TORCH_BOX(&recurrent_forward_both));
  m.impl("recurrent_backward_both", TORCH_BOX(&recurrent_backward_both));
}

}  // namespace lmfast
