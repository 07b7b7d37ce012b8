// lmfast::engine_cells on the CPU: checks, the order of tokens, memory, one fork, registration.
#include <cstring>
#include <vector>

#include "engine_model.h"
#include "scratch.h"

namespace lmfast {
namespace {

using torch::headeronly::ScalarType;

class CellStep {
 public:
  CellStep(const Tensor& weights, const Tensor& program, int64_t rounded)
      : model_(weights, program) {
    LMFAST_CHECK(model_.cells() != nullptr, "the program is of a decoder");
    a_.model = &model_.model();
    a_.cells = model_.cells();
    a_.weights = model_.weights();
    set_instructions(a_);
    set_rounding(a_, rounded);
  }

  // Rows of ids (B, T), of which row b has lengths[b]: in the order of steps.
  void set_tokens(const int64_t* ids, int64_t batch, int64_t steps, const int64_t* lengths) {
    const EngineModel& m = *a_.model;
    a_.batch = batch;
    for (int64_t b = 0; b < batch; ++b) {
      LMFAST_CHECK(lengths[b] >= 0 && lengths[b] <= steps, "lengths must lie in 0..", steps);
      a_.length = std::max(a_.length, lengths[b]);
    }
    lengths_.assign(lengths, lengths + batch);
    for (int64_t t = 0; t < a_.length; ++t) {
      firsts_.push_back(static_cast<int64_t>(ids_.size()));
      for (int64_t b = 0; b < batch; ++b) {
        if (t >= lengths[b]) continue;
        ids_.push_back(ids[b * steps + t]);
        rows_.push_back(b);
      }
    }
    a_.tokens = static_cast<int64_t>(ids_.size());
    firsts_.push_back(a_.tokens);
    check_below(ids_.data(), a_.tokens, m.vocab, "ids");
    a_.ids = ids_.data();
    a_.firsts = firsts_.data();
    a_.token_rows = rows_.data();
    a_.lengths = lengths_.data();
    a_.steps = 1;
  }

  // Logits after every token, row by row, or after each row's last one: (N or B, V).
  void set_logits(bool all, Tensor& out) {
    const EngineModel& m = *a_.model;
    if (all) {
      std::vector<int64_t> begin(static_cast<size_t>(a_.batch), 0);
      for (int64_t b = 1; b < a_.batch; ++b) begin[b] = begin[b - 1] + lengths_[b - 1];
      wanted_.resize(static_cast<size_t>(a_.tokens));
      for (int64_t i = 0; i < a_.tokens; ++i) wanted_[begin[rows_[i]]++] = i;
    } else {
      wanted_.assign(static_cast<size_t>(a_.batch), 0);
      for (int64_t i = 0; i < a_.tokens; ++i) wanted_[rows_[i]] = i;
    }
    a_.outputs = static_cast<int64_t>(wanted_.size());
    a_.wanted = wanted_.data();
    LMFAST_CHECK(out.is_cpu() && out.scalar_type() == ScalarType::Float && out.is_contiguous() &&
                     out.numel() == a_.outputs * m.vocab,
                 "logits must be a contiguous float32 CPU tensor (", a_.outputs, ", ", m.vocab,
                 ")");
    a_.logits = static_cast<float*>(out.mutable_data_ptr());
  }

  void set_state(Tensor& state) {
    const EngineModel& m = *a_.model;
    const bool lstm = a_.cells[0].kind == static_cast<int64_t>(EngineCellKind::kLstm);
    LMFAST_CHECK(state.is_cpu() && state.scalar_type() == ScalarType::Float &&
                     state.is_contiguous() && state.dim() == 3 &&
                     state.size(0) == m.layers * (lstm ? 2 : 1) && state.size(1) == a_.batch &&
                     state.size(2) == m.width,
                 "state must be a contiguous float32 CPU tensor of ", a_.batch, " rows");
    for (int64_t i = 1; i < m.layers; ++i) {
      LMFAST_CHECK(a_.cells[i].kind == a_.cells[0].kind, "all layers must have one kind of cell");
    }
    a_.state = static_cast<float*>(state.mutable_data_ptr());
  }

