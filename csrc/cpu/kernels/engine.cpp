// One step of a packed decoder: from the ids of a few new tokens to the logits after them, in one
// call, every participating thread going through the same phases.
//
// Floor: reading all weights once per step, from memory: 622 MB of fp32 for GPT-2 124M. What makes
// a step of small rows reach it: one fork of the thread pool (engine_phases.h), weights in the
// order they are read (engine_product.h), and no pass over data between products that is not part
// of one: norms are computed by every thread for itself where rows are few, bias, activation,
// residual sum and rotation at the end of the product that makes their operand, and keys go from
// the product into the cache. While a thread waits, normalises a row or computes attention, it asks
// for the weights of its next product (follow, fetch), so that memory does not rest.
//
// A layer is: norm, QKV, rotation, append | attention | output, residual | norm, up | down,
// residual; a bar is a barrier.
#include "engine.h"

#include "engine_steps.h"

namespace lmfast::LMFAST_ISA {
namespace {

class Steps : public Products {
 public:
  using Products::Products;

  // What a step reads is never written again, so that a thread that comes late finds the numbers of
  // chunks that all others had.
  void run() {
    for (int64_t step = 0; step < a_.steps; ++step) {
      forward();
      if (a_.chosen == nullptr) return;
      choose();
      if (stopped()) return;
      a_.ids = a_.chosen;
      a_.chosen += a_.tokens;
      a_.positions += a_.tokens;
      a_.groups += m_.groups;
    }
  }

 private:
  static constexpr int kBeforeAttention = 64;  // lines, about what is asked for at one time

  void forward() {
    phases_.run(a_.tokens, a_.tokens * m_.width * 8, 1, [&](int64_t first, int64_t past) {
      for (int64_t i = first; i < past; ++i) embed(a_, i);
    });
    for (int64_t i = 0; i < m_.layers; ++i) layer(i);
    if (a_.chosen != nullptr) follow(a_.layers[0].qkv, head_panels());
    head();
  }

  void layer(int64_t index) {
    const EngineLayer& l = a_.layers[index];
    const bool parallel = l.parallel != 0;
    const int64_t gates = l.gated != 0 ? 2 : 1;
    parallel ? follow(l.up, gates) : follow(l.o, 1);
    queries_keys_values(index, l);
    if (parallel) {  // before attention changes x
      follow(l.o, 1);
      up(l);
    }
    attention(index, l);
    const Source joined{a_.joined, a_.joined_stride, m_.heads * m_.head_dim, nullptr, nullptr};
    parallel ? follow(l.down, 1) : follow(l.up, gates);
    add_product(l.o, joined, l.attention_post_norm);
    if (!parallel) {
      follow(l.down, 1);
      up(l);
    }
    const Source hidden{a_.hidden, a_.hidden_stride, m_.hidden, nullptr, nullptr};
    const bool last = index + 1 == m_.layers;
    last ? follow(m_.head, 1) : follow(a_.layers[index + 1].qkv, head_panels());
    add_product(l.down, hidden, l.mlp_post_norm);
  }

  // Panels of a head.
  int64_t head_panels() const { return round_up(m_.head_dim, kEnginePanel) / kEnginePanel; }

  void queries_keys_values(int64_t index, const EngineLayer& l) {
    const RopeAppendArgs r = append_arguments(a_, index);
    const auto heads = [&](int64_t token, int64_t first, int64_t past) {
      for (int64_t h = first; h < past; ++h) finish_head(a_, l, r, token, h);
    };
    const auto store = store_to(l.qkv, a_.qkv, a_.qkv_stride, false);
    const bool whole = l.whole_qk_norm != 0;
    product(l.qkv, normed(l.attention_norm), a_.tokens, a_.rounded, head_panels(), store,
            [&](int64_t first, int64_t past) {
              for (int64_t t = 0; t < a_.tokens && !whole; ++t) heads(t, first, past);
            });
    if (!whole) return;
    phases_.run(a_.tokens, a_.tokens * a_.qkv_stride * 8, 1, [&](int64_t first, int64_t past) {
      for (int64_t t = first; t < past; ++t) {
        float* q = a_.qkv + t * a_.qkv_stride;
        normalise_heads(l.q_norm, a_.weights, q, m_.heads, m_.head_dim);
        normalise_heads(l.k_norm, a_.weights, q + m_.heads * r.q.stride[1], m_.kv_heads,
                        m_.head_dim);
        heads(t, 0, m_.heads + 2 * m_.kv_heads);
      }
    });
  }

