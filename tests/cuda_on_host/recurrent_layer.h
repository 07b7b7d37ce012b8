// One recurrent layer for the tests of its kernels: operands, exact results, comparison.
#pragma once

#include "cuda_on_host.h"
// After the shim, which replaces what CUDA's keywords mean.
#include "check.h"
#include "csrc/cuda/kernels/recurrent_cells.cuh"

namespace lmfast::gpu {

using Cell = RecurrentCell;
using Doubles = std::vector<double>;

struct Case {
  Cell cell;
  int batch, hidden;
  std::vector<int64_t> sizes;  // rows of each step
  bool reverse, state;
  unsigned warps, groups;
};

inline double sigmoid_of(double x) { return 1.0 / (1.0 + std::exp(-x)); }

template <typename T>
std::vector<T> small_values(size_t count, unsigned seed) {
  std::vector<T> values = random_values<T>(count, seed);
  for (T& v : values) v = from_float<T>(to_float(v) / 4.0f);
  return values;
}

// Everything of one layer, with the exact results of the loop in double precision.
template <typename T>
struct Layer {
  Case c;
  int gates, kept, gradients, hidden, steps;
  std::vector<int64_t> offsets;
  int64_t rows = 0;
  std::vector<T> projected, w, bias, h0, c0, dy, dh_n, dc_n;
  Doubles y, cells, values, h_n, c_n, dgates, carry;

  explicit Layer(const Case& given)
      : c(given),
        gates(recurrent_gates(c.cell)),
        kept(recurrent_kept(c.cell)),
        gradients(recurrent_gradients(c.cell)),
        hidden(c.hidden),
        steps(static_cast<int>(c.sizes.size())) {
    for (const int64_t n : c.sizes) {
      offsets.push_back(rows);
      rows += n;
    }
    const size_t states = size_t(c.batch) * hidden;
    projected = small_values<T>(size_t(rows) * gates * hidden, 1);
    w = small_values<T>(size_t(gates) * hidden * hidden, 2);
    bias = small_values<T>(hidden, 3);
    h0 = small_values<T>(states, 4);
    c0 = small_values<T>(states, 5);
    dy = small_values<T>(size_t(rows) * hidden, 6);
    dh_n = small_values<T>(states, 7);
    dc_n = small_values<T>(states, 8);
    forward();
    backward();
  }

  int row_of(int number) const { return c.reverse ? steps - 1 - number : number; }

  // As the kernels round: h and what is kept to T, states between steps not.
  void forward() {
    y.assign(size_t(rows) * hidden, 0.0);
    cells = y;
    values.assign(size_t(rows) * kept * hidden, 0.0);
    h_n.assign(size_t(c.batch) * hidden, 0.0);
    c_n = h_n;
    Doubles rounded = h_n;
    for (size_t i = 0; c.state && i < h_n.size(); ++i) {
      h_n[i] = rounded[i] = to_float(h0[i]);
      c_n[i] = to_float(c0[i]);
    }
    for (int number = 0; number < steps; ++number) {
      const int t = row_of(number);
      for (int b = 0; b < c.sizes[t]; ++b) {
        const int64_t row = offsets[t] + b;
        Doubles now(hidden);
        for (int u = 0; u < hidden; ++u) {
          double sum[4] = {}, in[4] = {};
          for (int g = 0; g < gates; ++g) {
            in[g] = to_float(projected[(row * gates + g) * hidden + u]);
            for (int k = 0; k < hidden; ++k) {
              sum[g] += to_float(w[(size_t(g) * hidden + u) * hidden + k]) *
                        rounded[size_t(b) * hidden + k];
            }
          }
          const size_t state = size_t(b) * hidden + u;
          double* save = kept > 0 ? &values[(row * kept) * hidden + u] : nullptr;
          const auto keep = [&](int i, double v) {
            save[i * hidden] = to_float(from_float<T>(float(v)));
          };
          if (gates == 1) {
            now[u] =
                c.cell == Cell::kTanh ? std::tanh(in[0] + sum[0]) : std::fmax(0.0, in[0] + sum[0]);
          } else if (gates == 4) {
            const double i = sigmoid_of(in[0] + sum[0]), f = sigmoid_of(in[1] + sum[1]);
            const double g = std::tanh(in[2] + sum[2]), o = sigmoid_of(in[3] + sum[3]);
            c_n[state] = f * c_n[state] + i * g;
            now[u] = o * std::tanh(c_n[state]);
            keep(0, i), keep(1, f), keep(2, g), keep(3, o);
            cells[row * hidden + u] = to_float(from_float<T>(float(c_n[state])));
          } else {
            const double r = sigmoid_of(in[0] + sum[0]), z = sigmoid_of(in[1] + sum[1]);
            const double hidden_part = sum[2] + to_float(bias[u]);
            const double n = std::tanh(in[2] + r * hidden_part);
            now[u] = (1.0 - z) * n + z * h_n[state];
            keep(0, r), keep(1, z), keep(2, n), keep(3, hidden_part);
          }
        }
        for (int u = 0; u < hidden; ++u) {
          h_n[size_t(b) * hidden + u] = now[u];
          rounded[size_t(b) * hidden + u] = to_float(from_float<T>(float(now[u])));
          y[row * hidden + u] = rounded[size_t(b) * hidden + u];
        }
      }
    }
  }

