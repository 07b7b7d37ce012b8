// Elman, LSTM and GRU layers over a whole sequence in bf16, backward through time.
//
// The formulas of recurrent_bwd.cpp. The gates' gradients are stored once, in bf16: they are the
// operand of the step before and, after the loop, of the products that give the other gradients.
// A block is 32 rows by 64 units. Floor as in recurrent_bf16_fwd.cpp.
#include "recurrent_bf16_tile.h"
#include "recurrent_rounds.h"

namespace lmfast::LMFAST_ISA {

#if defined(LMFAST_AMX)

namespace {

constexpr int kBwdVecs = 4;

// Where a block's rows are. Null pointers: no later step, or a state of zeros before this one.
struct Bf16BwdRows {
  int64_t row, sequence;
  const bf16* later;  // gates' gradients of the step after
  const bf16* h;      // state before the step
  const bf16* c;      // cell state before the step
};

template <Cell kCell>
LMFAST_INLINE void bf16_cell_backward(const RecurrentBf16BwdArgs& a, VecF dh, int64_t row,
                                      int64_t sequence, const bf16* h, const bf16* c,
                                      int64_t unit) {
  const int64_t hidden = a.shape.hidden;
  const VecF one = VecF::set1(1.0f);
  constexpr int kKept = static_cast<int>(kept_gates_of(kCell));
  const bf16* gates = kKept == 0 ? nullptr : a.gates + row * kKept * hidden + unit;
  float* carry = kKept == 0 ? nullptr : a.carry + sequence * hidden + unit;
  bf16* out = a.dgates + row * gate_gradients_of(kCell) * hidden + unit;
  if constexpr (kCell == Cell::kTanh) {
    const VecF y = VecF::load(a.y + row * hidden + unit);
    (dh * (one - y * y)).store(out);
  } else if constexpr (kCell == Cell::kRelu) {
    // y <= 0 ? 0 : dh, so that a NaN lets the gradient through as in PyTorch.
    const VecF y = VecF::load(a.y + row * hidden + unit), zero = VecF::zero();
    select_less(zero, y, dh, select_less(y, one, zero, dh)).store(out);
  } else if constexpr (kCell == Cell::kLstm) {
    const VecF i = VecF::load(gates), f = VecF::load(gates + hidden);
    const VecF g = VecF::load(gates + 2 * hidden), o = VecF::load(gates + 3 * hidden);
    const VecF tanh_c = rough_tanh(VecF::load(a.cells + row * hidden + unit));
    const VecF dc = fmadd(dh * o, one - tanh_c * tanh_c, VecF::load(carry));
    (dc * f).store(carry);
    (dc * g * i * (one - i)).store(out);
    (dc * load_or_zero(c, unit) * f * (one - f)).store(out + hidden);
    (dc * i * (one - g * g)).store(out + 2 * hidden);
    (dh * tanh_c * o * (one - o)).store(out + 3 * hidden);
  } else {
    const VecF r = VecF::load(gates), z = VecF::load(gates + hidden);
    const VecF n = VecF::load(gates + 2 * hidden), inner = VecF::load(gates + 3 * hidden);
    dh = dh + VecF::load(carry);
    (dh * z).store(carry);
    const VecF dz = dh * (load_or_zero(h, unit) - n) * z * (one - z);
    const VecF dn = dh * (one - z) * (one - n * n);
    (dn * r).store(out);
    (dn * inner * r * (one - r)).store(out + hidden);
    dz.store(out + 2 * hidden);
    dn.store(out + 3 * hidden);
  }
}

LMFAST_INLINE VecF output_gradient(const RecurrentBf16BwdArgs& a, int64_t at) {
  if (a.dy == nullptr) return VecF::zero();
  return a.dy_dtype == DType::kF32 ? VecF::load(static_cast<const float*>(a.dy) + at)
                                   : VecF::load(static_cast<const bf16*>(a.dy) + at);
}

template <Cell kCell>
__attribute__((noinline)) void bf16_bwd_block(const RecurrentBf16BwdArgs& a, const char* panel,
                                              int64_t unit, int rows, const Bf16BwdRows& at) {
  const int64_t hidden = a.shape.hidden;
  alignas(64) float sums[kBwdVecs * kColumnFloats];
  const bool wide = unit + 32 < hidden;
  if (at.later != nullptr) {
    const int64_t tiles = gates_of(kCell) * hidden / kTileDepth;
    const int64_t stride = gate_gradients_of(kCell) * hidden;
    wide ? multiply_panel<4>(at.later, stride, rows, panel, tiles, sums)
         : multiply_panel<2>(at.later, stride, rows, panel, tiles, sums);
  }
  for (int v = 0; v < (wide ? 4 : 2); ++v) {
    const int64_t first = unit + v * 16;
    for (int r = 0; r < rows; ++r) {
      const VecF carried = at.later != nullptr
                               ? VecF::load(sums + v * kColumnFloats + r * 16)
                               : load_or_zero(a.dh_n, (at.sequence + r) * hidden + first, 16);
      const VecF dh = carried + output_gradient(a, (at.row + r) * hidden + first);
      bf16_cell_backward<kCell>(a, dh, at.row + r, at.sequence + r,
                                at.h == nullptr ? nullptr : at.h + r * hidden,
                                at.c == nullptr ? nullptr : at.c + r * hidden, first);
    }
  }
}

// One step, counted from the end of the forward's order, for the sequences [begin, end) and the
// panels [first, last).
template <Cell kCell>
void bf16_bwd_step(const RecurrentBf16BwdArgs& a, int64_t step, int64_t begin, int64_t end,
                   int64_t first, int64_t last) {
  const RecurrentShape& s = a.shape;
  const int64_t t = s.reverse ? step : s.steps - 1 - step;
  const int64_t after = s.reverse ? t - 1 : t + 1;
  const int64_t before = s.reverse ? t + 1 : t - 1;
  const int64_t past = least(end, s.sizes[t]);
  // Sequences whose forward went on after this step, and those that had begun before it.
  const int64_t going = least(past, rows_of(s, after));
  const int64_t begun = least(past, rows_of(s, before));
  const int64_t width = gate_gradients_of(kCell) * s.hidden;
  const int64_t tiles = gates_of(kCell) * s.hidden / kTileDepth;
  for (int64_t p = first; p < last; ++p) {
    const char* panel = static_cast<const char*>(a.packed) + p * kBwdVecs * tiles * kTileBytes;
    const auto run = [&](int64_t from, int64_t to) {
      for (int64_t b = from; b < to; b += kBlockRows) {
        Bf16BwdRows at{s.offsets[t] + b, b, nullptr, nullptr, nullptr};
        if (b < going) at.later = a.dgates + (s.offsets[after] + b) * width;
        if (b < begun) {
          at.h = a.y + (s.offsets[before] + b) * s.hidden;
          if (kCell == Cell::kLstm) at.c = a.cells + (s.offsets[before] + b) * s.hidden;
        } else {
          if (a.h0 != nullptr) at.h = a.h0 + b * s.hidden;
          if (a.c0 != nullptr) at.c = a.c0 + b * s.hidden;
        }
        const int rows = static_cast<int>(least(kBlockRows, to - b));
        bf16_bwd_block<kCell>(a, panel, p * kBwdVecs * 16, rows, at);
      }
    };
    const int64_t cut = most(begin, least(going, begun)), next = most(begin, most(going, begun));
    run(begin, least(past, cut));
    run(cut, least(past, next));
    run(next, past);
  }
}

using Bf16BwdStep = void (*)(const RecurrentBf16BwdArgs&, int64_t, int64_t, int64_t, int64_t,
                             int64_t);

Bf16BwdStep bf16_bwd_step_of(Cell cell) {
  switch (cell) {
    case Cell::kTanh:
      return bf16_bwd_step<Cell::kTanh>;
    case Cell::kRelu:
      return bf16_bwd_step<Cell::kRelu>;
    case Cell::kLstm:
      return bf16_bwd_step<Cell::kLstm>;
    default:
      return bf16_bwd_step<Cell::kGru>;
  }
}

}  // namespace

void recurrent_bf16_bwd_rows(const RecurrentBf16BwdArgs& a, int64_t begin, int64_t end) {
  const TileSession session;
  const Bf16BwdStep run = bf16_bwd_step_of(a.shape.cell);
  const int64_t panels = recurrent_bf16_panels(a.shape.cell, true, a.shape.hidden);
  for (int64_t step = 0; step < a.shape.steps; ++step) run(a, step, begin, end, 0, panels);
}

void recurrent_bf16_bwd_together(const RecurrentBf16BwdArgs& a, int64_t, int64_t) {
  const TileSession session;
  const Bf16BwdStep run = bf16_bwd_step_of(a.shape.cell);
  const int64_t panels = recurrent_bf16_panels(a.shape.cell, true, a.shape.hidden);
  const int64_t chunks = a.progress->chunks;
  run_rounds(*a.progress, a.shape.steps, [&](int64_t step, int64_t chunk) {
    run(a, step, 0, a.shape.batch, chunk * panels / chunks, (chunk + 1) * panels / chunks);
  });
}

#else

void recurrent_bf16_bwd_rows(const RecurrentBf16BwdArgs&, int64_t, int64_t) {}
void recurrent_bf16_bwd_together(const RecurrentBf16BwdArgs&, int64_t, int64_t) {}

#endif

}  // namespace lmfast::LMFAST_ISA
