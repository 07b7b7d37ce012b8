// lmfast::engine_step on the CPU: checks, the division of attention, memory, one fork,
// registration.
//
// What a user can get wrong is found in lmfast/generation/engine; the checks here guard memory, and
// take 1 to 2 us a step.
#include "kernels/engine.h"

#include <cstring>
#include <vector>

#include "attention_binding.h"
#include "attention_division.h"
#include "engine_model.h"
#include "scratch.h"

namespace lmfast {
namespace {

using torch::headeronly::ScalarType;

CacheStorage storage_of(const Tensor& t, const Tensor* scales, const EngineModel& m) {
  LMFAST_CHECK(t.is_cpu() && t.dim() == 4 && t.size(1) == m.kv_heads && t.size(3) == m.head_dim &&
                   (t.stride(3) == 1 || t.size(3) == 1),
               "a layer's storage must be (rows, ", m.kv_heads, ", columns, ", m.head_dim, ")");
  CacheStorage s{t.mutable_data_ptr(), {t.stride(0), t.stride(1), t.stride(2)}, nullptr, {0, 0, 0}};
  if (scales == nullptr) return s;
  bool fits = scales->is_cpu() && scales->scalar_type() == ScalarType::Float && scales->dim() == 3;
  for (int d = 0; fits && d < 3; ++d) {
    fits = scales->size(d) == t.size(d);
    s.scale_stride[d] = scales->stride(d);
  }
  LMFAST_CHECK(fits && (scales->stride(2) == 1 || scales->size(2) == 1),
               "scales of a layer must be float32 (rows, heads, columns)");
  s.scales = static_cast<float*>(scales->mutable_data_ptr());
  return s;
}

class EngineStep {
 public:
  EngineStep(const Tensor& weights, const Tensor& program, int64_t steps, int64_t rounded)
      : model_(weights, program), steps_(steps) {
    LMFAST_CHECK(model_.layers() != nullptr, "the program is of a recurrent model");
    a_.model = &model_.model();
    a_.layers = model_.layers();
    a_.weights = model_.weights();
    set_instructions(a_);
    set_rounding(a_, rounded);
  }

  void set_tokens(const Tensor& ids, const Tensor& positions, const Tensor& wanted, Tensor& out) {
    const EngineModel& m = *a_.model;
    a_.tokens = ids.numel();
    a_.ids = const_cast<int64_t*>(integers(ids, "ids", a_.tokens));
    a_.positions = integers(positions, "positions", steps_ * a_.tokens);
    a_.steps = steps_;
    a_.outputs = wanted.numel();
    a_.wanted = integers(wanted, "wanted", a_.outputs);
    check_below(a_.ids, a_.tokens, m.vocab, "ids");
    check_below(a_.wanted, a_.outputs, a_.tokens, "wanted");
    if (m.positions != kEngineNone) {
      check_below(a_.positions, steps_ * a_.tokens, m.position_count, "positions");
    }
    LMFAST_CHECK(out.is_cpu() && out.scalar_type() == ScalarType::Float && out.is_contiguous() &&
                     out.numel() == a_.outputs * m.vocab,
                 "logits must be a contiguous float32 CPU tensor (", a_.outputs, ", ", m.vocab,
                 ")");
    a_.logits = static_cast<float*>(out.mutable_data_ptr());
  }

  void set_rope(const std::vector<Tensor>& rope) {
    const EngineModel& m = *a_.model;
    LMFAST_CHECK(static_cast<int64_t>(rope.size()) == 2 * m.ropes, "cos and sin of ", m.ropes,
                 " rotations are needed");
    for (int64_t i = 0; i < m.ropes; ++i) {
      const Tensor &cos = rope[2 * i], &sin = rope[2 * i + 1];
      for (const Tensor* t : {&cos, &sin}) {
        LMFAST_CHECK(t->is_cpu() && t->dim() == 2 && t->scalar_type() == ScalarType::Float &&
                         t->is_contiguous() && 2 * t->size(1) <= m.head_dim,
                     "cos and sin must be contiguous float32 matrices (length, rotary / 2)");
      }
      check_same_shape(cos, sin, "cos", "sin");
      check_below(a_.positions, steps_ * a_.tokens, cos.size(0), "positions");
      tables_.push_back({static_cast<const float*>(cos.const_data_ptr()),
                         static_cast<const float*>(sin.const_data_ptr()), 2 * cos.size(1)});
    }
    a_.tables = tables_.data();
  }

