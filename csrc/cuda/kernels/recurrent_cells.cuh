// What the recurrent layers' kernels do outside their products: where a step stands, and the cells.
#pragma once

#include "device.cuh"
#include "recurrent.h"

namespace lmfast::gpu {

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Where the loop stands: step number s is time t, with `rows` of the batch running, of which
// `started` ran in the step before.
struct RecurrentStep {
  int t, rows, started;
  int64_t at, before;  // first row of this step, and of the one before
};

__device__ __forceinline__ int rows_at(const RecurrentShape& s, int t) {
  if (t < 0 || t >= s.steps) return 0;
  return s.sizes == nullptr ? s.batch : static_cast<int>(s.sizes[t]);
}

__device__ __forceinline__ int64_t first_row(const RecurrentShape& s, int t) {
  return s.offsets == nullptr ? int64_t{t} * s.batch : s.offsets[t];
}

__device__ __forceinline__ RecurrentStep step_of(const RecurrentShape& s, int number, bool down) {
  RecurrentStep step;
  step.t = down ? s.steps - 1 - number : number;
  step.rows = rows_at(s, step.t);
  step.at = first_row(s, step.t);
  const int before = down ? step.t + 1 : step.t - 1;
  step.started = 0;
  step.before = 0;
  if (number == 0) return step;
  step.started = rows_at(s, before);
  step.before = first_row(s, before);
  return step;
}

template <typename T>
__device__ __forceinline__ float value_at(const void* p, int64_t at) {
  return p == nullptr ? 0.0f : to_float(static_cast<const T*>(p)[at]);
}

template <typename T>
__device__ __forceinline__ void put(void* p, int64_t at, float value) {
  static_cast<T*>(p)[at] = from_float<T>(value);
}

__device__ __forceinline__ int gates_of(RecurrentCell cell) {
  return cell == RecurrentCell::kLstm ? 4 : cell == RecurrentCell::kGru ? 3 : 1;
}

// The cell of one unit and batch row, from the products `sum` of its gates: keeps the states and
// what the backward needs, stores y and returns it before its rounding.
template <typename T>
__device__ __forceinline__ float forward_unit(const RecurrentFwd& p, const RecurrentStep& step,
                                              int b, int unit, const float (&sum)[4]) {
  const RecurrentShape& s = p.s;
  const int hidden = s.hidden, gates = gates_of(s.cell);
  const int64_t row = step.at + b, state = int64_t{b} * hidden + unit;
  const int64_t in = row * gates * hidden + unit;
  const bool started = b < step.started;
  float h;
  if (gates == 1) {
    h = value_at<T>(p.projected, in) + sum[0];
    h = s.cell == RecurrentCell::kTanh ? tanhf(h) : (h < 0.0f ? 0.0f : h);
  } else if (gates == 4) {
    const float before = started ? p.c[state] : value_at<T>(p.c0, state);
    const float i_gate = sigmoid(value_at<T>(p.projected, in) + sum[0]);
    const float f = sigmoid(value_at<T>(p.projected, in + hidden) + sum[1]);
    const float g = tanhf(value_at<T>(p.projected, in + 2 * hidden) + sum[2]);
    const float o = sigmoid(value_at<T>(p.projected, in + 3 * hidden) + sum[3]);
    const float c = f * before + i_gate * g;
    h = o * tanhf(c);
    p.c[state] = c;
    if (p.gates != nullptr) {
      const int64_t at = row * 4 * hidden + unit;
      put<T>(p.gates, at, i_gate);
      put<T>(p.gates, at + hidden, f);
      put<T>(p.gates, at + 2 * hidden, g);
      put<T>(p.gates, at + 3 * hidden, o);
      put<T>(p.cells, row * hidden + unit, c);
    }
  } else {
    const float before = started ? p.h[state] : value_at<T>(p.h0, state);
    const float r = sigmoid(value_at<T>(p.projected, in) + sum[0]);
    const float z = sigmoid(value_at<T>(p.projected, in + hidden) + sum[1]);
    const float from_state = sum[2] + value_at<T>(p.hidden_bias, unit);
    const float n_gate = tanhf(value_at<T>(p.projected, in + 2 * hidden) + r * from_state);
    h = (1.0f - z) * n_gate + z * before;
    if (p.gates != nullptr) {
      const int64_t at = row * 4 * hidden + unit;
      put<T>(p.gates, at, r);
      put<T>(p.gates, at + hidden, z);
      put<T>(p.gates, at + 2 * hidden, n_gate);
      put<T>(p.gates, at + 3 * hidden, from_state);
    }
  }
  p.h[state] = h;
  put<T>(p.y, row * hidden + unit, h);
  return h;
}

// Copies the states after the last step of a group's rows; by the threads that wrote them.
template <typename T>
__device__ __forceinline__ void keep_last_states(const RecurrentFwd& p, int group0, int unit0,
                                                 int units) {
  const RecurrentShape& s = p.s;
  const int rows = s.batch - group0 < s.group_rows ? s.batch - group0 : s.group_rows;
  // Rows are walked as in a step, from the same first row.
  for (int b0 = 0; b0 < rows; b0 += s.at_once) {
    const int count = rows - b0 < s.at_once ? rows - b0 : s.at_once;
    for (int i = threadIdx.x; i < units * count; i += blockDim.x) {
      const int64_t state = int64_t{group0 + b0 + i / units} * s.hidden + unit0 + i % units;
      put<T>(p.h_n, state, p.h[state]);
      if (s.cell == RecurrentCell::kLstm) put<T>(p.c_n, state, p.c[state]);
    }
  }
}

// The order of the forward, seen from a step of the backward: the step that ran before this one.
struct EarlierStep {
  int rows;
  int64_t at;
};
__device__ __forceinline__ EarlierStep earlier_step(const RecurrentShape& s, int t) {
  const int earlier = s.reverse ? t + 1 : t - 1;
  EarlierStep e{rows_at(s, earlier), 0};
  if (e.rows > 0) e.at = first_row(s, earlier);
  return e;
}

// The cell's derivative for one unit and batch row; `through`: the gradient of h by the products of
// the step after, for rows that have one. give(i, value): gradient i of the row and unit.
template <typename T, typename Give>
__device__ __forceinline__ void backward_unit(const RecurrentBwd& p, const RecurrentStep& step,
                                              const EarlierStep& earlier, int b, int unit,
                                              float through, Give give) {
  const RecurrentShape& s = p.s;
  const int hidden = s.hidden;
  const int64_t row = step.at + b, state = int64_t{b} * hidden + unit;
  const int64_t at = row * hidden + unit;
  const bool started = b < step.started;
  float dh = value_at<T>(p.dy, at);
  dh += started ? through : value_at<T>(p.dh_n, state);
  const bool has_earlier = b < earlier.rows;
  const int64_t earlier_row = (earlier.at + b) * hidden + unit;
  if (gates_of(s.cell) == 1) {
    const float y = value_at<T>(p.y, at);
    const bool tanh = s.cell == RecurrentCell::kTanh;
    give(0, tanh ? dh * (1.0f - y * y) : (y > 0.0f ? dh : 0.0f * dh));
    return;
  }
  const int64_t kept = row * 4 * hidden + unit;
  const float g0 = value_at<T>(p.gates, kept), g1 = value_at<T>(p.gates, kept + hidden);
  const float g2 = value_at<T>(p.gates, kept + 2 * hidden);
  const float g3 = value_at<T>(p.gates, kept + 3 * hidden);
  float carry = started ? p.carry[state] : 0.0f;
  if (s.cell == RecurrentCell::kLstm) {
    if (!started) carry = value_at<T>(p.dc_n, state);
    const float before = has_earlier ? value_at<T>(p.cells, earlier_row) : value_at<T>(p.c0, state);
    const float c = tanhf(value_at<T>(p.cells, at));
    const float dc = carry + dh * g3 * (1.0f - c * c);
    give(0, dc * g2 * g0 * (1.0f - g0));
    give(1, dc * before * g1 * (1.0f - g1));
    give(2, dc * g0 * (1.0f - g2 * g2));
    give(3, dh * c * g3 * (1.0f - g3));
    p.carry[state] = dc * g1;
  } else {
    // g0 reset, g1 update, g2 new, g3 the state's share of new before the reset.
    dh += carry;
    const float before = has_earlier ? value_at<T>(p.y, earlier_row) : value_at<T>(p.h0, state);
    const float dn = dh * (1.0f - g1) * (1.0f - g2 * g2);
    give(0, dn * g0);
    give(1, dn * g3 * g0 * (1.0f - g0));
    give(2, dh * (before - g2) * g1 * (1.0f - g1));
    give(3, dn);
    p.carry[state] = dh * g1;
  }
}

// Copies what passes the products to before the first step, where there is such a thing.
template <typename T>
__device__ __forceinline__ void keep_last_carry(const RecurrentBwd& p, int group0, int unit0,
                                                int units) {
  if (p.carry == nullptr) return;
  const RecurrentShape& s = p.s;
  const int rows = s.batch - group0 < s.group_rows ? s.batch - group0 : s.group_rows;
  for (int b0 = 0; b0 < rows; b0 += s.at_once) {
    const int count = rows - b0 < s.at_once ? rows - b0 : s.at_once;
    for (int i = threadIdx.x; i < units * count; i += blockDim.x) {
      const int64_t state = int64_t{group0 + b0 + i / units} * s.hidden + unit0 + i % units;
      put<T>(p.carry_last, state, p.carry[state]);
    }
  }
}

// weight(row, k) of a block's rows: of the matrix, gate by gate, for the forward. Its parts are
// values: behind a reference to the shape they cost the largest tile registers that it does not
// have.
template <typename T>
struct ForwardRows {
  const RecurrentShape& s;
  const T* w;
  int gates, hidden, unit0, units;  // the first unit, and how many there are, at most s.units
  __device__ __forceinline__ ForwardRows(const RecurrentShape& shape, int first, int count)
      : s(shape),
        w(static_cast<const T*>(shape.w)),
        gates(gates_of(shape.cell)),
        hidden(shape.hidden),
        unit0(first),
        units(count) {}
  __device__ __forceinline__ T operator()(int row, int k) const {
    const int gate = row / s.units, u = row % s.units;
    if (gate >= gates || u >= units || k >= hidden) return from_float<T>(0.0f);
    return w[(int64_t{gate} * hidden + unit0 + u) * s.w_stride[0] + k * s.w_stride[1]];
  }
};

// The same of the transposed matrix, for the backward. The GRU's gradients lie with n in front of r
// and z.
template <typename T>
struct BackwardRows {
  const RecurrentShape& s;
  int unit0, units;
  __device__ __forceinline__ T operator()(int row, int k) const {
    const int hidden = s.hidden;
    if (row >= units || k >= gates_of(s.cell) * hidden) return from_float<T>(0.0f);
    const bool gru = s.cell == RecurrentCell::kGru;
    const int from = !gru ? k : k < hidden ? k + 2 * hidden : k - hidden;
    const T* w = static_cast<const T*>(s.w);
    return w[from * s.w_stride[0] + (unit0 + row) * s.w_stride[1]];
  }
};

}  // namespace lmfast::gpu
