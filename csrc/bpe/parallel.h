// Threads for one call. None outlives it, so that a process may fork at any time.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace lmfast::bpe {

// Calls work(i) for i in [0, n) on up to `threads` threads; the first exception is thrown again.
template <class Work>
void parallel_for(size_t n, int threads, Work work) {
  const size_t helpers = std::min<size_t>(n, static_cast<size_t>(std::max(threads, 1)));
  std::atomic<size_t> next{0};
  std::exception_ptr error;
  std::mutex guard;
  const auto run = [&] {
    try {
      for (size_t i; (i = next.fetch_add(1)) < n;) work(i);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(guard);
      if (!error) error = std::current_exception();
      next.store(n);
    }
  };
  std::vector<std::thread> team;
  for (size_t i = 1; i < helpers; ++i) {
    try {
      team.emplace_back(run);
    } catch (const std::system_error&) {
      break;  // no more threads to be had: those there are do the work
    }
  }
  run();
  for (std::thread& thread : team) thread.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace lmfast::bpe
