// Which pair is merged next: a queue over counts that only fall.
//
// Counts below kBuckets select a list, which costs two stores to join: most pairs wait in lists
// that are never reached. The lists are opened from the top. An opened one is sorted, so that what
// follows can be fetched ahead of its turn: pairs of one count come in an order that has nothing to
// do with where they lie. Pairs that are counted exactly as high as the open list while it is
// worked off, and all counts from kBuckets on, wait in a heap.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace lmfast::bpe {

struct Candidate {
  uint64_t count, key;  // among equal counts the smallest key is first
  uint32_t pair;
};

// Order: key(pair) and before(a, b), the latter deciding between pairs of equal count and key;
// fetch(pair) and then fetch_positions(pair) bring what is known of a pair to the cache.
template <class Order>
class MergeQueue {
 public:
  static constexpr uint64_t kBuckets = 1u << 14;

  static constexpr size_t kRadix = 128;  // fewer are sorted by comparisons

  explicit MergeQueue(const Order& order) : order_(order), first_(kBuckets, kNone) {}

  void push(uint32_t pair, uint64_t count) {
    if (pair >= next_.size()) next_.resize(std::max<size_t>(pair + 1, 2 * next_.size()), kNone);
    if (count < level_) {
      next_[pair] = first_[count];
      first_[count] = pair;
      return;
    }
    heap_.push_back({count, order_.key(pair), pair});
    std::push_heap(heap_.begin(), heap_.end(), worse());
  }

  // Takes the pair with the highest count, as it was when it was pushed; false when none is left.
  bool pop(Candidate* best) {
    while (heap_.empty() && taken_ == run_.size()) {
      if (level_ == 0) return false;
      open(--level_);
    }
    if (taken_ == run_.size() || (!heap_.empty() && precedes(heap_.front(), run_[taken_]))) {
      std::pop_heap(heap_.begin(), heap_.end(), worse());
      *best = heap_.back();
      heap_.pop_back();
    } else {
      *best = run_[taken_++];
    }
    return true;
  }

  // The pair that will probably be taken `ahead` turns from now, or kNone.
  static constexpr uint32_t kNone = 0xFFFFFFFFu;
  uint32_t coming(size_t ahead) const {
    return taken_ + ahead < run_.size() ? run_[taken_ + ahead].pair : kNone;
  }

 private:
  bool precedes(const Candidate& a, const Candidate& b) const {
    if (a.count != b.count) return a.count > b.count;
    return a.key != b.key ? a.key < b.key : order_.before(a.pair, b.pair);
  }
  auto worse() const {  // the order of a std heap with the best on top
    return [this](const Candidate& a, const Candidate& b) { return precedes(b, a); };
  }

  void open(uint64_t count) {
    run_.clear();
    taken_ = 0;
    for (uint32_t pair = first_[count]; pair != kNone; pair = next_[pair]) {
      order_.fetch(pair);
      run_.push_back({count, 0, pair});
    }
    for (Candidate& c : run_) c.key = order_.key(c.pair);
    sort_run();
    // High counts have lists of one pair: what comes next is in the next lists.
    if (count > 2 && first_[count - 2] != kNone) order_.fetch(first_[count - 2]);
    if (count > 1 && first_[count - 1] != kNone) order_.fetch_positions(first_[count - 1]);
  }

  void sort_run() {
    const auto by_order = [this](const Candidate& a, const Candidate& b) { return precedes(a, b); };
    if (run_.size() < kRadix) {
      std::sort(run_.begin(), run_.end(), by_order);
      return;
    }
    // By key, eight bits at a time, leaving out those that all keys share; then each run of equal
    // keys. A third of the time of std::sort, half of whose comparisons are mispredicted.
    uint64_t any = 0, all = ~0ull;
    for (const Candidate& c : run_) {
      any |= c.key;
      all &= c.key;
    }
    spare_.resize(run_.size());
    for (int shift = 0; shift < 64; shift += 8) {
      if (((any ^ all) >> shift & 255) == 0) continue;
      size_t ends[256] = {};
      for (const Candidate& c : run_) ++ends[c.key >> shift & 255];
      size_t total = 0;
      for (size_t& end : ends) end = std::exchange(total, total + end);
      for (const Candidate& c : run_) spare_[ends[c.key >> shift & 255]++] = c;
      run_.swap(spare_);
    }
    for (auto begin = run_.begin(); begin != run_.end();) {
      auto end = begin + 1;
      while (end != run_.end() && end->key == begin->key) ++end;
      if (end - begin > 1) std::sort(begin, end, by_order);
      begin = end;
    }
  }

  const Order& order_;
  std::vector<uint32_t> first_, next_;  // lists of pairs by count
  uint64_t level_ = kBuckets;           // lists from here on have been opened
  std::vector<Candidate> run_, spare_;  // the open list, sorted
  size_t taken_ = 0;
  std::vector<Candidate> heap_;
};

}  // namespace lmfast::bpe
