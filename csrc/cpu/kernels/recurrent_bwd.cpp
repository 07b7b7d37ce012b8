// Elman, LSTM and GRU layers over a whole sequence, backward through time.
//
// A step needs two things: dh = dy + (gates' gradients of the step after it) W_hh, and from dh the
// gradients of its own gates. Both happen in one register tile, so a step has one barrier and its
// dh is never stored. What does not depend on the order of time (gradients of the weights, biases
// and inputs) is left to one matrix product each over all steps; autograd through a loop adds T
// full-size weight gradients instead, which is where PyTorch's small batches lose most.
//
// The textbook's GRU takes two rounds: n and z from dh, then r from the gradient of r h'.
//
// Floor as in recurrent_fwd.cpp: the product with W_hh. tanh(c) of the LSTM is h / o, a reciprocal
// instead of an exponential: where o is so small that this loses digits, so do all its products.
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
template <Cell kCell, int kRound, bool kFull>
LMFAST_INLINE void cell_backward(const RecurrentBwdArgs& a, VecF dh, int64_t row, int64_t sequence,
                                 const float* h, const float* c, int64_t unit,
                                 const Lanes<kFull>& lanes) {
  const int64_t hidden = a.shape.hidden;
  const VecF one = VecF::set1(1.0f);
  float* out = a.dgates + row * gate_gradients_of(kCell) * hidden + unit;
  if constexpr (kCell == Cell::kTanh) {
    const VecF y = lanes.load(a.y + row * hidden + unit);
    lanes.store(dh * (one - y * y), out);
  } else if constexpr (kCell == Cell::kRelu) {
    // y <= 0 ? 0 : dh, so that a NaN lets the gradient through as in PyTorch.
    const VecF y = lanes.load(a.y + row * hidden + unit);
    lanes.store(select_less(VecF::zero(), y, dh, select_less(y, one, VecF::zero(), dh)), out);
  } else if constexpr (kCell == Cell::kLstm) {
    const float* gates = a.gates + row * 4 * hidden + unit;
    const VecF i = lanes.load(gates), f = lanes.load(gates + hidden);
    const VecF g = lanes.load(gates + 2 * hidden), o = lanes.load(gates + 3 * hidden);
    const VecF y = lanes.load(a.y + row * hidden + unit), tanh_c = y / o;
    float* carry = a.carry + sequence * hidden + unit;
    const VecF dc = fmadd(dh * o, one - tanh_c * tanh_c, lanes.load(carry));
    lanes.store(dc * f, carry);
    lanes.store(dc * g * i * (one - i), out);
    lanes.store(dc * lanes.load_or_zero(c, unit) * f * (one - f), out + hidden);
    lanes.store(dc * i * (one - g * g), out + 2 * hidden);
    lanes.store(dh * y * (one - o), out + 3 * hidden);
  } else if constexpr (kCell == Cell::kGruTextbook) {
    const float* gates = a.gates + row * 3 * hidden + unit;
    float* carry = a.carry + sequence * hidden + unit;
    const VecF before = lanes.load_or_zero(h, unit), carried = lanes.load(carry);
    if constexpr (kRound == 0) {
      const VecF z = lanes.load(gates + hidden), n = lanes.load(gates + 2 * hidden);
      dh = dh + carried;
      lanes.store(dh * (one - z), carry);
      lanes.store(dh * (n - before) * z * (one - z), out + hidden);
      lanes.store(dh * z * (one - n * n), out + 2 * hidden);
    } else {  // dh is the gradient of r h'
      const VecF r = lanes.load(gates);
      lanes.store(fmadd(dh, r, carried), carry);
      lanes.store(dh * before * r * (one - r), out);
    }
  } else {
    const float* gates = a.gates + row * 4 * hidden + unit;
    const VecF r = lanes.load(gates), z = lanes.load(gates + hidden);
    const VecF n = lanes.load(gates + 2 * hidden);
    const VecF inner = lanes.load(gates + 3 * hidden);
    float* carry = a.carry + sequence * hidden + unit;
    dh = dh + lanes.load(carry);
    lanes.store(dh * z, carry);
    const VecF dz = dh * (lanes.load_or_zero(h, unit) - n) * z * (one - z);
    const VecF dn = dh * (one - z) * (one - n * n);
    lanes.store(dn * r, out);
    lanes.store(dn * inner * r * (one - r), out + hidden);
    lanes.store(dz, out + 2 * hidden);
    lanes.store(dn, out + 3 * hidden);
  }
}

