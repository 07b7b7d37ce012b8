// Elman, LSTM and GRU layers over a whole sequence, forward.
//
//   Elman  h = tanh(p + U h')  or relu
//   LSTM   i, f, o = sigmoid, g = tanh of (p + U h');  c = f c' + i g;  h = o tanh(c)
//   GRU    r, z = sigmoid(p + U h');  n = tanh(p_n + r (U_n h' + b_n));  h = n + z (h' - n)
//          textbook: n = tanh(p_n + U_n (r h'));  h = h' + z (n - h')
//
// p, the products of the inputs with all biases, is one matrix product over all steps and not made
// here. Floor of what is left: arithmetic for many rows, reading the weights out of L2 for few
// (Elman, H = 512, one row: 1 MB a step on two cores, 5 us). So weights are packed once and each
// core keeps its own part: few weights (below L2) are used by all cores and the rows divided,
// without any barrier; many are divided by units of the state, with one barrier per step.
// What a cell adds to the product lies a row apart for each row of a tile; asked for before the
// product it is there behind it, and asked for a little at a time during the product it does not
// hold it up either (`multiply` in recurrent_tile.h).
// On AVX2 a tile of all gates was two rows high and bound by loads; strips of two vectors allow six
// rows. LSTM of 64 rows, H = 512 on one core of Zen 3: 34 -> 47 GF/s, 67 with each strip's depth in
// one piece (79 beside the cells, of 93). Worse: the depth in chunks that stay in L1 for all rows,
// their sums in memory (10 % slower backward, 0 forward).
// With gradients a layer is six products of one size, of which two are the loops'. LSTM of 128
// rows, 30 steps, H = 128 on one core of Zen 4: 0.5 GF each, 4.3 ms at the peak of 116 GF/s; the
// loop takes 6.05 ms forward, 1.5 of them the five exponentials to a unit, and 4.95 backward, the
// four products over all steps 4.7 to 4.9 each. A form with the input products inside the loop, in
// L2, and the rows divided over threads through all layers took the same time with gradients and 3
// % less without them: not worth a second way.
// The state lives in y: step t reads the rows that step t - 1 wrote. The textbook's GRU needs all
// of r before the product of n, so its steps are two rounds.
#include "recurrent_cells.h"
#include "recurrent_math.h"
#include "recurrent_rounds.h"

namespace lmfast::LMFAST_ISA {
namespace {

// Where a tile's rows are: row of (N, ...) operands, sequence, state before the step (null: zeros).
struct FwdRows {
  int64_t row, sequence;
  const float* h;
};

template <Cell kCell, int kRound, bool kFull>
LMFAST_INLINE void cell_forward(const RecurrentFwdArgs& a, const VecF* sum, int64_t row,
                                int64_t sequence, const float* h, int64_t unit,
                                const Lanes<kFull>& lanes) {
  const int64_t hidden = a.shape.hidden;
  float* y = a.y + row * hidden + unit;
  if constexpr (kCell == Cell::kTanh) {
    lanes.store(gate_tanh(sum[0]), y);
  } else if constexpr (kCell == Cell::kRelu) {
    lanes.store(max(VecF::zero(), sum[0]), y);  // NaN stays: it comes second
  } else if constexpr (kCell == Cell::kLstm) {
    const VecF i = gate_sigmoid(sum[0]), f = gate_sigmoid(sum[1]);
    const VecF g = gate_tanh(sum[2]), o = gate_sigmoid(sum[3]);
    float* c_at = a.c + sequence * hidden + unit;
    const VecF c = fmadd(f, lanes.load(c_at), i * g);
    lanes.store(c, c_at);
    lanes.store(o * gate_tanh(c), y);
    if (a.gates != nullptr) {
      float* gates = a.gates + row * 4 * hidden + unit;
      lanes.store(i, gates);
      lanes.store(f, gates + hidden);
      lanes.store(g, gates + 2 * hidden);
      lanes.store(o, gates + 3 * hidden);
      lanes.store(c, a.cells + row * hidden + unit);
    }
  } else if constexpr (kCell == Cell::kGruTextbook && kRound == 0) {
    const VecF r = gate_sigmoid(sum[0]), z = gate_sigmoid(sum[1]);
    const VecF reset = r * lanes.load_or_zero(h, unit);
    float* between = a.between + sequence * 2 * hidden + unit;
    lanes.store(reset, between);
    lanes.store(z, between + hidden);
    if (a.gates != nullptr) {
      float* gates = a.gates + row * 3 * hidden + unit;
      lanes.store(r, gates);
      lanes.store(z, gates + hidden);
      lanes.store(reset, a.cells + row * hidden + unit);
    }
  } else if constexpr (kCell == Cell::kGruTextbook) {
    const VecF n = gate_tanh(sum[0]), before = lanes.load_or_zero(h, unit);
    const VecF z = lanes.load(a.between + (sequence * 2 + 1) * hidden + unit);
    lanes.store(fmadd(z, n - before, before), y);
    if (a.gates != nullptr) lanes.store(n, a.gates + (row * 3 + 2) * hidden + unit);
  } else {
    const VecF r = gate_sigmoid(sum[0]), z = gate_sigmoid(sum[1]);
    const VecF input = lanes.load(a.projected + ((row - a.part.row) * 3 + 2) * hidden + unit);
    const VecF n = gate_tanh(fmadd(r, sum[2], input));
    lanes.store(fmadd(z, lanes.load_or_zero(h, unit) - n, n), y);
    if (a.gates != nullptr) {
      float* gates = a.gates + row * 4 * hidden + unit;
      lanes.store(r, gates);
      lanes.store(z, gates + hidden);
      lanes.store(n, gates + 2 * hidden);
      lanes.store(sum[2], gates + 3 * hidden);
    }
  }
}

// Asks for what the cells of a tile will read and the kept gates they will write, row by row.
template <Cell kCell, int kRound, int kRows>
struct FwdAsk {
  static constexpr int64_t count = kRows;
  const RecurrentFwdArgs& a;
  const FwdRows& at;
  int64_t unit;

