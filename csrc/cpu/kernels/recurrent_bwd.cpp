// Elman, LSTM and GRU layers over a whole sequence, backward through time.
//
// A step needs two things: dh = dy + (gates' gradients of the step after it) W_hh, and from dh the
// gradients of its own gates. Both happen in one register tile, so a step has one barrier and its
// dh is never stored. What does not depend on the order of time (gradients of the weights, biases
// and inputs) is left to one matrix product each over all steps; autograd through a loop adds T
// full-size weight gradients instead, which is where PyTorch's small batches lose most.
//
// Floor as in recurrent_fwd.cpp: the product with W_hh. tanh(c) is computed again rather than kept.
#include "recurrent_cells.h"
#include "recurrent_math.h"
#include "recurrent_rounds.h"

namespace lmfast::LMFAST_ISA {
namespace {

// Where a tile's rows are. Null pointers: no later step, or a state of zeros before this one.
struct BwdRows {
  int64_t row, sequence;
  const float* later;  // gates' gradients of the step after
  const float* h;      // state before the step
  const float* c;      // cell state before the step
};

// Gradients of the gates from dh, the gradient of the state after the step, for one vector of
// units; also what reaches the state before the step past the product.
template <Cell kCell>
LMFAST_INLINE void cell_backward(const RecurrentBwdArgs& a, VecF dh, int64_t row, int64_t sequence,
                                 const float* h, const float* c, int64_t unit, int lanes) {
  const int64_t hidden = a.shape.hidden;
  const VecF one = VecF::set1(1.0f);
  float* out = a.dgates + row * gate_gradients_of(kCell) * hidden + unit;
  if constexpr (kCell == Cell::kTanh) {
    const VecF y = VecF::load(a.y + row * hidden + unit, lanes);
    (dh * (one - y * y)).store(out, lanes);
  } else if constexpr (kCell == Cell::kRelu) {
    // y <= 0 ? 0 : dh, so that a NaN lets the gradient through as in PyTorch.
    const VecF y = VecF::load(a.y + row * hidden + unit, lanes);
    select_less(VecF::zero(), y, dh, select_less(y, one, VecF::zero(), dh)).store(out, lanes);
  } else if constexpr (kCell == Cell::kLstm) {
    const float* gates = a.gates + row * 4 * hidden + unit;
    const VecF i = VecF::load(gates, lanes), f = VecF::load(gates + hidden, lanes);
    const VecF g = VecF::load(gates + 2 * hidden, lanes), o = VecF::load(gates + 3 * hidden, lanes);
    const VecF tanh_c = gate_tanh(VecF::load(a.cells + row * hidden + unit, lanes));
    float* carry = a.carry + sequence * hidden + unit;
    const VecF dc = fmadd(dh * o, one - tanh_c * tanh_c, VecF::load(carry, lanes));
    (dc * f).store(carry, lanes);
    (dc * g * i * (one - i)).store(out, lanes);
    (dc * load_or_zero(c, unit, lanes) * f * (one - f)).store(out + hidden, lanes);
    (dc * i * (one - g * g)).store(out + 2 * hidden, lanes);
    (dh * tanh_c * o * (one - o)).store(out + 3 * hidden, lanes);
  } else {
    const float* gates = a.gates + row * 4 * hidden + unit;
    const VecF r = VecF::load(gates, lanes), z = VecF::load(gates + hidden, lanes);
    const VecF n = VecF::load(gates + 2 * hidden, lanes);
    const VecF inner = VecF::load(gates + 3 * hidden, lanes);
    float* carry = a.carry + sequence * hidden + unit;
    dh = dh + VecF::load(carry, lanes);
    (dh * z).store(carry, lanes);
    const VecF dz = dh * (load_or_zero(h, unit, lanes) - n) * z * (one - z);
    const VecF dn = dh * (one - z) * (one - n * n);
    (dn * r).store(out, lanes);
    (dn * inner * r * (one - r)).store(out + hidden, lanes);
    dz.store(out + 2 * hidden, lanes);
    dn.store(out + 3 * hidden, lanes);
  }
}

template <Cell kCell, int kRows, bool kSmall>
__attribute__((noinline)) void bwd_tile(const RecurrentBwdArgs& a, const float* panel, int64_t unit,
                                        const BwdRows& at) {
  constexpr int W = VecF::kWidth;
  const int64_t hidden = a.shape.hidden;
  VecF sum[kRows][kBwdVecs];
  if (at.later != nullptr) {
    multiply<kRows, kBwdVecs, TileParts<kRows, kSmall>::value>(
        sum, at.later, gate_gradients_of(kCell) * hidden, panel, gates_of(kCell) * hidden);
  } else {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kBwdVecs; ++v) {
        const int64_t first = unit + v * W;
        const int64_t from = (at.sequence + r) * hidden + first;
        sum[r][v] = load_or_zero(a.dh_n, from, lanes_at(first, hidden));
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const float* h = at.h == nullptr ? nullptr : at.h + r * hidden;
    const float* c = at.c == nullptr ? nullptr : at.c + r * hidden;
#pragma GCC unroll 4
    for (int v = 0; v < kBwdVecs; ++v) {
      const int64_t first = unit + v * W;
      const int lanes = lanes_at(first, hidden);
      if (lanes == 0) break;
      const VecF dh = sum[r][v] + load_or_zero(a.dy, (at.row + r) * hidden + first, lanes);
      cell_backward<kCell>(a, dh, at.row + r, at.sequence + r, h, c, first, lanes);
    }
  }
}

// The tile of `rows` rows, 1 to kRows.
template <Cell kCell, bool kSmall, int kRows>
LMFAST_INLINE void bwd_tile_of(int rows, const RecurrentBwdArgs& a, const float* panel,
                               int64_t unit, const BwdRows& at) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return bwd_tile_of<kCell, kSmall, kRows - 1>(rows, a, panel, unit, at);
  }
  bwd_tile<kCell, kRows, kSmall>(a, panel, unit, at);
}

