// lmfast::attention_backward on the CPU: checks, threads, registration.
#include <memory>
#include <mutex>
#include <tuple>
#include <utility>
#include <vector>

#include "attention_binding.h"
#include "attention_division.h"
#include "kernels/attention.h"
#include "scratch.h"

namespace lmfast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::empty_like;

// Enough units that threads even out; ranges of keys repeat the packing of the queries, and have
// partial sums of dQ each.
int64_t key_ranges(const AttentionArgs& a) {
  constexpr int64_t kUnits = 16, kKeysPerRange = 256;
  const int64_t pairs = std::max<int64_t>(1, a.batch * a.kv_heads);
  return std::max<int64_t>(1, std::min(kUnits / pairs, a.keys / kKeysPerRange));
}

// Memory for parts of dQ. One that was added serves again: freed to the allocator, pieces of a few
// MB with an alignment would not be found again by the next request.
class PartMemory {
 public:
  explicit PartMemory(int64_t bytes) : bytes_(bytes) {}

  ScratchMemory take() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!spare_.empty()) {
        ScratchMemory part = std::move(spare_.back());
        spare_.pop_back();
        return part;
      }
    }
    return allocate_scratch(bytes_);
  }
  void give_back(ScratchMemory part) {
    const std::lock_guard<std::mutex> lock(mutex_);
    spare_.push_back(std::move(part));
  }

 private:
  const int64_t bytes_;
  std::mutex mutex_;
  std::vector<ScratchMemory> spare_;
};

// The parts of dQ of one (batch row, key/value head), added in the order in which their units are
// handed out. A part that is finished before an earlier one waits here; its thread does not.
class PartsInOrder {
 public:
  // Takes part `index` of `count`; the total, once, when all of them are in it.
  ScratchMemory add(int64_t index, int64_t count, ScratchMemory part, const AttentionPartsArgs& a,
                    int64_t numbers, PartMemory& memory) {
    std::unique_lock<std::mutex> lock(mutex_);
    while (static_cast<int64_t>(waiting_.size()) < count) waiting_.push_back(none());
    waiting_[index] = std::move(part);
    if (adding_) return none();  // the thread that adds takes it along
    adding_ = true;
    while (next_ < count && waiting_[next_] != nullptr) {
      ScratchMemory ready = std::move(waiting_[next_++]);
      lock.unlock();
      if (total_ == nullptr) {
        total_ = std::move(ready);
      } else {
        AttentionPartsArgs both = a;
        both.total = static_cast<float*>(total_.get());
        both.part = static_cast<const float*>(ready.get());
        attention_add_part_kernel()(both, 0, numbers);
        memory.give_back(std::move(ready));
      }
      lock.lock();
    }
    adding_ = false;
    return next_ == count ? std::move(total_) : none();
  }

 private:
  static ScratchMemory none() { return {nullptr, &std::free}; }

  std::mutex mutex_;
  std::vector<ScratchMemory> waiting_;
  int64_t next_ = 0;
  bool adding_ = false;
  ScratchMemory total_ = none();  // of the thread that adds
};

std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& sums, bool causal, std::optional<int64_t> offset,
    const std::optional<Tensor>& offsets, const std::optional<Tensor>& lengths,
    const std::optional<Tensor>& mask, int64_t window, double softcap,
    const std::optional<Tensor>& sinks, const std::optional<Tensor>& alibi, double scale) {
  AttentionCall call(
      q, k, v, {causal, offset, offsets, lengths, mask, window, softcap, sinks, alibi, scale});
  AttentionBwdArgs a{};
  AttentionArgs& f = a.fwd;
  f = call.args;
  check_same_shape(q, out, "q", "out");
  check_same_shape(q, dout, "q", "dout");
  LMFAST_CHECK(dtype_of(out, "out") == f.dtype && dtype_of(dout, "dout") == f.dtype,
               "out and dout must have q's dtype");
  LMFAST_CHECK(sums.is_cpu() && sums.scalar_type() == ScalarType::Float && sums.is_contiguous() &&
                   sums.numel() == 2 * f.batch * f.heads * f.length,
               "sums must be a contiguous float32 CPU tensor (2, B, H, T)");
  Tensor dq = empty_like(q), dk = empty_like(k), dv = empty_like(v);
  f.out = attention_tensor(out, "out");
  f.reference = static_cast<float*>(sums.mutable_data_ptr());
  f.sum = f.reference + f.batch * f.heads * f.length;
  a.dout = attention_tensor(dout, "dout");
  a.dq = attention_tensor(dq, "dq");
  a.dk = attention_tensor(dk, "dk");
  a.dv = attention_tensor(dv, "dv");
  if (f.heads == 0) {  // nothing else writes to them
    torch::stable::zero_(dk);
    torch::stable::zero_(dv);
    return {dq, dk, dv};
  }
  f.ranges = key_ranges(f);
  const bool tiles = on_tiles(f);
  a.dq_width = round_up(f.head_dim, tiles ? 32 : 16);
  a.dq_rows = tiles ? round_up(f.length, 32) : f.length;
  const int64_t group = f.heads / f.kv_heads, numbers = group * a.dq_rows * a.dq_width;
  PartMemory memory(numbers * static_cast<int64_t>(sizeof(float)));
  std::vector<PartsInOrder> sums_of_pairs(
      static_cast<size_t>(f.ranges > 1 ? f.batch * f.kv_heads : 0));
  const auto kernel = tiles ? attention_bwd_amx_kernel() : attention_bwd_kernel();
  for_each_unit(f.batch * f.kv_heads * f.ranges, attention_bwd_scratch_bytes(f),
                [&](void* scratch, int64_t unit) {
                  AttentionBwdArgs mine = a;
                  mine.fwd.scratch = scratch;
                  if (f.ranges == 1) return kernel(mine, unit, unit + 1);
                  ScratchMemory part = memory.take();
                  mine.dq_partial = static_cast<float*>(part.get());
                  kernel(mine, unit, unit + 1);
                  const int64_t pair = unit / f.ranges;
                  AttentionPartsArgs parts{a, pair, nullptr, nullptr};
                  ScratchMemory total = sums_of_pairs[pair].add(
                      unit % f.ranges, f.ranges, std::move(part), parts, numbers, memory);
                  if (total == nullptr) return;
                  parts.total = static_cast<float*>(total.get());
                  attention_store_parts_kernel()(parts, 0, group);
                  memory.give_back(std::move(total));
                });
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmfast, CPU, m) {
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace lmfast