  void set_storage(const std::vector<Tensor>& keys, const std::vector<Tensor>& values,
                   const std::vector<Tensor>& scales) {
    const EngineModel& m = *a_.model;
    const size_t layers = static_cast<size_t>(m.layers);
    LMFAST_CHECK(keys.size() == layers && values.size() == layers &&
                     (scales.empty() || scales.size() == 2 * layers),
                 "keys and values of ", m.layers, " layers are needed");
    for (size_t i = 0; i < layers; ++i) {
      const Stored type = stored_type(keys[i]);
      check_same_shape(keys[i], values[i], "keys", "values");
      LMFAST_CHECK(values[i].scalar_type() == keys[i].scalar_type() &&
                       (type == Stored::kI8) == !scales.empty(),
                   "keys and values must have one type, and int8 scales");
      LMFAST_CHECK(type == stored_type(keys[0]), "all layers must be stored in one type");
      const bool scaled = !scales.empty();
      storage_.push_back({type, storage_of(keys[i], scaled ? &scales[2 * i] : nullptr, m),
                          storage_of(values[i], scaled ? &scales[2 * i + 1] : nullptr, m)});
    }
    a_.storage = storage_.data();
  }

  // rows (groups, B, 4): first token, number of tokens, its column, columns in use afterwards; of
  // the first step, the next ones have one token more each. slots (steps, tokens) of each group.
  void set_groups(const Tensor& rows, const std::vector<Tensor>& slots,
                  const std::vector<Tensor>& tables, const std::vector<Tensor>& keys) {
    const EngineModel& m = *a_.model;
    LMFAST_CHECK(rows.dim() == 3 && rows.size(0) == m.groups && rows.size(2) == 4 &&
                     static_cast<int64_t>(slots.size()) == m.groups &&
                     tables.size() == slots.size(),
                 "rows, slots and tables of ", m.groups, " groups of layers are needed");
    a_.batch = rows.size(1);
    const int64_t* r = integers(rows, "rows", m.groups * a_.batch * 4);
    rows_.resize(static_cast<size_t>(steps_ * m.groups * a_.batch));
    groups_.resize(static_cast<size_t>(steps_ * m.groups));
    for (int64_t g = 0; g < m.groups; ++g) {
      const Tensor* layer = nullptr;
      for (int64_t i = 0; i < m.layers; ++i) {
        if (a_.layers[i].group != g) continue;
        if (layer != nullptr) check_same_shape(*layer, keys[i], "keys of a group's layers", "keys");
        layer = &keys[i];
      }
      LMFAST_CHECK(layer != nullptr, "group ", g, " has no layers");
      EngineGroup base{};
      base.columns = layer->size(2);
      base.slots = integers(slots[g], "slots", steps_ * a_.tokens);
      check_below(base.slots, steps_ * a_.tokens, layer->size(0) * base.columns, "slots");
      set_table(base, tables[g], layer->size(0));
      for (int64_t step = 0; step < steps_; ++step) {
        const int64_t at = step * m.groups + g;
        EngineGroup& group = groups_[at] = base;
        EngineRow* own = rows_.data() + at * a_.batch;
        group.rows = own;
        group.slots = base.slots + step * a_.tokens;
        for (int64_t b = 0; b < a_.batch; ++b) {
          set_row(group, own[b], b, step, r + (g * a_.batch + b) * 4, layer->size(0));
        }
      }
    }
    a_.groups = groups_.data();
  }

  // The tokens that are chosen go to `chosen` (steps, B).
  void set_choice(const Tensor& stops, Tensor& chosen) {
    a_.stop_count = stops.numel();
    a_.stops = integers(stops, "stops", a_.stop_count);
    integers(chosen, "chosen", steps_ * a_.tokens);
    LMFAST_CHECK(a_.tokens == a_.batch && a_.outputs == a_.tokens,
                 "tokens are chosen one to a row");
    a_.chosen = static_cast<int64_t*>(chosen.mutable_data_ptr());
  }

  void run() {
    if (a_.tokens == 0 || a_.batch == 0) return;
    const EngineModel& m = *a_.model;
    const EngineSizes& s = model_.sizes();
    a_.x_stride = s.x;
    a_.qkv_stride = s.qkv;
    a_.joined_stride = s.joined;
    a_.hidden_stride = s.hidden;
    StepMemory memory;
    const int64_t n = a_.tokens;
    const int64_t x = memory.add(n * s.x * 4), qkv = memory.add(n * s.qkv * 4);
    const int64_t joined = memory.add(n * s.joined * 4), hidden = memory.add(n * s.hidden * 4);
    const int64_t update = memory.add(s.posts ? n * s.x * 4 : 0);
    const int64_t partial = memory.add(partial_floats_ * 4);
    a_.attention_scratch = round_up(attention_scratch_, 64);
    const StepParts parts(memory, a_, s);
    const ScratchMemory allocated = allocate_scratch(memory.size());
    char* base = static_cast<char*>(allocated.get());
    a_.x = reinterpret_cast<float*>(base + x);
    a_.qkv = reinterpret_cast<float*>(base + qkv);
    a_.joined = reinterpret_cast<float*>(base + joined);
    a_.hidden = reinterpret_cast<float*>(base + hidden);
    a_.update = reinterpret_cast<float*>(base + update);
    a_.partial = reinterpret_cast<float*>(base + partial);
    parts.place(base, a_);
    clear_behind(a_.x, n, s.x, m.width);
    clear_behind(a_.joined, n, s.joined, m.heads * m.head_dim);
    clear_behind(a_.hidden, n, s.hidden, m.hidden);
    run_step(a_, engine_run_kernel(), parts.threads());
  }