  LMFAST_INLINE void operator()(int64_t r) const {
    using S = FwdTile<kCell, kRound>;
    constexpr int kKept = kept_gates_of(kCell);
    const int64_t hidden = a.shape.hidden, row = at.row + r;
    const int64_t from = row - a.part.row;
    const float* read = a.projected + (from * gates_of(kCell) + 2 * kRound) * hidden + unit;
#pragma GCC unroll 4
    for (int u = 0; u < S::kUnits; ++u) ask_for<S::kGates>(read + u * VecF::kWidth, hidden);
    if (kKept == 0 || a.gates == nullptr) return;
    ask_for<kKept, true>(a.gates + row * kKept * hidden + unit, hidden);
    if (keeps_cells(kCell)) ask_for<1, true>(a.cells + row * hidden + unit, 0);
  }
};

// The cells of a tile. Not unrolled, and `a` is a copy: vector stores may change whatever is in
// memory, so that of the caller's arguments each number would be read again behind each of them.
template <Cell kCell, int kRound, int kRows, bool kFull>
LMFAST_INLINE void fwd_cells(const RecurrentFwdArgs& a, VecF (*sum)[FwdTile<kCell, kRound>::kVecs],
                             int64_t unit, const FwdRows& at) {
  using S = FwdTile<kCell, kRound>;
  const int64_t hidden = a.shape.hidden, from = at.row - a.part.row;
#pragma GCC unroll 1
  for (int r = 0; r < kRows; ++r) {
    const float* h = at.h == nullptr ? nullptr : at.h + r * hidden;
    const float* projected = a.projected + ((from + r) * gates_of(kCell) + 2 * kRound) * hidden;
#pragma GCC unroll 1
    for (int u = 0; u < S::kUnits; ++u) {
      const int64_t first = unit + u * VecF::kWidth;
      const Lanes<kFull> lanes{lanes_at(first, hidden)};
      if (!kFull && lanes.count == 0) break;
      VecF* gates = sum[r] + u * S::kGates;
      // Added last: the partial sums of the product are smaller, and so are their roundings.
#pragma GCC unroll 4
      for (int g = 0; g < S::kGates; ++g) {
        const float* added = kCell == Cell::kGru && g == 2 ? a.hidden_bias : projected + g * hidden;
        gates[g] = gates[g] + lanes.load_or_zero(added, first);
      }
      cell_forward<kCell, kRound>(a, gates, at.row + r, at.sequence + r, h, first, lanes);
    }
  }
}

template <Cell kCell, int kRound, int kRows, bool kSmall>
__attribute__((noinline)) void fwd_tile(const RecurrentFwdArgs& args, const float* panel,
                                        int64_t unit, const FwdRows& rows) {
  using S = FwdTile<kCell, kRound>;
  const RecurrentFwdArgs a = args;
  const FwdRows at = rows;
  const int64_t hidden = a.shape.hidden;
  VecF sum[kRows][S::kVecs];
  if (at.h != nullptr) {
    const float* factor = kRound == 0 ? at.h : a.between + at.sequence * 2 * hidden;
    multiply<kRows, S::kVecs, kSmall>(sum, factor, kRound == 0 ? hidden : 2 * hidden, panel, hidden,
                                      FwdAsk<kCell, kRound, kRows>{a, at, unit});
  } else {
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < S::kVecs; ++v) sum[r][v] = VecF::zero();
    }
  }
  if (unit + S::kUnits * VecF::kWidth <= hidden) {
    fwd_cells<kCell, kRound, kRows, true>(a, sum, unit, at);
  } else {
    fwd_cells<kCell, kRound, kRows, false>(a, sum, unit, at);
  }
}

// The tile of `rows` rows, 1 to kRows.
template <Cell kCell, int kRound, bool kSmall, int kRows>
LMFAST_INLINE void fwd_tile_of(int rows, const RecurrentFwdArgs& a, const float* panel,
                               int64_t unit, const FwdRows& at) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return fwd_tile_of<kCell, kRound, kSmall, kRows - 1>(rows, a, panel, unit, at);
    }
  }
  fwd_tile<kCell, kRound, kRows, kSmall>(a, panel, unit, at);
}

