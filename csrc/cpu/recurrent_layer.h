// One layer and direction of a recurrent call: its checks, its memory, its loop over time.
#pragma once

#include "recurrent_schedule.h"

namespace lmfast {

// W_hh repacked; the panels are divided over threads.
inline ScratchMemory pack_state_weights(const RecurrentShape& s, const Tensor& w_hh,
                                        recurrent_pack_fwd_fn kernel, int64_t units) {
  const int64_t gates = gates_of(s.cell);
  LMFAST_CHECK(w_hh.is_cpu() && dtype_of(w_hh, "w_hh") == DType::kF32 && w_hh.dim() == 2 &&
                   w_hh.size(0) == gates * s.hidden && w_hh.size(1) == s.hidden,
               "w_hh must be a float32 CPU matrix (gates * hidden, hidden)");
  const int64_t panels = (s.hidden + units - 1) / units;
  ScratchMemory packed = allocate_scratch(panels * units * gates * s.hidden * 4);
  RecurrentPackArgs a{
      s.cell,         s.hidden,       static_cast<const float*>(w_hh.const_data_ptr()),
      w_hh.stride(0), w_hh.stride(1), static_cast<float*>(packed.get())};
  torch::stable::parallel_for(0, panels, grain_size(units * gates * s.hidden),
                              [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return packed;
}

inline RecurrentPanels panels_of(Cell cell) {
  RecurrentPanels panels{};
  recurrent_panels_kernel()({cell, &panels}, 0, 1);
  return panels;
}

using Given = std::optional<Tensor>;

// One tensor for each direction or layer; an empty list stands for None.
using Tensors = std::vector<Tensor>;
struct NamedList {
  const Tensors* list;
  const char* name;
};

inline Given at(const Tensors& list, size_t i) { return list.empty() ? Given() : Given(list[i]); }

inline void check_lists(size_t size, std::initializer_list<NamedList> needed,
                        std::initializer_list<NamedList> optional) {
  for (const NamedList& n : needed) {
    LMFAST_CHECK(n.list->size() == size, n.name, " must have ", size, " tensors, got ",
                 n.list->size());
  }
  for (const NamedList& n : optional) {
    LMFAST_CHECK(n.list->empty() || n.list->size() == size, n.name, " must have ", size,
                 " tensors or none, got ", n.list->size());
  }
}

// From the checks to what the operator returns; a.projected is the caller's.
struct Forward {
  Steps steps;
  RecurrentFwdArgs a{};
  Tensor y, h_n, c_n, gates, cells;
  ScratchMemory between{nullptr, &std::free}, packed{nullptr, &std::free};
  int64_t units;

  // like: a tensor of N rows.
  Forward(const Tensor& like, const Tensor& w_hh, const Given& hidden_bias, const Given& h0,
          const Given& c0, const Given& batch_sizes, int64_t batch, int64_t cell, bool reverse,
          bool keep)
      : steps(cell, reverse, like.size(0), batch, w_hh.size(1), batch_sizes) {
    const RecurrentShape& s = steps.shape;
    const int64_t rows = like.size(0), hidden = s.hidden;
    const bool lstm = s.cell == Cell::kLstm;
    const int64_t kept = keep ? kept_gates_of(s.cell) : 0;
    const bool keeps = keeps_cells(s.cell) && keep;
    a.shape = s;
    a.part = {0, s.steps, 0};
    a.hidden_bias = floats(hidden_bias, "hidden_bias", {hidden});
    a.h0 = floats(h0, "h0", {batch, hidden});
    const float* c_start = floats(c0, "c0", {batch, hidden});
    y = torch::stable::new_empty(like, {rows, hidden});
    h_n = torch::stable::new_empty(like, {batch, hidden});
    c_n = torch::stable::new_zeros(like, {lstm ? batch : 0, hidden});
    gates = torch::stable::new_empty(like, {kept != 0 ? rows : 0, kept * hidden});
    cells = torch::stable::new_empty(like, {keeps ? rows : 0, hidden});
    a.y = writable(y);
    a.c = writable(c_n);
    if (kept != 0) a.gates = writable(gates);
    if (keeps) a.cells = writable(cells);
    between = allocate_scratch(rounds_of(s.cell) == 2 ? 2 * batch * hidden * 4 : 0);
    a.between = static_cast<float*>(between.get());
    if (lstm && c_start != nullptr) std::memcpy(a.c, c_start, 4 * batch * hidden);
    units = panels_of(s.cell).fwd;
    if (rows == 0) return;
    packed = pack_state_weights(s, w_hh, recurrent_pack_fwd_kernel(), units);
    a.packed = static_cast<const float*>(packed.get());
  }

  // projected: (N, G*H).
  void set_products(const Tensor& projected) {
    const RecurrentShape& s = a.shape;
    a.projected = floats(projected, "projected", {y.size(0), gates_of(s.cell) * s.hidden});
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
    a.part = {0, s.steps, 0};
    a.y = floats(y, "y", {rows, hidden});
    a.dy = floats(dy, "dy", {rows, hidden});
    a.dh_n = floats(dh_n, "dh_n", {batch, hidden});
    a.h0 = floats(h0, "h0", {batch, hidden});
    a.c0 = floats(c0, "c0", {batch, hidden});
    if (kept != 0) a.gates = floats(gates, "gates", {rows, kept * hidden});
    if (lstm) a.cells = floats(cells, "cells", {rows, hidden});
    const float* dc = floats(dc_n, "dc_n", {batch, hidden});
    dgates = torch::stable::new_empty(y, {rows, gate_gradients_of(s.cell) * hidden});
    carry = torch::stable::new_zeros(y, {kept != 0 ? batch : 0, hidden});
    a.dgates = writable(dgates);
    a.carry = writable(carry);
    if (lstm && dc != nullptr) std::memcpy(a.carry, dc, 4 * batch * hidden);
    units = panels_of(s.cell).bwd;
    if (rows == 0) return;
    packed = pack_state_weights(s, w_hh, recurrent_pack_bwd_kernel(), units);
    a.packed = static_cast<const float*>(packed.get());
  }

  void run() {
    if (steps.shape.steps == 0) return;
    run_steps(a, units, 4, recurrent_bwd_rows_kernel(), recurrent_bwd_together_kernel());
  }
  void run_alone() { recurrent_bwd_rows_kernel()(a, 0, a.shape.batch); }
};

}  // namespace lmfast