  // The arguments of one row's attention.
  AttentionArgs attention_arguments(int64_t index, const EngineLayer& l, const EngineRow& row,
                                    const EngineGroup& group) const {
    const EngineStorage& s = a_.storage[index];
    const int64_t wide = round_up(m_.head_dim, kEnginePanel);
    AttentionArgs t{};
    t.dtype = DType::kF32;
    t.batch = 1;
    t.heads = m_.heads;
    t.kv_heads = m_.kv_heads;
    t.length = row.length;
    t.keys = row.keys;
    t.head_dim = m_.head_dim;
    t.q = {a_.qkv + row.first * a_.qkv_stride, 0, wide, a_.qkv_stride};
    t.out = {a_.joined + row.first * a_.joined_stride, 0, m_.head_dim, a_.joined_stride};
    t.k = {s.keys.data, s.keys.stride[0], s.keys.stride[1], s.keys.stride[2]};
    t.v = {s.values.data, s.values.stride[0], s.values.stride[1], s.values.stride[2]};
    t.stored = {s.type, nullptr, 0, s.keys.scales, s.values.scales, {}, {}};
    for (int d = 0; d < 2; ++d) {
      t.stored.key_scale_stride[d] = s.keys.scale_stride[d];
      t.stored.value_scale_stride[d] = s.values.scale_stride[d];
    }
    if (group.table != nullptr) {
      t.stored.table = group.table + row.storage_row * group.table_row;
      t.stored.table_row = group.table_row;
    } else {
      const int64_t size = s.type == Stored::kF32 ? 4 : (s.type == Stored::kI8 ? 1 : 2);
      t.k.data = static_cast<const char*>(t.k.data) + row.storage_row * t.k.batch * size;
      t.v.data = static_cast<const char*>(t.v.data) + row.storage_row * t.v.batch * size;
      if (s.type == Stored::kI8) {
        t.stored.key_scales += row.storage_row * s.keys.scale_stride[0];
        t.stored.value_scales += row.storage_row * s.values.scale_stride[0];
      }
    }
    t.offsets = &row.offset;
    t.lengths = &row.keys;
    t.causal = true;
    t.window = l.window;
    t.scale = static_cast<float>(l.scale);
    t.softcap = static_cast<float>(l.softcap);
    t.sinks =
        l.sinks == kEngineNone ? nullptr : reinterpret_cast<const float*>(a_.weights + l.sinks);
    t.ranges = row.ranges;
    t.splits = row.splits;
    t.keys_per_split = row.keys_per_split;
    t.scratch = attention_;
    const bool parts = row.splits > 1;
    t.partial = parts ? a_.partial + row.partial : reinterpret_cast<float*>(attention_);
    return t;
  }

  void attention(int64_t index, const EngineLayer& l) {
    const EngineGroup& group = a_.groups[l.group];
    const int64_t wide = round_up(m_.head_dim, 32);
    int64_t work = 0;
    for (int64_t b = 0; b < a_.batch; ++b) {
      work += group.rows[b].keys * (1 + group.rows[b].length / 4);
    }
    work *= m_.kv_heads * wide * 8;
    const auto idle = [&] { fetch(kWhileWaiting); };
    fetch(kBeforeAttention);
    const auto rows = [&](int64_t first, int64_t past) {
      int64_t b = 0;
      AttentionArgs t{};
      for (int64_t u = first, last = -1; u < past; ++u) {
        while (b + 1 < a_.batch && group.rows[b + 1].unit <= u) ++b;
        const EngineRow& row = group.rows[b];
        if (b != last) t = attention_arguments(index, l, row, group);
        last = b;
        const int64_t unit = u - row.unit;
        if (!row.decoding) {
          attention_fwd(t, unit, unit + 1);
          continue;
        }
        const bool bytes = t.stored.type == Stored::kI8 && a_.vnni;
        (bytes ? attention_decode_bytes : attention_decode)(t, unit, unit + 1);
        if (row.splits == 1) {
          const int64_t rows = attention_rows(t);
          attention_combine(t, unit * rows, (unit + 1) * rows);
        }
      }
    };
    phases_.run(group.units, work, 1, rows, idle);
    const auto combine = [&](int64_t first, int64_t past) {
      int64_t b = 0;
      for (int64_t u = first; u < past; ++u) {
        while (b + 1 < a_.batch && group.rows[b + 1].combine <= u) ++b;
        const EngineRow& row = group.rows[b];
        attention_combine(attention_arguments(index, l, row, group), u - row.combine,
                          u - row.combine + 1);
      }
    };
    phases_.run(group.combines, group.combines * 4096, 1, combine, idle);
  }

  void up(const EngineLayer& l) {
    const float* bias = bias_of(l.up);
    const auto kind = static_cast<EngineActivation>(l.activation);
    const bool gated = l.gated != 0;
    product(l.up, normed(l.mlp_norm), a_.tokens, a_.rounded, gated ? 2 : 1,
            [=](int64_t row, int rows, int64_t panel, int panels, const float* sums) {
              for (int r = 0; r < rows; ++r) {
                float* hidden = a_.hidden + (row + r) * a_.hidden_stride;
                for (int p = 0; p < panels; ++p) {
                  // A gate waits in the place of its result for the panel behind it.
                  const bool last = gated && (panel + p) % 2 != 0;
                  float* to = hidden + (gated ? (panel + p) / 2 : panel + p) * kEnginePanel;
                  const float* in = sums + r * kSumsStride + p * kEnginePanel;
                  for (int c = 0; c < kEnginePanel; c += VecF::kWidth) {
                    VecF v = VecF::load(in + c);
                    if (bias != nullptr) {
                      v = v + VecF::load(bias + (panel + p) * kEnginePanel + c);
                    }
                    (last ? VecF::load(to + c) * v : activate(kind, v)).store(to + c);
                  }
                }
              }
            });
  }

  // x += product, or its norm.
  void add_product(const EngineMatrix& w, const Source& from, const EngineNorm& post) {
    if (!is_present(post)) {
      return product(w, from, a_.tokens, a_.rounded, 1, store_to(w, a_.x, a_.x_stride, true));
    }
    product(w, from, a_.tokens, a_.rounded, 1, store_to(w, a_.update, a_.x_stride, false));
    phases_.run(a_.tokens, a_.tokens * m_.width * 16, 1, [&](int64_t first, int64_t past) {
      for (int64_t i = first; i < past; ++i) {
        float *x = a_.x + i * a_.x_stride, *y = a_.update + i * a_.x_stride;
        normalise(post, a_.weights, y, y, m_.width);
        for (int64_t c = 0; c < m_.width; c += VecF::kWidth) {
          const int lanes = lanes_left(c, m_.width);
          (VecF::load(x + c, lanes) + VecF::load(y + c, lanes)).store(x + c, lanes);
        }
      }
    });
  }
};

}  // namespace

void engine_run(const EngineArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) Steps(a).run();
}

}  // namespace lmfast::LMFAST_ISA
