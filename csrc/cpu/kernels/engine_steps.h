// What every engine's steps are made of: products with packed matrices in phases, the output layer,
// the choice of the likeliest token.
#pragma once

#include "../simd_tanh.h"
#include "engine_phases.h"
#include "engine_product_int.h"
#include "engine_rows.h"

namespace lmfast::LMFAST_ISA {
namespace {

LMFAST_INLINE bool is_present(const EngineNorm& norm) {
  return norm.kind != static_cast<int64_t>(EngineNormKind::kNone);
}

// The first of the largest of x[0], ..., x[n - 1].
inline int64_t first_largest(const float* x, int64_t n) {
  constexpr int W = VecF::kWidth;
  VecF top = VecF::set1(x[0]), broken = VecF::zero();
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const VecF v = VecF::load(x + i);
    top = max(top, v);
    broken = broken + v * VecF::zero();
  }
  float largest = hmax(top);
  for (; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
  if (sum(broken) != 0.0f || largest != largest) {  // NaN or infinity among them
    for (i = 0; i < n; ++i) {
      if (x[i] != x[i]) return i;
    }
    largest = x[0];
    for (i = 1; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
  }
  for (i = 0; i < n && x[i] != largest;) ++i;
  return i < n ? i : 0;
}

class Products {
 public:
  explicit Products(const EngineArgs& a) : a_(a), m_(*a.model), phases_(*a.progress) {
    char* mine = a.scratch + phases_.me() * a.scratch_bytes;
    attention_ = mine;
    mine += a.attention_scratch;
    carried_ = reinterpret_cast<float*>(mine);
    const int64_t most = a.tokens > a.outputs ? a.tokens : a.outputs;
    mine += engine_sums(most) * 4;
    operand_ = mine;
  }

 protected:
  // The first of the largest logits of every row; NaN counts as the largest, as for torch.argmax.
  void choose() {
    const int64_t segments = (m_.vocab + kEngineSegment - 1) / kEngineSegment;
    phases_.run(a_.tokens * segments, a_.tokens * m_.vocab, 1, [&](int64_t first, int64_t past) {
      for (int64_t i = first; i < past; ++i) {
        const int64_t from = i % segments * kEngineSegment, left = m_.vocab - from;
        const float* x = a_.logits + i / segments * m_.vocab + from;
        a_.best[i] = from + first_largest(x, left < kEngineSegment ? left : kEngineSegment);
      }
    });
    phases_.run(a_.tokens, a_.tokens * 256, 1, [&](int64_t first, int64_t past) {
      for (int64_t i = first; i < past; ++i) {
        const float* x = a_.logits + i * m_.vocab;
        int64_t best = a_.best[i * segments];
        for (int64_t s = 1; s < segments && x[best] == x[best]; ++s) {
          const int64_t other = a_.best[i * segments + s];
          if (!(x[other] <= x[best])) best = other;
        }
        a_.chosen[i] = best;
      }
    });
  }

  bool stopped() const {
    for (int64_t i = 0; i < a_.tokens; ++i) {
      for (int64_t s = 0; s < a_.stop_count; ++s) {
        if (a_.chosen[i] == a_.stops[s]) return true;
      }
    }
    return false;
  }

  RowsAs rows_as(const EngineMatrix& w, bool rounded) const {
    if (w.type == static_cast<int64_t>(EngineWeights::kF32)) return RowsAs::kFloats;
    if (a_.bf16 && rounded) return RowsAs::kPairs;
    if (!is_integer(w)) return RowsAs::kFloats;
    return a_.vnni ? RowsAs::kBytes : RowsAs::kWords;
  }

  // Runs done(row, rows, panel, panels, sums) for all panels of the product, phase and barrier. A
  // unit is `unit` panels; finish(first, past) comes after those units, by the same thread.
  template <class Done, class Finish>
  void product(const EngineMatrix& w, const Source& from, int64_t rows, bool rounded, int64_t unit,
               const Done& done, const Finish& finish) {
    Operand x{};
    const RowsAs as = rows_as(w, rounded);
    const bool in_place = usable_in_place(from, as);
    const bool shared = !in_place && (rows > kEngineFewRows || as == RowsAs::kPairs);
    bool ready = in_place;
    if (in_place) {
      x.rows = const_cast<float*>(from.rows);
      x.stride = from.stride;
    } else {
      x = operand_in(shared ? a_.operand : operand_, rows, a_.operand_stride);
    }
    if (shared) {
      phases_.run(rows, rows * w.depth * 16, 1, [&](int64_t first, int64_t past) {
        prepare(from, a_.weights, w, as, x, first, past);
      });
      ready = true;
    }
    const Division d{w, rows, unit};
    const Following then = following_;
    following_ = {};
    bool waiting = false;
    phases_.run(
        d.units, d.work, d.align,
        [&](int64_t first, int64_t past) {
          if (!ready) {
            fetch(kBeforeRows);
            prepare(from, a_.weights, w, as, x, 0, rows);
          }
          ready = true;
          multiply(w, a_.weights, x, as, rows, first * unit, past * unit, operand_, carried_, done);
          finish(first, past);
        },
        [&] {
          if (!waiting) expect(then, rows);
          waiting = true;
          fetch(kWhileWaiting);
        });
    if (!waiting) expect(then, rows);
  }
  template <class Done>
  void product(const EngineMatrix& w, const Source& from, int64_t rows, bool rounded, int64_t unit,
               const Done& done) {
    product(w, from, rows, rounded, unit, done, [](int64_t, int64_t) {});
  }

  // How a product's panels are divided.
  struct Division {
    int64_t panel_bytes, units, work, align;
    Division(const EngineMatrix& w, int64_t rows, int64_t unit)
        : panel_bytes(w.depth * 64 / kEngineDepthStep[w.type]),
          units(w.panels / unit),
          work(w.panels * panel_bytes * (1 + rows / 4)),
          align(unit < kMostPanels ? kMostPanels / unit : 1) {}
  };

  // The product after the one that is called next, whose weights are asked for while threads wait.
  void follow(const EngineMatrix& w, int64_t unit) { following_ = {&w, unit}; }

  // Asks for some more lines of the weights that this thread reads next: memory would rest while
  // rows are normalised, while attention is computed, and while a phase's last chunk is waited for.
  void fetch(int lines) {
    for (int i = 0; i < lines && fetched_ < expected_; ++i, ++fetched_) {
      prefetch(next_ + fetched_ * 64);
    }
  }
  static constexpr int kWhileWaiting = 4, kBeforeRows = 32;  // lines

  const float* bias_of(const EngineMatrix& w) const {
    return w.bias == kEngineNone ? nullptr : reinterpret_cast<const float*>(a_.weights + w.bias);
  }

  // out = product + bias, or out += product + bias, at the product's own columns.
  auto store_to(const EngineMatrix& w, float* out, int64_t stride, bool add) const {
    const float* bias = bias_of(w);
    return [=](int64_t row, int rows, int64_t panel, int panels, const float* sums) {
      for (int r = 0; r < rows; ++r) {
        float* to = out + (row + r) * stride + panel * kEnginePanel;
        for (int64_t c = 0; c < panels * kEnginePanel; c += VecF::kWidth) {
          VecF v = VecF::load(sums + r * kSumsStride + c);
          if (bias != nullptr) v = v + VecF::load(bias + panel * kEnginePanel + c);
          if (add) v = v + VecF::load(to + c);
          v.store(to + c);
        }
      }
    };
  }

  Source normed(const EngineNorm& norm) const {
    return {a_.x, a_.x_stride, m_.width, is_present(norm) ? &norm : nullptr, nullptr};
  }

  void head() {
    if (a_.outputs == 0) return;
    const EngineMatrix& w = m_.head;
    const float* bias = bias_of(w);
    Source from = normed(m_.final_norm);
    from.index = a_.wanted;
    const float cap = static_cast<float>(m_.logit_softcap);
    const VecF down = VecF::set1(cap > 0.0f ? 1.0f / cap : 0.0f), back = VecF::set1(cap);
    product(w, from, a_.outputs, a_.rounded_head, 1,
            [=](int64_t row, int rows, int64_t panel, int panels, const float* sums) {
              for (int r = 0; r < rows; ++r) {
                const float* in = sums + r * kSumsStride;
                float* to = a_.logits + (row + r) * m_.vocab;
                for (int64_t c = 0; c < panels * kEnginePanel; c += VecF::kWidth) {
                  const int64_t at = panel * kEnginePanel + c;
                  if (at >= m_.vocab) break;
                  VecF v = VecF::load(in + c);
                  if (bias != nullptr) v = v + VecF::load(bias + at);
                  if (cap > 0.0f) v = tanh(v * down) * back;
                  v.store(to + at, lanes_left(at, m_.vocab));
                }
              }
            });
  }

  struct Following {
    const EngineMatrix* w;
    int64_t unit;
  };
  void expect(const Following& next, int64_t rows) {
    expected_ = fetched_ = 0;
    if (next.w == nullptr || rows > kEngineFewRows) return;
    const Division d{*next.w, rows, next.unit};
    const int64_t unit = phases_.first_unit(d.units, d.work, d.align);
    next_ = engine_panel(*next.w, a_.weights, unit * next.unit).at;
    const int64_t lines = (d.units - unit) * next.unit * d.panel_bytes / 64;
    expected_ = lines < kFetched ? lines : kFetched;
  }

  EngineArgs a_;  // of the step
  const EngineModel& m_;
  Phases phases_;
  Following following_{};
  void* attention_;
  float* carried_;
  char* operand_;

 private:
  static constexpr int64_t kFetched = 2048;  // lines: 128 KB of a second-level cache
  const char* next_ = nullptr;
  int64_t expected_ = 0, fetched_ = 0;
};

}  // namespace
}  // namespace lmfast::LMFAST_ISA