// The gates' gradients that a round multiplies: how many vectors of H.
template <Cell kCell, int kRound>
constexpr int64_t kFactors = rounds_of(kCell) == 1 ? gates_of(kCell) : 2 - kRound;

// Asks for what the cells of a tile will read and write, a vector of units of a row at a time.
template <Cell kCell, int kRows>
struct BwdAsk {
  static constexpr int64_t count = kRows * kBwdVecs;
  const RecurrentBwdArgs& a;
  const BwdRows& at;
  int64_t unit;

  LMFAST_INLINE void operator()(int64_t i) const {
    constexpr int kKept = kept_gates_of(kCell), kGradients = gate_gradients_of(kCell);
    const int64_t hidden = a.shape.hidden, r = i / kBwdVecs;
    const int64_t row = at.row + r, first = unit + i % kBwdVecs * VecF::kWidth;
    const int64_t here = row * hidden + first;
    if (kKept != 0) ask_for<kKept>(a.gates + row * kKept * hidden + first, hidden);
    if (kKept == 0 || kCell == Cell::kLstm) ask_for<1>(a.y + here, 0);
    if (kCell == Cell::kLstm && at.c != nullptr) ask_for<1>(at.c + r * hidden + first, 0);
    if (a.dy != nullptr) ask_for<1>(a.dy + here - a.part.row * hidden, 0);
    ask_for<kGradients, true>(a.dgates + row * kGradients * hidden + first, hidden);
  }
};

// The cells of a tile. Not unrolled, and `a` is a copy: vector stores may change whatever is in
// memory, so that of the caller's arguments each number would be read again behind each of them.
template <Cell kCell, int kRound, int kRows, bool kFull>
LMFAST_INLINE void bwd_cells(const RecurrentBwdArgs& a, const VecF (*sum)[kBwdVecs], int64_t unit,
                             const BwdRows& at) {
  constexpr int W = VecF::kWidth;
  const int64_t hidden = a.shape.hidden;
#pragma GCC unroll 1
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = at.row + r;
    const float* h = at.h == nullptr ? nullptr : at.h + r * hidden;
    const float* c = at.c == nullptr ? nullptr : at.c + r * hidden;
    const float* dy = a.dy == nullptr ? nullptr : a.dy + (row - a.part.row) * hidden;
#pragma GCC unroll 1
    for (int v = 0; v < kBwdVecs; ++v) {
      const int64_t first = unit + v * W;
      const Lanes<kFull> lanes{lanes_at(first, hidden)};
      if (!kFull && lanes.count == 0) break;
      VecF dh = sum[r][v];
      if (kRound == 0) dh = dh + lanes.load_or_zero(dy, first);
      cell_backward<kCell, kRound>(a, dh, row, at.sequence + r, h, c, first, lanes);
    }
  }
}