  // The tokens that are chosen go to `chosen` (steps, B).
  void set_choice(const Tensor& stops, Tensor& chosen) {
    a_.steps = chosen.size(0);
    a_.stop_count = stops.numel();
    a_.stops = integers(stops, "stops", a_.stop_count);
    integers(chosen, "chosen", a_.steps * a_.tokens);
    a_.chosen = static_cast<int64_t*>(chosen.mutable_data_ptr());
  }

  void run() {
    if (a_.tokens == 0) return;
    const EngineModel& m = *a_.model;
    const EngineSizes& s = model_.sizes();
    a_.x_stride = s.x;
    a_.qkv_stride = s.qkv;
    a_.hidden_stride = s.hidden;
    a_.joined_stride = s.joined;
    const int64_t n = a_.tokens, b = a_.batch, states = 2 * m.layers * b;
    StepMemory memory;
    const int64_t x = memory.add(n * s.x * 4), qkv = memory.add(n * s.qkv * 4);
    const int64_t hidden = memory.add(b * s.hidden * 4), joined = memory.add(b * s.joined * 4);
    const int64_t update = memory.add(b * s.x * 4), before = memory.add(states * s.x * 4);
    const StepParts parts(memory, a_, s);
    const ScratchMemory allocated = allocate_scratch(memory.size());
    char* base = static_cast<char*>(allocated.get());
    a_.x = reinterpret_cast<float*>(base + x);
    a_.qkv = reinterpret_cast<float*>(base + qkv);
    a_.hidden = reinterpret_cast<float*>(base + hidden);
    a_.joined = reinterpret_cast<float*>(base + joined);
    a_.update = reinterpret_cast<float*>(base + update);
    a_.states = reinterpret_cast<float*>(base + before);
    parts.place(base, a_);
    clear_behind(a_.x, n, s.x, m.width);
    clear_behind(a_.update, b, s.x, m.width);
    clear_behind(a_.states, states, s.x, m.width);
    run_step(a_, engine_run_cells_kernel(), parts.threads());
  }

 private:
  EngineMemory model_;
  EngineArgs a_{};
  std::vector<int64_t> ids_, rows_, firsts_, lengths_, wanted_;
};

void engine_cells(const Tensor& weights, const Tensor& program, const Tensor& ids,
                  const Tensor& lengths, bool all, int64_t rounded, Tensor state, Tensor logits) {
  LMFAST_CHECK(ids.dim() == 2, "ids must be (B, T)");
  CellStep step(weights, program, rounded);
  const int64_t batch = ids.size(0), steps = ids.size(1);
  step.set_tokens(integers(ids, "ids", batch * steps), batch, steps,
                  integers(lengths, "lengths", batch));
  step.set_state(state);
  step.set_logits(all, logits);
  step.run();
}

// A step of one token per row, and another with the likeliest after it, up to `steps` of them.
void engine_cells_greedy(const Tensor& weights, const Tensor& program, const Tensor& ids,
                         int64_t rounded, Tensor state, Tensor logits, const Tensor& stops,
                         Tensor chosen) {
  const int64_t batch = ids.numel();
  LMFAST_CHECK(chosen.dim() == 2 && chosen.size(1) == batch, "chosen must be (steps, B)");
  CellStep step(weights, program, rounded);
  const std::vector<int64_t> ones(static_cast<size_t>(batch), 1);
  step.set_tokens(integers(ids, "ids", batch), batch, 1, ones.data());
  step.set_state(state);
  step.set_logits(false, logits);
  step.set_choice(stops, chosen);
  step.run();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmfast, CPU, m) {
  m.impl("engine_cells", TORCH_BOX(&engine_cells));
  m.impl("engine_cells_greedy", TORCH_BOX(&engine_cells_greedy));
}

}  // namespace lmfast