// One step, counted from the end of the forward's order, for the sequences [begin, end) and the
// panels [first, last).
template <Cell kCell, bool kSmall>
void bwd_step(const RecurrentBwdArgs& a, int64_t step, int64_t begin, int64_t end, int64_t first,
              int64_t last) {
  const RecurrentShape& s = a.shape;
  const int64_t t = s.reverse ? step : s.steps - 1 - step;
  const int64_t after = s.reverse ? t - 1 : t + 1;
  const int64_t before = s.reverse ? t + 1 : t - 1;
  const int64_t past = least(end, s.sizes[t]);
  // Sequences whose forward went on after this step, and those that had begun before it.
  const int64_t going = least(past, rows_of(s, after));
  const int64_t begun = least(past, rows_of(s, before));
  const int64_t width = gate_gradients_of(kCell) * s.hidden;
  const int64_t depth = gates_of(kCell) * s.hidden;
  constexpr int kMost = kSmall ? kSmallBatch : kBwdRows;
  for (int64_t p = first; p < last; ++p) {
    const float* panel = a.packed + p * depth * kBwdVecs * VecF::kWidth;
    const int64_t unit = p * kBwdVecs * VecF::kWidth;
    const auto run = [&](int64_t b, int rows) {
      BwdRows at{s.offsets[t] + b, b, nullptr, nullptr, nullptr};
      if (b < going) at.later = a.dgates + (s.offsets[after] + b) * width;
      if (b < begun) {
        at.h = a.y + (s.offsets[before] + b) * s.hidden;
        if (kCell == Cell::kLstm) at.c = a.cells + (s.offsets[before] + b) * s.hidden;
      } else {
        if (a.h0 != nullptr) at.h = a.h0 + b * s.hidden;
        if (a.c0 != nullptr) at.c = a.c0 + b * s.hidden;
      }
      bwd_tile_of<kCell, kSmall, kMost>(rows, a, panel, unit, at);
    };
    const int64_t cut = most(begin, least(going, begun)), next = most(begin, most(going, begun));
    for_each_tile<kMost>(begin, least(past, cut), run);
    for_each_tile<kMost>(cut, least(past, next), run);
    for_each_tile<kMost>(next, past, run);
  }
}

using BwdStep = void (*)(const RecurrentBwdArgs&, int64_t, int64_t, int64_t, int64_t, int64_t);

template <Cell kCell>
BwdStep bwd_step_for(int64_t batch) {
  return batch <= kSmallBatch ? bwd_step<kCell, true> : bwd_step<kCell, false>;
}

BwdStep bwd_step_of(const RecurrentShape& s) {
  switch (s.cell) {
    case Cell::kTanh:
      return bwd_step_for<Cell::kTanh>(s.batch);
    case Cell::kRelu:
      return bwd_step_for<Cell::kRelu>(s.batch);
    case Cell::kLstm:
      return bwd_step_for<Cell::kLstm>(s.batch);
    case Cell::kGru:
      return bwd_step_for<Cell::kGru>(s.batch);
  }
  return nullptr;
}

int64_t bwd_panels(const RecurrentShape& s) {
  constexpr int64_t kLanes = kBwdVecs * VecF::kWidth;
  return (s.hidden + kLanes - 1) / kLanes;
}

}  // namespace

void recurrent_bwd_rows(const RecurrentBwdArgs& a, int64_t begin, int64_t end) {
  const BwdStep run = bwd_step_of(a.shape);
  const int64_t panels = bwd_panels(a.shape);
  for (int64_t step = 0; step < a.shape.steps; ++step) run(a, step, begin, end, 0, panels);
}

void recurrent_bwd_together(const RecurrentBwdArgs& a, int64_t, int64_t) {
  const BwdStep run = bwd_step_of(a.shape);
  const int64_t panels = bwd_panels(a.shape), chunks = a.progress->chunks;
  run_rounds(*a.progress, a.shape.steps, [&](int64_t step, int64_t chunk) {
    run(a, step, 0, a.shape.batch, chunk * panels / chunks, (chunk + 1) * panels / chunks);
  });
}

}  // namespace lmfast::LMFAST_ISA