 private:
  void set_table(EngineGroup& group, const Tensor& table, int64_t storage_rows) {
    if (table.numel() == 0) return;
    LMFAST_CHECK(table.is_cpu() && table.scalar_type() == ScalarType::Int && table.dim() == 2 &&
                     table.is_contiguous() && table.size(0) == a_.batch &&
                     table.size(1) * kAttentionTableBlock >= group.columns,
                 "table must be a contiguous int32 CPU tensor (B, blocks)");
    group.table = static_cast<const int32_t*>(table.const_data_ptr());
    group.table_row = table.size(1);
    for (int64_t i = 0; i < a_.batch * group.table_row; ++i) {
      LMFAST_CHECK(group.table[i] >= 0 && group.table[i] < storage_rows,
                   "table must hold rows of storage, got ", group.table[i]);
    }
  }

  void set_row(EngineGroup& group, EngineRow& row, int64_t b, int64_t step, const int64_t* r,
               int64_t storage_rows) {
    const EngineModel& m = *a_.model;
    row = {r[0], r[1], r[2] + step, r[3] + step, b, 1, 1, 0, true, group.units, 0, group.combines};
    LMFAST_CHECK(row.first >= 0 && row.length >= 0 && row.first + row.length <= a_.tokens &&
                     row.offset >= 0 && row.keys == row.offset + row.length &&
                     row.keys <= group.columns && (group.table != nullptr || b < storage_rows),
                 "row ", b, " does not fit its tokens or its storage");
    if (row.length == 0) return;
    AttentionArgs t{};
    t.dtype = DType::kF32;
    t.stored.type = storage_[0].type;
    t.batch = 1;
    t.heads = m.heads;
    t.kv_heads = m.kv_heads;
    t.length = row.length;
    t.keys = row.keys;
    t.head_dim = m.head_dim;
    row.decoding = is_decoding(t);
    t.ranges = row.decoding ? 1 : query_ranges(t);
    set_splits(t, row.keys);
    row.ranges = t.ranges;
    row.splits = t.splits;
    row.keys_per_split = t.keys_per_split;
    group.units += m.kv_heads * t.ranges * t.splits;
    const int64_t records = attention_rows(t) * attention_record_size(t);
    if (t.splits > 1) {
      row.partial = group.partial;
      group.partial += m.kv_heads * t.splits * records;
      partial_floats_ = std::max(partial_floats_, group.partial);
      group.combines += m.heads * row.length;
    }
    const int64_t bytes = row.decoding ? records * 4 : attention_fwd_scratch_bytes(t);
    attention_scratch_ = std::max(attention_scratch_, bytes);
  }

  EngineMemory model_;
  int64_t steps_;
  EngineArgs a_{};
  std::vector<EngineTables> tables_;
  std::vector<EngineStorage> storage_;
  std::vector<EngineRow> rows_;
  std::vector<EngineGroup> groups_;
  int64_t partial_floats_ = 0, attention_scratch_ = 0;
};

void engine_step(const Tensor& weights, const Tensor& program, const Tensor& ids,
                 const Tensor& positions, const Tensor& wanted, const Tensor& rows,
                 std::vector<Tensor> slots, std::vector<Tensor> tables, std::vector<Tensor> keys,
                 std::vector<Tensor> values, std::vector<Tensor> scales, std::vector<Tensor> rope,
                 int64_t rounded, Tensor logits) {
  EngineStep step(weights, program, 1, rounded);
  step.set_tokens(ids, positions, wanted, logits);
  step.set_rope(rope);
  step.set_storage(keys, values, scales);
  step.set_groups(rows, slots, tables, keys);
  step.run();
}

// A step of one token per row, and another with the likeliest after it, up to `steps` of them.
void engine_greedy(const Tensor& weights, const Tensor& program, const Tensor& ids,
                   const Tensor& positions, const Tensor& wanted, const Tensor& rows,
                   std::vector<Tensor> slots, std::vector<Tensor> tables, std::vector<Tensor> keys,
                   std::vector<Tensor> values, std::vector<Tensor> scales, std::vector<Tensor> rope,
                   int64_t rounded, Tensor logits, const Tensor& stops, Tensor chosen) {
  LMFAST_CHECK(chosen.dim() == 2 && chosen.size(1) == ids.numel(), "chosen must be (steps, B)");
  EngineStep step(weights, program, chosen.size(0), rounded);
  step.set_tokens(ids, positions, wanted, logits);
  step.set_rope(rope);
  step.set_storage(keys, values, scales);
  step.set_groups(rows, slots, tables, keys);
  step.set_choice(stops, chosen);
  step.run();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmfast, CPU, m) {
  m.impl("engine_step", TORCH_BOX(&engine_step));
  m.impl("engine_greedy", TORCH_BOX(&engine_greedy));
}

}  // namespace lmfast
