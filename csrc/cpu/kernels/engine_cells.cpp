// A step, or many, of a packed recurrent model: embedding, layers, output layer, in one call.
//
// Floor: as for a decoder, reading all weights once per step, 90 % of them the output layer's; so
// products are the decoder's (engine_product.h), in its phases. A layer multiplies the inputs of
// all steps at once, and then its states step by step: one phase a step, at whose end each thread
// computes the units whose gates it has. States alternate between two places, since other threads
// still read those of the step before.
#include "engine_steps.h"
#include "recurrent_math.h"

namespace lmfast::LMFAST_ISA {
namespace {

// x + 1/2 above zero, sigmoid(x) below.
LMFAST_INLINE VecF positive(VecF x) {
  return select_less(x, VecF::zero(), gate_sigmoid(x), x + VecF::set1(0.5f));
}

// s(f) / (s(f) + s(i)) = 1 / (1 + e^-(f' - i') (1 + e^-|f|) / (1 + e^-|i|)) with x' = min(x, 0).
LMFAST_INLINE VecF share_of(VecF f, VecF i) {
  const VecF one = VecF::set1(1.0f), zero = VecF::zero(), most = VecF::set1(80.0f);
  const VecF apart = max(zero - most, min(most, min(zero, f) - min(zero, i)));
  const VecF ratio = (one + gate_exp<-1>(magnitude(f))) / (one + gate_exp<-1>(magnitude(i)));
  return one / fmadd(gate_exp<-1>(apart), ratio, one);
}

class CellSteps : public Products {
 public:
  explicit CellSteps(const EngineArgs& a) : Products(a), batch_(a.batch) {}

  void run() {
    for (int64_t step = 0; step < a_.steps; ++step) {
      forward();
      if (a_.chosen == nullptr) return;
      choose();
      if (stopped()) return;
      a_.ids = a_.chosen;
      a_.chosen += a_.tokens;
    }
  }

 private:
  static constexpr int W = VecF::kWidth;

  void forward() {
    const int64_t width = m_.width, rows = m_.layers * batch_;
    phases_.run(a_.tokens + rows, (a_.tokens + rows) * width * 8, 1,
                [&](int64_t first, int64_t past) {
                  for (int64_t i = first; i < past; ++i) {
                    if (i < a_.tokens) {
                      embed(a_, i);
                    } else {
                      const int64_t row = i - a_.tokens;
                      memcpy(a_.states + row * a_.x_stride, a_.state + row * width,
                             sizeof(float) * static_cast<size_t>(width));
                    }
                  }
                });
    for (int64_t i = 0; i < m_.layers; ++i) layer(i, a_.cells[i]);
    head();
  }

  // The states of a layer before step t, of all rows.
  float* states(int64_t index, int64_t t) const {
    return a_.states + ((t & 1) * m_.layers + index) * batch_ * a_.x_stride;
  }

  void layer(int64_t index, const EngineCell& l) {
    const auto kind = static_cast<EngineCellKind>(l.kind);
    const int64_t units = round_up(m_.width, kEnginePanel) / kEnginePanel;
    const Source x{a_.x, a_.x_stride, m_.width, nullptr, nullptr};
    product(l.input, x, a_.tokens, a_.rounded, 1, store_to(l.input, a_.qkv, a_.qkv_stride, false));
    if (kind == EngineCellKind::kMinGru || kind == EngineCellKind::kMinLstm) {
      return phases_.run(units, a_.tokens * units * 256, 1,
                         [&](int64_t first, int64_t past) { scan(index, kind, first, past); });
    }
    const bool rounded = batch_ >= kEngineRoundedRows;
    for (int64_t t = 0; t < a_.length; ++t) {
      const int64_t count = a_.firsts[t + 1] - a_.firsts[t];
      const Source h{states(index, t), a_.x_stride, m_.width, nullptr,
                     count == batch_ ? nullptr : a_.token_rows + a_.firsts[t]};
      const auto store = store_to(l.state, a_.hidden, a_.hidden_stride, false);
      if (kind != EngineCellKind::kGruTextbook) {
        product(l.state, h, count, rounded, kEngineStateGates[l.kind], store,
                [&](int64_t first, int64_t past) { advance(index, kind, t, first, past); });
        continue;
      }
      product(l.state, h, count, rounded, 2, store,
              [&](int64_t first, int64_t past) { reset(index, t, first, past); });
      const Source kept{a_.update, a_.x_stride, m_.width, nullptr, nullptr};
      product(l.candidate, kept, count, rounded, 1,
              store_to(l.candidate, a_.joined, a_.joined_stride, false),
              [&](int64_t first, int64_t past) { advance(index, kind, t, first, past); });
    }
  }

  // Runs run(token, place among the step's rows, row, first column, lanes) for the units.
  template <class Run>
  void each(int64_t t, int64_t first, int64_t past, const Run& run) const {
    const int64_t end = past * kEnginePanel < m_.width ? past * kEnginePanel : m_.width;
    for (int64_t token = a_.firsts[t]; token < a_.firsts[t + 1]; ++token) {
      for (int64_t c = first * kEnginePanel; c < end; c += W) {
        run(token, token - a_.firsts[t], a_.token_rows[token], c, lanes_left(c, m_.width));
      }
    }
  }
  // Gate `gate` of `gates` that come a panel of each in turn.
  static VecF gate(const float* row, int64_t column, int gates, int which) {
    const int64_t panel = column / kEnginePanel * gates + which;
    return VecF::load(row + panel * kEnginePanel + column % kEnginePanel);
  }

