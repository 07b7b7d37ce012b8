// What is counted of the pairs of the untouched words.
//
// Few symbols, as bytes are: a table, in which the boundary of words is a symbol like the others.
// Where a word ends is not predictable, and a branch on it costs as much as counting three pairs.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

namespace lmfast::bpe {

struct PairStart {
  uint64_t count;
  uint64_t next;  // how many positions there are; then, where the next one goes
};

class PairStarts {
 public:
  explicit PairStarts(uint32_t symbols) : symbols_(symbols) {
    if (symbols > kMostInTable) return;
    const size_t width = symbols + size_t{1};
    table_.assign(width * width, PairStart{});
  }

  // Of two symbols; any larger number is the boundary.
  PairStart& at(uint32_t left, uint32_t right) {
    left = std::min(left, symbols_);
    right = std::min(right, symbols_);
    if (!table_.empty()) return table_[left * (symbols_ + 1) + right];
    if (left == symbols_ || right == symbols_) return boundary_;
    return map_[static_cast<uint64_t>(left) << 32 | right];
  }

  // Calls use(start, left, right) for all there are, in any order; the boundary is the number of
  // symbols.
  template <class Use>
  void for_each(Use use) {
    size_t at = 0;
    for (uint32_t left = 0; left <= symbols_ && !table_.empty(); ++left) {
      for (uint32_t right = 0; right <= symbols_; ++right, ++at) {
        if (table_[at].next > 0) use(table_[at], left, right);
      }
    }
    for (auto& [pair, start] : map_) {
      use(start, static_cast<uint32_t>(pair >> 32), static_cast<uint32_t>(pair));
    }
    if (table_.empty()) use(boundary_, symbols_, symbols_);
  }

 private:
  static constexpr uint32_t kMostInTable = 512;
  uint32_t symbols_;
  std::vector<PairStart> table_;
  std::unordered_map<uint64_t, PairStart> map_;
  PairStart boundary_ = {};
};

}  // namespace lmfast::bpe
