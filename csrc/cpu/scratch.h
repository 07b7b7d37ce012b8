// Work units handed out one by one to the threads that are there, each with scratch memory.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "../common/tensor.h"

namespace lmfast {

using ScratchMemory = std::unique_ptr<void, decltype(&std::free)>;

// 64-byte aligned; untouched pages cost nothing.
inline ScratchMemory allocate_scratch(int64_t bytes) {
  const int64_t size = std::max<int64_t>(64, (bytes + 63) / 64 * 64);
  ScratchMemory memory(std::aligned_alloc(64, static_cast<size_t>(size)), &std::free);
  LMFAST_CHECK(memory != nullptr, "out of memory: ", size, " bytes of scratch");
  return memory;
}

// Calls run(scratch, unit) for every unit. A thread takes the next unit when it is done with one,
// so a thread that loses its core delays the others by one unit, not by half of the work; units
// write apart from each other, so who does which does not change the result. `grain`: the number of
// units worth a thread.
template <class Run>
void for_each_unit(int64_t units, int64_t scratch_bytes, const Run& run, int64_t grain = 1) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, units, grain, [&](int64_t, int64_t) {
    const ScratchMemory scratch = allocate_scratch(scratch_bytes);
    for (int64_t i = next.fetch_add(1); i < units; i = next.fetch_add(1)) run(scratch.get(), i);
  });
}

}  // namespace lmfast