  // r h and z of the textbook's GRU; z takes the place of its product.
  void reset(int64_t index, int64_t t, int64_t first, int64_t past) const {
    const float* before = states(index, t);
    each(t, first, past, [&](int64_t token, int64_t i, int64_t row, int64_t c, int lanes) {
      const float* x = a_.qkv + token * a_.qkv_stride;
      float* h = a_.hidden + i * a_.hidden_stride;
      const VecF r = gate_sigmoid(gate(x, c, 3, 0) + gate(h, c, 2, 0));
      (r * VecF::load(before + row * a_.x_stride + c, lanes))
          .store(a_.update + i * a_.x_stride + c, lanes);
      const int64_t at = (c / kEnginePanel * 2 + 1) * kEnginePanel + c % kEnginePanel;
      gate_sigmoid(gate(x, c, 3, 1) + gate(h, c, 2, 1)).store(h + at);
    });
  }

  void advance(int64_t index, EngineCellKind kind, int64_t t, int64_t first, int64_t past) const {
    const int64_t plane = batch_ * m_.width;
    const float* before = states(index, t);
    float *after = states(index, t + 1), *kept = a_.state + index * plane;
    float* cells = a_.state + (m_.layers + index) * plane;
    const VecF one = VecF::set1(1.0f);
    each(t, first, past, [&](int64_t token, int64_t i, int64_t row, int64_t c, int lanes) {
      const float *x = a_.qkv + token * a_.qkv_stride, *p = a_.hidden + i * a_.hidden_stride;
      const VecF h = VecF::load(before + row * a_.x_stride + c, lanes);
      VecF y = h;
      switch (kind) {
        case EngineCellKind::kLstm: {
          const VecF in = gate_sigmoid(gate(x, c, 4, 0) + gate(p, c, 4, 0));
          const VecF forget = gate_sigmoid(gate(x, c, 4, 1) + gate(p, c, 4, 1));
          const VecF g = gate_tanh(gate(x, c, 4, 2) + gate(p, c, 4, 2));
          const VecF out = gate_sigmoid(gate(x, c, 4, 3) + gate(p, c, 4, 3));
          float* cell = cells + row * m_.width + c;
          const VecF next = fmadd(forget, VecF::load(cell, lanes), in * g);
          next.store(cell, lanes);
          y = out * gate_tanh(next);
          break;
        }
        case EngineCellKind::kGru: {
          const VecF r = gate_sigmoid(gate(x, c, 3, 0) + gate(p, c, 3, 0));
          const VecF z = gate_sigmoid(gate(x, c, 3, 1) + gate(p, c, 3, 1));
          const VecF n = gate_tanh(fmadd(r, gate(p, c, 3, 2), gate(x, c, 3, 2)));
          y = fmadd(z, h, (one - z) * n);
          break;
        }
        case EngineCellKind::kGruTextbook: {
          const VecF z = gate(p, c, 2, 1);
          const float* product = a_.joined + i * a_.joined_stride;
          const VecF n = gate_tanh(gate(x, c, 3, 2) + VecF::load(product + c));
          y = fmadd(z, n, (one - z) * h);
          break;
        }
        default:
          y = gate_tanh(gate(x, c, 1, 0) + gate(p, c, 1, 0));
      }
      y.store(after + row * a_.x_stride + c, lanes);
      y.store(a_.x + token * a_.x_stride + c, lanes);
      if (t + 1 == a_.lengths[row]) y.store(kept + row * m_.width + c, lanes);
    });
  }

  // All steps of a layer whose gates do not look at its states.
  void scan(int64_t index, EngineCellKind kind, int64_t first, int64_t past) const {
    float* kept = a_.state + index * batch_ * m_.width;
    for (int64_t t = 0; t < a_.length; ++t) {
      each(t, first, past, [&](int64_t token, int64_t, int64_t row, int64_t c, int lanes) {
        const float* p = a_.qkv + token * a_.qkv_stride;
        float *h = kept + row * m_.width + c, *x = a_.x + token * a_.x_stride + c;
        VecF keep = VecF::zero(), take = keep, candidate = keep;
        if (kind == EngineCellKind::kMinGru) {
          const VecF z = gate(p, c, 2, 0);
          keep = gate_sigmoid(VecF::zero() - z);
          take = gate_sigmoid(z);
          candidate = gate(p, c, 2, 1);
        } else {
          const VecF f = gate(p, c, 3, 0), i = gate(p, c, 3, 1);
          keep = share_of(f, i);
          take = share_of(i, f);
          candidate = gate(p, c, 3, 2);
        }
        const VecF y = fmadd(keep, VecF::load(h, lanes), take * positive(candidate));
        y.store(h, lanes);
        (VecF::load(x, lanes) + y).store(x, lanes);
      });
    }
  }

  int64_t batch_;
};

}  // namespace

void engine_run_cells(const EngineArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) CellSteps(a).run();
}

}  // namespace lmfast::LMFAST_ISA
