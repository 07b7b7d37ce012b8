// One step of an Elman, LSTM or GRU layer for a few rows, weights read where they lie.
//
// Floor: reading W_ih and W_hh once, out of L2 or L3 (LSTM, H = 128: 512 KB, 10 us from one core's
// L2). Packing them first, as the loop over a sequence does, reads them twice and writes them once:
// 45 of the 80 us that such a step took. So products are dot products along the rows of W as torch
// keeps them, 16 units at a time: 16 streams of loads and one vector of x, and one transposition
// for all 16 sums. Weights with their units side by side (x W) need no sums across lanes.
#include "recurrent_step.h"

#include "../simd_transpose.h"
#include "recurrent_math.h"
#include "recurrent_tile.h"

namespace lmfast::LMFAST_ISA {
namespace {

constexpr int kUnits = VecF::kWidth;

// lane i: the sum over the lanes of acc[i].
LMFAST_INLINE VecF sums_over_lanes(const VecF (&acc)[kUnits]) {
#if defined(__AVX512F__)
  __m512i r[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_castps_si512(acc[i].v);
  transpose_words(r);
  VecF total[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const VecF low = VecF{_mm512_castsi512_ps(r[i])} + VecF{_mm512_castsi512_ps(r[4 + i])};
    const VecF high = VecF{_mm512_castsi512_ps(r[8 + i])} + VecF{_mm512_castsi512_ps(r[12 + i])};
    total[i] = low + high;
  }
  return (total[0] + total[1]) + (total[2] + total[3]);
#else
  float totals[kUnits];
  for (int i = 0; i < kUnits; ++i) totals[i] = sum(acc[i]);
  return VecF::load(totals);
#endif
}

// sum over k of w[i][k] x[k] for the rows i < lanes; zeros in the other lanes.
LMFAST_INLINE VecF dot_rows(const float* w, int64_t stride, int lanes, const float* x,
                            int64_t depth) {
  constexpr int W = VecF::kWidth, kGroup = 4;
  VecF acc[kUnits];
#pragma GCC unroll 16
  for (int i = 0; i < kUnits; ++i) acc[i] = VecF::zero();
  int64_t k = 0;
  if (lanes == kUnits) {
    for (; k + W <= depth; k += W) {
      const VecF v = VecF::load(x + k);
#pragma GCC unroll 4
      for (int i = 0; i < kUnits; i += kGroup) {
        const float* row = w + i * stride + k;
#pragma GCC unroll 4
        for (int j = 0; j < kGroup && i + j < kUnits; ++j) {
          acc[i + j] = fmadd(v, VecF::load(row + j * stride), acc[i + j]);
        }
      }
    }
  }
  for (; k < depth; k += W) {
    const int n = depth - k < W ? static_cast<int>(depth - k) : W;
    const VecF v = VecF::load(x + k, n);
#pragma GCC unroll 16
    for (int i = 0; i < kUnits; ++i) {
      if (i < lanes) acc[i] = fmadd(v, VecF::load(w + i * stride + k, n), acc[i]);
    }
  }
  return sums_over_lanes(acc);
}

// The same for W with its units side by side.
LMFAST_INLINE VecF dot_columns(const float* w, int64_t stride, int lanes, const float* x,
                               int64_t depth) {
  constexpr int kParts = 4;
  VecF part[kParts];
#pragma GCC unroll 4
  for (int p = 0; p < kParts; ++p) part[p] = VecF::zero();
  int64_t k = 0;
  if (lanes == kUnits) {
    for (; k + kParts <= depth; k += kParts) {
#pragma GCC unroll 4
      for (int p = 0; p < kParts; ++p) {
        part[p] = fmadd(VecF::set1(x[k + p]), VecF::load(w + (k + p) * stride), part[p]);
      }
    }
  }
  for (; k < depth; ++k) {
    part[0] = fmadd(VecF::set1(x[k]), VecF::load(w + k * stride, lanes), part[0]);
  }
  return (part[0] + part[1]) + (part[2] + part[3]);
}

// The product of gate g's rows at `unit` with x, bias included.
__attribute__((noinline)) VecF gate_product(const RecurrentStepWeights& weights, int64_t row,
                                            int lanes, const float* x, int64_t depth) {
  VecF sum = VecF::zero();
  if (x != nullptr) {
    sum = weights.by_columns
              ? dot_columns(weights.w + row, weights.stride, lanes, x, depth)
              : dot_rows(weights.w + row * weights.stride, weights.stride, lanes, x, depth);
  }
  return sum + load_or_zero(weights.bias, row, lanes);
}

// One row and one vector of units of the step. Gate g's units begin at g * H + unit.
void step_units(const RecurrentStepArgs& a, int64_t row, int64_t unit) {
  const int64_t hidden = a.hidden, at = row * hidden + unit;
  const int lanes = lanes_at(unit, hidden);
  const float* x = a.x + row * a.width;
  const float* h = a.h == nullptr ? nullptr : a.h + row * hidden;
  const VecF one = VecF::set1(1.0f), before = load_or_zero(a.h, at, lanes);
  const auto input = [&](int g) {
    return gate_product(a.input, g * hidden + unit, lanes, x, a.width);
  };
  const auto state = [&](int g, const float* s) {
    return gate_product(a.state, g * hidden + unit, lanes, s, hidden);
  };
  const auto both = [&](int g) { return input(g) + state(g, h); };
  VecF y;
  switch (a.cell) {
    case Cell::kTanh:
      y = gate_tanh(both(0));
      break;
    case Cell::kRelu:
      y = max(VecF::zero(), both(0));  // NaN stays: it comes second
      break;
    case Cell::kLstm: {
      const VecF i = gate_sigmoid(both(0)), f = gate_sigmoid(both(1));
      const VecF g = gate_tanh(both(2)), o = gate_sigmoid(both(3));
      const VecF c = fmadd(f, load_or_zero(a.c, at, lanes), i * g);
      c.store(a.c_out + at, lanes);
      y = o * gate_tanh(c);
      break;
    }
    case Cell::kGru: {
      const VecF r = gate_sigmoid(both(0)), z = gate_sigmoid(both(1));
      const VecF n = gate_tanh(fmadd(r, state(2, h), input(2)));
      y = fmadd(z, before - n, n);
      break;
    }
    case Cell::kGruTextbook: {
      float* reset = a.between + row * hidden;
      float* update = a.between + (a.batch + row) * hidden;
      if (!a.second) {
        (gate_sigmoid(both(0)) * before).store(reset + unit, lanes);
        gate_sigmoid(both(1)).store(update + unit, lanes);
        return;
      }
      const VecF n = gate_tanh(input(2) + state(2, a.h == nullptr ? nullptr : reset));
      const VecF z = VecF::load(update + unit, lanes);
      y = fmadd(z, n, (one - z) * before);
      break;
    }
  }
  y.store(a.h_out + at, lanes);
}

}  // namespace

void recurrent_step_units(const RecurrentPanelsArgs& a, int64_t, int64_t) {
  a.out->fwd = a.out->bwd = kUnits;
}

void recurrent_step(const RecurrentStepArgs& a, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    for (int64_t row = 0; row < a.batch; ++row) step_units(a, row, block * kUnits);
  }
}

}  // namespace lmfast::LMFAST_ISA
