// Elman, LSTM and GRU layers over a whole sequence in bf16, forward.
//
// The formulas of recurrent_fwd.cpp. Products take bf16 and sum in float; sums, biases, gates and
// the state stay float. A block is 32 rows by all gates of 16 units: its sums go through 8 KB of L1
// from tiles to vectors, which apply the gates and write the state's bf16 copy, the operand of the
// next step, the layer's output and the next layer's input in one.
//
// Floor: LSTM, 64 rows, H = 512: 134 MFLOP a step, 23 us at the peak of two cores; the weights, 2
// MB, stream from L2 once per 32 rows. At H = 128 the gates (5 transcendentals a unit) cost as much
// as the products, so they are computed to 1e-5 only.
#include "recurrent_bf16_tile.h"
#include "recurrent_rounds.h"

namespace lmfast::LMFAST_ISA {

#if defined(LMFAST_AMX)

namespace {

template <Cell kCell>
struct Bf16FwdTile {
  static constexpr int kGates = static_cast<int>(gates_of(kCell));
  static constexpr int kUnits = kGates == 1 ? 4 : 1;  // vectors of units
  static constexpr int kVecs = kGates * kUnits;
};

// One row and one vector of units: from the sums of its gates to its new state.
template <Cell kCell>
LMFAST_INLINE void bf16_cell_forward(const RecurrentBf16FwdArgs& a, const VecF* sum, int64_t row,
                                     int64_t sequence, int64_t unit) {
  const int64_t hidden = a.shape.hidden;
  float* h = a.h + sequence * hidden + unit;
  constexpr int kKept = static_cast<int>(kept_gates_of(kCell));
  bf16* gates = a.gates == nullptr ? nullptr : a.gates + row * kKept * hidden + unit;
  VecF y;
  if constexpr (kCell == Cell::kTanh) {
    y = rough_tanh(sum[0]);
  } else if constexpr (kCell == Cell::kRelu) {
    y = max(VecF::zero(), sum[0]);  // NaN stays: it comes second
  } else if constexpr (kCell == Cell::kLstm) {
    const VecF i = rough_sigmoid(sum[0]), f = rough_sigmoid(sum[1]);
    const VecF g = rough_tanh(sum[2]), o = rough_sigmoid(sum[3]);
    float* c_at = a.c + sequence * hidden + unit;
    const VecF c = fmadd(f, VecF::load(c_at), i * g);
    c.store(c_at);
    y = o * rough_tanh(c);
    if (gates != nullptr) {
      i.store(gates);
      f.store(gates + hidden);
      g.store(gates + 2 * hidden);
      o.store(gates + 3 * hidden);
      c.store(a.cells + row * hidden + unit);
    }
  } else {
    const VecF r = rough_sigmoid(sum[0]), z = rough_sigmoid(sum[1]);
    VecF input = VecF::load(a.projected + (row * 3 + 2) * hidden + unit);
    if (a.bias != nullptr) input = input + VecF::load(a.bias + 2 * hidden + unit);
    const VecF n = rough_tanh(fmadd(r, sum[2], input));
    y = fmadd(z, VecF::load(h) - n, n);
    if (gates != nullptr) {
      r.store(gates);
      z.store(gates + hidden);
      n.store(gates + 2 * hidden);
      sum[2].store(gates + 3 * hidden);
    }
  }
  y.store(h);
  y.store(a.y + row * hidden + unit);
  if (a.y_wide != nullptr) y.store(a.y_wide + row * hidden + unit);
}

// Rows [row, row + rows) of the (N, ...) operands, at most 32, for the panel at `unit`; `h` is the
// state before the step, null for zeros.
template <Cell kCell>
__attribute__((noinline)) void bf16_fwd_block(const RecurrentBf16FwdArgs& a, const char* panel,
                                              int64_t unit, int64_t row, int64_t sequence, int rows,
                                              const bf16* h) {
  using S = Bf16FwdTile<kCell>;
  const int64_t hidden = a.shape.hidden;
  alignas(64) float sums[S::kVecs * kColumnFloats];
  if (h != nullptr) {
    multiply_panel<S::kVecs>(h, hidden, rows, panel, hidden / kTileDepth, sums);
  }
  for (int u = 0; u < S::kUnits; ++u) {
    const int64_t first = unit + u * 16;
    if (first >= hidden) break;
    VecF bias[S::kGates];
#pragma GCC unroll 4
    for (int g = 0; g < S::kGates; ++g) {
      const bool inner = kCell == Cell::kGru && g == 2;
      bias[g] = inner ? load_or_zero(a.hidden_bias, first, 16)
                      : load_or_zero(a.bias, g * hidden + first, 16);
    }
    for (int r = 0; r < rows; ++r) {
      VecF sum[S::kGates];
#pragma GCC unroll 4
      for (int g = 0; g < S::kGates; ++g) {
        sum[g] = bias[g];
        if (h != nullptr) {
          sum[g] = sum[g] + VecF::load(sums + (u * S::kGates + g) * kColumnFloats + r * 16);
        }
        if (kCell == Cell::kGru && g == 2) continue;
        const int64_t at = ((row + r) * S::kGates + g) * hidden + first;
        sum[g] = sum[g] + VecF::load(a.projected + at);
      }
      bf16_cell_forward<kCell>(a, sum, row + r, sequence + r, first);
    }
  }
}

// One step for the sequences [begin, end) and the panels [first, last).
template <Cell kCell>
void bf16_fwd_step(const RecurrentBf16FwdArgs& a, int64_t step, int64_t begin, int64_t end,
                   int64_t first, int64_t last) {
  using S = Bf16FwdTile<kCell>;
  const RecurrentShape& s = a.shape;
  const int64_t t = s.reverse ? s.steps - 1 - step : step;
  const int64_t before = s.reverse ? t + 1 : t - 1;
  const int64_t past = least(end, s.sizes[t]);
  // Sequences that were there one step before; the others begin here, from h0.
  const int64_t going = least(s.sizes[t], rows_of(s, before));
  const bf16* h = going > 0 ? a.y + s.offsets[before] * s.hidden : nullptr;
  for (int64_t p = first; p < last; ++p) {
    const char* panel =
        static_cast<const char*>(a.packed) + p * S::kVecs * (s.hidden / kTileDepth) * kTileBytes;
    const auto run = [&](int64_t from, int64_t to, const bf16* state) {
      for (int64_t b = from; b < to; b += kBlockRows) {
        const int rows = static_cast<int>(least(kBlockRows, to - b));
        bf16_fwd_block<kCell>(a, panel, p * S::kUnits * 16, s.offsets[t] + b, b, rows,
                              state == nullptr ? nullptr : state + b * s.hidden);
      }
    };
    run(begin, least(past, going), h);
    run(most(begin, going), past, a.h0);
  }
}

using Bf16FwdStep = void (*)(const RecurrentBf16FwdArgs&, int64_t, int64_t, int64_t, int64_t,
                             int64_t);

Bf16FwdStep bf16_fwd_step_of(Cell cell) {
  switch (cell) {
    case Cell::kTanh:
      return bf16_fwd_step<Cell::kTanh>;
    case Cell::kRelu:
      return bf16_fwd_step<Cell::kRelu>;
    case Cell::kLstm:
      return bf16_fwd_step<Cell::kLstm>;
    default:
      return bf16_fwd_step<Cell::kGru>;
  }
}

}  // namespace

void recurrent_bf16_fwd_rows(const RecurrentBf16FwdArgs& a, int64_t begin, int64_t end) {
  const TileSession session;
  const Bf16FwdStep run = bf16_fwd_step_of(a.shape.cell);
  const int64_t panels = recurrent_bf16_panels(a.shape.cell, false, a.shape.hidden);
  for (int64_t step = 0; step < a.shape.steps; ++step) run(a, step, begin, end, 0, panels);
}

void recurrent_bf16_fwd_together(const RecurrentBf16FwdArgs& a, int64_t, int64_t) {
  const TileSession session;
  const Bf16FwdStep run = bf16_fwd_step_of(a.shape.cell);
  const int64_t panels = recurrent_bf16_panels(a.shape.cell, false, a.shape.hidden);
  const int64_t chunks = a.progress->chunks;
  run_rounds(*a.progress, a.shape.steps, [&](int64_t step, int64_t chunk) {
    run(a, step, 0, a.shape.batch, chunk * panels / chunks, (chunk + 1) * panels / chunks);
  });
}

#else

void recurrent_bf16_fwd_rows(const RecurrentBf16FwdArgs&, int64_t, int64_t) {}
void recurrent_bf16_fwd_together(const RecurrentBf16FwdArgs&, int64_t, int64_t) {}

#endif

}  // namespace lmfast::LMFAST_ISA