template <Cell kCell, int kRound, int kRows, bool kSmall>
__attribute__((noinline)) void bwd_tile(const RecurrentBwdArgs& args, const float* panel,
                                        int64_t unit, const BwdRows& rows) {
  constexpr int W = VecF::kWidth;
  constexpr int64_t kWidth = gate_gradients_of(kCell);
  const RecurrentBwdArgs a = args;
  const BwdRows at = rows;
  const int64_t hidden = a.shape.hidden;
  const float* factor = kRound == 0 ? at.later : a.dgates + (at.row * kWidth + kWidth - 1) * hidden;
  VecF sum[kRows][kBwdVecs];
  if (factor != nullptr) {
    multiply<kRows, kBwdVecs, kSmall>(sum, factor, kWidth * hidden, panel,
                                      kFactors<kCell, kRound> * hidden,
                                      BwdAsk<kCell, kRows>{a, at, unit});
  } else {
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kBwdVecs; ++v) {
        const int64_t first = unit + v * W;
        const int64_t from = (at.sequence + r) * hidden + first;
        sum[r][v] = load_or_zero(a.dh_n, from, lanes_at(first, hidden));
      }
    }
  }
  if (unit + kBwdVecs * W <= hidden) {
    bwd_cells<kCell, kRound, kRows, true>(a, sum, unit, at);
  } else {
    bwd_cells<kCell, kRound, kRows, false>(a, sum, unit, at);
  }
}

// The tile of `rows` rows, 1 to kRows.
template <Cell kCell, int kRound, bool kSmall, int kRows>
LMFAST_INLINE void bwd_tile_of(int rows, const RecurrentBwdArgs& a, const float* panel,
                               int64_t unit, const BwdRows& at) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return bwd_tile_of<kCell, kRound, kSmall, kRows - 1>(rows, a, panel, unit, at);
    }
  }
  bwd_tile<kCell, kRound, kRows, kSmall>(a, panel, unit, at);
}

// One round of a step, counted from the end of the forward's order, for the sequences [begin, end)
// and the panels [first, last).
template <Cell kCell, int kRound, bool kSmall>
void bwd_round(const RecurrentBwdArgs& a, int64_t step, int64_t begin, int64_t end, int64_t first,
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
    const float* panel = a.packed + (p * depth + 2 * kRound * s.hidden) * kBwdVecs * VecF::kWidth;
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
      bwd_tile_of<kCell, kRound, kSmall, kMost>(rows, a, panel, unit, at);
    };
    const int64_t cut = most(begin, least(going, begun)), next = most(begin, most(going, begun));
    for_each_tile<kMost>(begin, least(past, cut), run);
    for_each_tile<kMost>(cut, least(past, next), run);
    for_each_tile<kMost>(next, past, run);
  }
}

template <Cell kCell, bool kSmall>
void bwd_step(const RecurrentBwdArgs& a, int64_t round, int64_t begin, int64_t end, int64_t first,
              int64_t last) {
  if constexpr (rounds_of(kCell) == 1) {
    bwd_round<kCell, 0, kSmall>(a, round, begin, end, first, last);
  } else if (round % 2 == 0) {
    bwd_round<kCell, 0, kSmall>(a, round / 2, begin, end, first, last);
  } else {
    bwd_round<kCell, 1, kSmall>(a, round / 2, begin, end, first, last);
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
    case Cell::kGruTextbook:
      return bwd_step_for<Cell::kGruTextbook>(s.batch);
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
  const int64_t rounds = rounds_of(a.shape.cell);
  for (int64_t round = a.part.first * rounds; round < a.part.past * rounds; ++round) {
    run(a, round, begin, end, 0, panels);
  }
}

void recurrent_bwd_together(const RecurrentBwdArgs& a, int64_t, int64_t) {
  const BwdStep run = bwd_step_of(a.shape);
  const int64_t panels = bwd_panels(a.shape), chunks = a.progress->chunks;
  const int64_t each = rounds_of(a.shape.cell), first = a.part.first * each;
  run_rounds(*a.progress, a.part.past * each - first, [&](int64_t number, int64_t chunk) {
    const int64_t round = first + number;
    const RecurrentShape& s = a.shape;
    const int64_t step = round / each;
    const int64_t after = s.reverse ? step - 1 : s.steps - step;
    ask_for_rows(a.dgates, s, after, gate_gradients_of(s.cell) * s.hidden);
    run(a, round, 0, a.shape.batch, chunk * panels / chunks, (chunk + 1) * panels / chunks);
  });
}

}  // namespace lmfast::LMFAST_ISA
