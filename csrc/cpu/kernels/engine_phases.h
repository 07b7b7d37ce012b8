// The phases of a step, each with a barrier behind it: how the engine's threads work together.
//
// Threads come from one parallel_for around the whole step, which may bring fewer than asked for,
// late, or one after the other. So nobody is waited for by name: a phase is cut into chunks, each
// claimed by an atomic exchange, and is over when all its chunks are done, whoever ran them. A
// chunk has an owner, who takes it first, in order, so that a small model's weights stay in the
// same second-level cache; who is done early takes what others have not begun, from the end. What a
// chunk computes does not depend on who runs it, so neither does the result.
//
// A phase costs its two threads 0.3 us beyond its work, a fork of the thread pool 3 to 4 us: a step
// is one fork and five phases a layer.
#pragma once

#include <sched.h>

#include "engine.h"

namespace lmfast::LMFAST_ISA {
namespace {

class Phases {
 public:
  explicit Phases(EngineProgress& progress)
      : p_(progress), me_(__atomic_fetch_add(&progress.arrived.value, 1, __ATOMIC_RELAXED)) {}

  int64_t me() const { return me_; }

  // Runs run(first, past) over `units` in chunks of about `work / kChunkWork` (bytes, or what takes
  // as long), cut at multiples of `align` where there are enough. Returns when all of it is done,
  // and calls idle() while it waits.
  template <class Run, class Idle>
  void run(int64_t units, int64_t work, int64_t align, const Run& run, const Idle& idle) {
    if (units <= 0) return;
    if (p_.participants == 1) return run(0, units);
    const Cut cut = cut_of(units, work, align);
    const int64_t chunks = cut.chunks;
    const auto attempt = [&](int64_t c) {
      int64_t seen = __atomic_load_n(&p_.next[c].value, __ATOMIC_RELAXED);
      if (seen > phase_ || !__atomic_compare_exchange_n(&p_.next[c].value, &seen, phase_ + 1, false,
                                                        __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) {
        return false;
      }
      run(cut.at(c), cut.at(c + 1));
      __atomic_fetch_add(&p_.done.value, 1, __ATOMIC_RELEASE);
      return true;
    };
    for (int64_t c = first_of(mine(), chunks); c < first_of(mine() + 1, chunks); ++c) attempt(c);
    target_ += chunks;
    // A chunk that is as good as begun is not worth taking away from the cache it belongs to.
    for (int waits = 0; !over(); ++waits) {
      idle();
      if (waits < kPatience) {
        pause();
        continue;
      }
      bool took = false;
      for (int64_t c = chunks; c-- > 0 && !took;) took = attempt(c);
      if (took) continue;
      waits < kSpins ? pause() : static_cast<void>(sched_yield());
    }
    ++phase_;
  }
  template <class Run>
  void run(int64_t units, int64_t work, int64_t align, const Run& body) {
    run(units, work, align, body, [] {});
  }

  // The unit that this thread begins such a phase with.
  int64_t first_unit(int64_t units, int64_t work, int64_t align) const {
    if (p_.participants == 1) return 0;
    const Cut cut = cut_of(units, work, align);
    return cut.at(first_of(mine(), cut.chunks));
  }

 private:
  static constexpr int kPatience = 16, kSpins = 256;
  static constexpr int64_t kChunkWork = 1 << 16;

  // Where a phase is cut.
  struct Cut {
    int64_t units, chunks, align;
    int64_t at(int64_t c) const { return c == chunks ? units : c * units / chunks / align * align; }
  };
  Cut cut_of(int64_t units, int64_t work, int64_t align) const {
    // Part of a block of panels is read at part of the speed, so blocks are divided only where
    // there are too few of them: a token of a 160 M Llama on two cores of a Zen 4, fp32 10.0 -> 7.5
    // ms, bf16 4.7 -> 3.6.
    if (units < 2 * align * p_.participants) align = 1;
    return {units, chunk_count(units / align, work), align};
  }
  int64_t mine() const { return me_ < p_.participants ? me_ : p_.participants - 1; }
  int64_t first_of(int64_t thread, int64_t chunks) const {
    return thread * chunks / p_.participants;
  }
  int64_t chunk_count(int64_t units, int64_t work) const {
    // What a thread waits for in the end is at most another one's chunk: with 8 of them to a thread
    // a token of int8 weights took 1.08 times as long, of int4 1.1.
    int64_t most = 32 * p_.participants;
    most = most < EngineProgress::kMaxChunks ? most : EngineProgress::kMaxChunks;
    int64_t n = work / kChunkWork / p_.participants * p_.participants;
    n = n < p_.participants ? p_.participants : n;
    n = n < most ? n : most;
    return n < units ? n : units;
  }
  bool over() const { return __atomic_load_n(&p_.done.value, __ATOMIC_ACQUIRE) >= target_; }
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  EngineProgress& p_;
  int64_t me_, phase_ = 0, target_ = 0;
};

}  // namespace
}  // namespace lmfast::LMFAST_ISA