  double before(const Doubles& of, const std::vector<T>& start, int t, int b, int u) const {
    const int earlier = c.reverse ? t + 1 : t - 1;
    if (earlier >= 0 && earlier < steps && b < c.sizes[earlier]) {
      return of[(offsets[earlier] + b) * hidden + u];
    }
    return c.state ? double(to_float(start[size_t(b) * hidden + u])) : 0.0;
  }

  void backward() {
    dgates.assign(size_t(rows) * gradients * hidden, 0.0);
    carry.assign(size_t(c.batch) * hidden, 0.0);
    std::vector<bool> started(c.batch);
    Doubles through(size_t(c.batch) * hidden, 0.0);  // dh by the product
    for (int number = steps - 1; number >= 0; --number) {
      const int t = row_of(number);
      for (int b = 0; b < c.sizes[t]; ++b) {
        const int64_t row = offsets[t] + b;
        for (int u = 0; u < hidden; ++u) {
          const size_t state = size_t(b) * hidden + u;
          double dh = to_float(dy[row * hidden + u]);
          dh += started[b] ? through[state] : double(to_float(dh_n[state]));
          double* out = &dgates[row * gradients * hidden + u];
          const auto put_at = [&](int i, double v) {
            out[i * hidden] = to_float(from_float<T>(float(v)));
          };
          const double here = y[row * hidden + u];
          if (gradients == 1) {
            put_at(0, c.cell == Cell::kTanh ? dh * (1.0 - here * here) : (here > 0.0 ? dh : 0.0));
            continue;
          }
          const double* v = &values[row * kept * hidden + u];
          const double g0 = v[0], g1 = v[hidden], g2 = v[2 * hidden], g3 = v[3 * hidden];
          if (c.cell == Cell::kLstm) {
            if (!started[b]) carry[state] = to_float(dc_n[state]);
            const double tanh_c = std::tanh(cells[row * hidden + u]);
            const double dc = carry[state] + dh * g3 * (1.0 - tanh_c * tanh_c);
            put_at(0, dc * g2 * g0 * (1.0 - g0));
            put_at(1, dc * before(cells, c0, t, b, u) * g1 * (1.0 - g1));
            put_at(2, dc * g0 * (1.0 - g2 * g2));
            put_at(3, dh * tanh_c * g3 * (1.0 - g3));
            carry[state] = dc * g1;
          } else {
            if (started[b]) dh += carry[state];
            const double dn = dh * (1.0 - g1) * (1.0 - g2 * g2);
            put_at(0, dn * g0);
            put_at(1, dn * g3 * g0 * (1.0 - g0));
            put_at(2, dh * (before(y, h0, t, b, u) - g2) * g1 * (1.0 - g1));
            put_at(3, dn);
            carry[state] = dh * g1;
          }
        }
        started[b] = true;
        const int meeting = c.cell == Cell::kGru ? 3 : gradients;
        for (int k = 0; k < hidden; ++k) {
          double sum = 0.0;
          for (int g = 0; g < meeting; ++g) {
            const int from = c.cell == Cell::kGru ? (g + 2) % 3 : g;
            for (int u = 0; u < hidden; ++u) {
              sum += dgates[(row * gradients + g) * hidden + u] *
                     to_float(w[(size_t(from) * hidden + u) * hidden + k]);
            }
          }
          through[size_t(b) * hidden + k] = sum;
        }
      }
    }
  }
};

template <typename T>
void compare(const std::vector<T>& found, const Doubles& exact, const std::string& what) {
  // Values of T one rounding apart feed back through up to five steps.
  for (size_t i = 0; i < exact.size(); ++i) {
    expect(found[i], exact[i], 1.0 + (sizeof(T) == 2 ? 6e5 * kHalfUnit<T> : 0.0), what);
  }
}

// Memory of a layer's results, and the kernels' arguments on it.
template <typename T>
struct Operands {
  Layer<T> layer;
  std::string what;
  std::vector<T> y, cells, gates, h_n, c_n, dgates, carry_last;
  std::vector<float> h, c, carry;