// One round of a step for the sequences [begin, end) and the panels [first, last).
template <Cell kCell, int kRound, bool kSmall>
void fwd_round(const RecurrentFwdArgs& a, int64_t step, int64_t begin, int64_t end, int64_t first,
               int64_t last) {
  using S = FwdTile<kCell, kRound>;
  const RecurrentShape& s = a.shape;
  const int64_t t = s.reverse ? s.steps - 1 - step : step;
  const int64_t before = s.reverse ? t + 1 : t - 1;
  const int64_t past = least(end, s.sizes[t]);
  // Sequences that were there one step before; the others begin here, from h0.
  const int64_t going = least(s.sizes[t], rows_of(s, before));
  const float* h = going > 0 ? a.y + s.offsets[before] * s.hidden : nullptr;
  constexpr int kMost = kSmall ? kSmallBatch : S::kRows;
  for (int64_t p = first; p < last; ++p) {
    // All gates of a panel's units lie together: r and z of the textbook's GRU before n.
    const float* panel =
        a.packed + (p * gates_of(kCell) + 2 * kRound) * s.hidden * S::kUnits * VecF::kWidth;
    const int64_t unit = p * S::kUnits * VecF::kWidth;
    const auto run = [&](const float* state) {
      return [&, state](int64_t b, int rows) {
        const float* from = state == nullptr ? nullptr : state + b * s.hidden;
        fwd_tile_of<kCell, kRound, kSmall, kMost>(rows, a, panel, unit,
                                                  {s.offsets[t] + b, b, from});
      };
    };
    for_each_tile<kMost>(begin, least(past, going), run(h));
    for_each_tile<kMost>(most(begin, going), past, run(a.h0));
  }
}

template <Cell kCell, bool kSmall>
void fwd_step(const RecurrentFwdArgs& a, int64_t round, int64_t begin, int64_t end, int64_t first,
              int64_t last) {
  if constexpr (rounds_of(kCell) == 1) {
    fwd_round<kCell, 0, kSmall>(a, round, begin, end, first, last);
  } else if (round % 2 == 0) {
    fwd_round<kCell, 0, kSmall>(a, round / 2, begin, end, first, last);
  } else {
    fwd_round<kCell, 1, kSmall>(a, round / 2, begin, end, first, last);
  }
}

using FwdStep = void (*)(const RecurrentFwdArgs&, int64_t, int64_t, int64_t, int64_t, int64_t);

template <Cell kCell>
FwdStep fwd_step_for(int64_t batch, int64_t* lanes) {
  *lanes = FwdTile<kCell>::kUnits * VecF::kWidth;
  return batch <= kSmallBatch ? fwd_step<kCell, true> : fwd_step<kCell, false>;
}

FwdStep fwd_step_of(const RecurrentShape& s, int64_t* panels) {
  FwdStep step = nullptr;
  int64_t lanes = 1;
  switch (s.cell) {
    case Cell::kTanh:
      step = fwd_step_for<Cell::kTanh>(s.batch, &lanes);
      break;
    case Cell::kRelu:
      step = fwd_step_for<Cell::kRelu>(s.batch, &lanes);
      break;
    case Cell::kLstm:
      step = fwd_step_for<Cell::kLstm>(s.batch, &lanes);
      break;
    case Cell::kGru:
      step = fwd_step_for<Cell::kGru>(s.batch, &lanes);
      break;
    case Cell::kGruTextbook:
      step = fwd_step_for<Cell::kGruTextbook>(s.batch, &lanes);
      break;
  }
  *panels = (s.hidden + lanes - 1) / lanes;
  return step;
}

}  // namespace

void recurrent_fwd_rows(const RecurrentFwdArgs& a, int64_t begin, int64_t end) {
  int64_t panels;
  const FwdStep run = fwd_step_of(a.shape, &panels);
  const int64_t rounds = rounds_of(a.shape.cell);
  for (int64_t round = a.part.first * rounds; round < a.part.past * rounds; ++round) {
    run(a, round, begin, end, 0, panels);
  }
}

void recurrent_fwd_together(const RecurrentFwdArgs& a, int64_t, int64_t) {
  int64_t panels;
  const FwdStep run = fwd_step_of(a.shape, &panels);
  const int64_t chunks = a.progress->chunks;
  const int64_t each = rounds_of(a.shape.cell), first = a.part.first * each;
  run_rounds(*a.progress, a.part.past * each - first, [&](int64_t number, int64_t chunk) {
    const int64_t round = first + number;
    const RecurrentShape& s = a.shape;
    const int64_t step = round / each;
    const int64_t before = s.reverse ? s.steps - step : step - 1;
    ask_for_rows(a.y, s, before, s.hidden);
    run(a, round, 0, a.shape.batch, chunk * panels / chunks, (chunk + 1) * panels / chunks);
  });
}

}  // namespace lmfast::LMFAST_ISA
