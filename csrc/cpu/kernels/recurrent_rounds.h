// Time steps that several threads work on together: the barrier of the recurrent kernels.
//
// Threads come from parallel_for, which may bring fewer than asked for, late, or one after the
// other. So nobody is waited for by name: a round's panels are divided into chunks, each chunk is
// claimed by an atomic exchange, and a round is over when all its chunks are done, whoever ran
// them. A chunk has an owner, the thread in whose L2 its weights stay; others take it over when the
// owner never came, or when it has not begun after a bounded wait (its core was taken away). A
// chunk computes the same numbers wherever it runs.
#pragma once

#include <sched.h>

#include "recurrent.h"

namespace lmfast::LMFAST_ISA {
namespace {

inline bool claim(RecurrentProgress& p, int64_t chunk, int64_t round) {
  int64_t expected = round;
  return __atomic_load_n(&p.next[chunk].value, __ATOMIC_RELAXED) == round &&
         __atomic_compare_exchange_n(&p.next[chunk].value, &expected, round + 1, false,
                                     __ATOMIC_ACQUIRE, __ATOMIC_RELAXED);
}

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Calls run(round, chunk) for all chunks of round 0, then of round 1, ...
template <class Run>
void run_rounds(RecurrentProgress& p, int64_t rounds, const Run& run) {
  constexpr int kPatience = 1024;  // pauses: 20 to 50 us
  const int64_t me = __atomic_fetch_add(&p.arrived.value, 1, __ATOMIC_RELAXED);
  const int64_t first = me * p.chunks / p.participants;
  const int64_t last = (me + 1) * p.chunks / p.participants;
  for (int64_t round = 0; round < rounds; ++round) {
    int64_t ran = 0;
    for (int64_t c = first; c < last && c < p.chunks; ++c) {
      if (!claim(p, c, round)) continue;
      run(round, c);
      ++ran;
    }
    if (ran != 0) __atomic_fetch_add(&p.done.value, ran, __ATOMIC_RELEASE);
    const int64_t target = (round + 1) * p.chunks;
    for (int waits = 0; __atomic_load_n(&p.done.value, __ATOMIC_ACQUIRE) < target; ++waits) {
      const int64_t arrived = __atomic_load_n(&p.arrived.value, __ATOMIC_RELAXED);
      const bool late = waits >= kPatience;
      if (late || arrived < p.participants) {
        const int64_t absent = late ? 0 : arrived * p.chunks / p.participants;
        for (int64_t c = absent; c < p.chunks; ++c) {
          if (!claim(p, c, round)) continue;
          run(round, c);
          __atomic_fetch_add(&p.done.value, 1, __ATOMIC_RELEASE);
        }
      }
      late ? static_cast<void>(sched_yield()) : pause();
    }
  }
}

}  // namespace
}  // namespace lmfast::LMFAST_ISA
