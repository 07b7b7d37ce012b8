// The time steps of a recurrent call as its kernels see them, and their division over threads.
#pragma once

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "kernels/recurrent.h"
#include "recurrent_tensors.h"

namespace lmfast {

// Bytes of weights that every core may hold: beside them the rows of a step must stay in L2.
inline constexpr int64_t kMaxBatchSplitWeights = 1 << 19;
inline constexpr int64_t kMinSplitWork = 1 << 16;  // multiply-adds of a step worth a barrier
inline constexpr int64_t kUnitRows = 32;

// Sizes and offsets of the steps, and the shape that points to them.
struct Steps {
  std::vector<int64_t> sizes, offsets;
  RecurrentShape shape;

  Steps(int64_t cell, bool reverse, int64_t rows, int64_t batch, int64_t hidden,
        const std::optional<Tensor>& batch_sizes) {
    LMFAST_CHECK(cell >= 0 && cell <= static_cast<int64_t>(Cell::kGruTextbook), "unknown cell ",
                 cell);
    LMFAST_CHECK(batch >= 0 && hidden >= 1, "batch or hidden size out of range");
    if (batch_sizes.has_value()) {
      const Tensor& b = *batch_sizes;
      LMFAST_CHECK(b.is_cpu() && b.dim() == 1 && b.is_contiguous() &&
                       b.scalar_type() == torch::headeronly::ScalarType::Long,
                   "batch_sizes must be a contiguous int64 CPU vector");
      const int64_t* data = static_cast<const int64_t*>(b.const_data_ptr());
      sizes.assign(data, data + b.size(0));
    } else if (batch > 0) {
      sizes.assign(static_cast<size_t>(rows / batch), batch);
    }
    int64_t total = 0, before = batch;
    for (int64_t size : sizes) {
      LMFAST_CHECK(size >= 1 && size <= before, "batch_sizes must be positive and never grow");
      offsets.push_back(total);
      total += size;
      before = size;
    }
    LMFAST_CHECK(total == rows && (sizes.empty() || sizes[0] == batch),
                 "the rows of x, the batch and batch_sizes do not agree");
    shape = {static_cast<Cell>(cell),
             reverse,
             static_cast<int64_t>(sizes.size()),
             batch,
             hidden,
             sizes.data(),
             offsets.data()};
  }
};

// Whether two directions go to a thread each. Two threads are then busy without a barrier: Elman
// and GRU of H = 128, one row, run both directions in 1.1 of the time of one, GRU of H = 512 in
// 0.84 of the time of one after the other. More threads are better kept together, unless a step is
// too small to divide. An exception: weights of which only a half fits L2.
// Two directions are twice the work: they take hardly longer than one only where one leaves a
// thread idle. On two cores that is one row of Elman H = 128 (1.11 of one direction's time with
// gradients) and nearly GRU (1.23); LSTM H = 128 (1.44) and all of H = 256 and 512 (1.85 to 2.0)
// use both cores for one direction already, for its products over all steps and its loop.
inline bool one_direction_to_a_thread(const RecurrentShape& s) {
  constexpr int64_t kCache = 3 << 18;  // bytes of weights that stay in L2 beside the rest
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t weights = gates_of(s.cell) * s.hidden * s.hidden;
  if (threads == 1) return false;
  if (weights * s.batch < kMinSplitWork) return true;
  if (s.batch < kUnitRows && 4 * weights > kCache && 4 * weights <= 2 * kCache) return false;
  return threads < 4;
}

// Runs the loop over time: by rows where every core can hold the weights and there are rows for
// all, else all threads together on each step, else alone. Nothing computed depends on the choice.
template <class Args, class Kernel>
void run_steps(Args& a, int64_t units, int64_t bytes_per_weight, Kernel rows_kernel,
               Kernel together_kernel) {
  const RecurrentShape& s = a.shape;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t weights = gates_of(s.cell) * s.hidden * s.hidden;
  const int64_t panels = (s.hidden + units - 1) / units;
  if (threads == 1 || weights * s.batch < kMinSplitWork) {
    rows_kernel(a, 0, s.batch);
    return;
  }
  const bool by_rows = s.batch >= kUnitRows && weights * bytes_per_weight <= kMaxBatchSplitWeights;
  if (by_rows || panels == 1) {
    // The longest sequences come first: who has short ones takes over from the others.
    const int64_t per_unit =
        std::min(kUnitRows, std::max<int64_t>(1, (s.batch + threads - 1) / threads));
    const int64_t count = (s.batch + per_unit - 1) / per_unit;
    for_each_unit(count, 0, [&](void*, int64_t i) {
      rows_kernel(a, i * per_unit, std::min(s.batch, (i + 1) * per_unit));
    });
    return;
  }
  const ScratchMemory memory = allocate_scratch(sizeof(RecurrentProgress));
  std::memset(memory.get(), 0, sizeof(RecurrentProgress));
  a.progress = static_cast<RecurrentProgress*>(memory.get());
  a.progress->participants = std::min({threads, panels, int64_t{RecurrentProgress::kMaxChunks}});
  // Two chunks to a thread, so that half of a lost thread's step can be taken over.
  a.progress->chunks =
      std::min({panels, 2 * a.progress->participants, int64_t{RecurrentProgress::kMaxChunks}});
  torch::stable::parallel_for(0, a.progress->participants, 1,
                              [&](int64_t begin, int64_t end) { together_kernel(a, begin, end); });
}

}  // namespace lmfast