  explicit Operands(const Case& given)
      : layer(given),
        what("cell " + std::to_string(int(given.cell)) + " hidden " +
             std::to_string(given.hidden)) {
    const size_t rows = size_t(layer.rows), hidden = size_t(given.hidden);
    const size_t states = given.batch * hidden;
    const T nothing = from_float<T>(NAN);
    y.assign(rows * hidden, nothing);
    cells = y;
    gates.assign(rows * layer.kept * hidden, nothing);
    dgates.assign(rows * layer.gradients * hidden, nothing);
    h_n.assign(states, nothing);
    c_n = carry_last = h_n;
    h.assign(states, NAN);
    c = carry = h;
  }

  // All but how the work is cut.
  RecurrentShape shape() const {
    const Case& given = layer.c;
    RecurrentShape s{};
    s.cell = given.cell;
    s.reverse = given.reverse;
    s.batch = given.batch;
    s.steps = layer.steps;
    s.hidden = given.hidden;
    bool even = true;
    for (const int64_t n : given.sizes) even = even && n == given.batch;
    s.sizes = even ? nullptr : given.sizes.data();
    s.offsets = even ? nullptr : layer.offsets.data();
    s.w = layer.w.data();
    s.w_stride[0] = given.hidden;
    s.w_stride[1] = 1;
    return s;
  }

  RecurrentFwd forward(const RecurrentShape& s) {
    RecurrentFwd f{};
    f.s = s;
    f.projected = layer.projected.data();
    f.hidden_bias = layer.bias.data();
    f.h0 = layer.c.state ? layer.h0.data() : nullptr;
    f.c0 = layer.c.state ? layer.c0.data() : nullptr;
    f.y = y.data();
    f.gates = layer.kept > 0 ? gates.data() : nullptr;
    f.cells = cells.data();
    f.h = h.data();
    f.c = c.data();
    f.h_n = h_n.data();
    f.c_n = c_n.data();
    return f;
  }

  RecurrentBwd backward(const RecurrentShape& s) {
    RecurrentBwd g{};
    g.s = s;
    g.dy = layer.dy.data();
    g.dh_n = layer.dh_n.data();
    g.dc_n = layer.dc_n.data();
    g.y = y.data();
    g.gates = gates.data();
    g.cells = cells.data();
    g.h0 = layer.c.state ? layer.h0.data() : nullptr;
    g.c0 = layer.c.state ? layer.c0.data() : nullptr;
    g.dgates = dgates.data();
    if (layer.kept > 0) {
      g.carry = carry.data();
      g.carry_last = carry_last.data();
    }
    return g;
  }

  void check_forward() const {
    compare(y, layer.y, what + " y");
    compare(h_n, layer.h_n, what + " h_n");
    if (layer.kept > 0) compare(gates, layer.values, what + " gates");
    if (layer.c.cell != Cell::kLstm) return;
    compare(c_n, layer.c_n, what + " c_n");
    compare(cells, layer.cells, what + " cells");
  }

  void check_backward() const {
    compare(dgates, layer.dgates, what + " dgates");
    if (layer.kept > 0) compare(carry_last, layer.carry, what + " carry");
  }
};

}  // namespace lmfast::gpu
