#include "merge.h"

#include <algorithm>
#include <cstring>
#include <functional>

namespace lmfast::bpe {

size_t Merger::merge(uint32_t* ids, size_t n) {
  if (n <= kShort) return merge_short(ids, n);
  return vocabulary_.ordered() ? merge_by_rank(ids, n) : merge_by_heap(ids, n);
}

// Ranks of adjacent pairs in an array; scan for the smallest, merge, close the gap.
size_t Merger::merge_short(uint32_t* ids, size_t n) const {
  uint32_t ranks[kShort];
  for (size_t i = 0; i + 1 < n; ++i) ranks[i] = vocabulary_.rank(ids[i], ids[i + 1]);
  while (n > 1) {
    size_t best = 0;
    uint32_t lowest = ranks[0];
    for (size_t i = 1; i + 1 < n; ++i) {
      if (ranks[i] < lowest) {
        lowest = ranks[i];
        best = i;
      }
    }
    if (lowest == kNoRank) break;
    ids[best] = vocabulary_.id_of_rank(lowest);
    --n;
    std::memmove(ids + best + 1, ids + best + 2, (n - best - 1) * sizeof(uint32_t));
    if (best + 1 < n) {
      std::memmove(ranks + best + 1, ranks + best + 2, (n - best - 2) * sizeof(uint32_t));
      ranks[best] = vocabulary_.rank(ids[best], ids[best + 1]);
    }
    if (best > 0) ranks[best - 1] = vocabulary_.rank(ids[best - 1], ids[best]);
  }
  return n;
}

void Merger::link(const uint32_t* ids, size_t n) {
  next_.resize(n);
  previous_.resize(n);
  rank_.resize(n);
  for (size_t i = 0; i < n; ++i) {
    next_[i] = i + 1 < n ? static_cast<uint32_t>(i + 1) : kEnd;
    previous_[i] = i > 0 ? static_cast<uint32_t>(i - 1) : kEnd;
  }
  for (size_t i = 0; i < n; ++i) rank_[i] = rank_at(ids, static_cast<uint32_t>(i));
}

size_t Merger::unlink(uint32_t* ids) const {
  size_t count = 0;
  for (uint32_t at = 0; at != kEnd; at = next_[at]) ids[count++] = ids[at];
  return count;
}

// Merges the symbol at `at` with its right neighbour.
void Merger::join(uint32_t* ids, uint32_t at) {
  const uint32_t gone = next_[at];
  ids[at] = vocabulary_.id_of_rank(rank_[at]);
  rank_[gone] = kNoRank;
  next_[at] = next_[gone];
  if (next_[at] != kEnd) previous_[next_[at]] = at;
  rank_[at] = rank_at(ids, at);
  if (previous_[at] != kEnd) rank_[previous_[at]] = rank_at(ids, previous_[at]);
}

// Appends a position to the list of its rank.
void Merger::note(uint32_t rank, uint32_t at) {
  const uint32_t node = static_cast<uint32_t>(nodes_.size());
  if (list_[rank] == kEnd) {
    nodes_.push_back({at, node});
    ranks_.push_back(rank);
    std::push_heap(ranks_.begin(), ranks_.end(), std::greater<>());
  } else {
    Node& last = nodes_[list_[rank]];
    const uint32_t first = last.next;
    last.next = node;
    nodes_.push_back({at, first});
  }
  list_[rank] = node;
}

// In an ordered vocabulary a merge of rank r can only create pairs of higher rank, so the heap
// holds ranks instead of positions: all positions of a rank are worked off from left to right at
// once. One character a million times needs a handful of ranks; a heap of positions took 192 ms for
// it.
size_t Merger::merge_by_rank(uint32_t* ids, size_t n) {
  link(ids, n);
  if (list_.size() < vocabulary_.rank_count()) list_.assign(vocabulary_.rank_count(), kEnd);
  nodes_.clear();
  for (size_t i = 0; i < n; ++i) {
    if (rank_[i] != kNoRank) note(rank_[i], static_cast<uint32_t>(i));
  }
  while (!ranks_.empty()) {
    const uint32_t rank = ranks_.front();
    std::pop_heap(ranks_.begin(), ranks_.end(), std::greater<>());
    ranks_.pop_back();
    positions_.clear();
    const uint32_t first = nodes_[list_[rank]].next;
    uint32_t node = first;
    do {
      positions_.push_back(nodes_[node].at);
      node = nodes_[node].next;
    } while (node != first);
    list_[rank] = kEnd;
    if (!std::is_sorted(positions_.begin(), positions_.end())) {
      std::sort(positions_.begin(), positions_.end());
    }
    for (const uint32_t at : positions_) {
      if (rank_[at] != rank) continue;
      join(ids, at);
      if (rank_[at] != kNoRank) note(rank_[at], at);
      const uint32_t left = previous_[at];
      if (left != kEnd && rank_[left] != kNoRank) note(rank_[left], left);
    }
  }
  return unlink(ids);
}

size_t Merger::merge_by_heap(uint32_t* ids, size_t n) {
  link(ids, n);
  heap_.clear();
  const auto entry = [this](uint32_t at) { return static_cast<uint64_t>(rank_[at]) << 32 | at; };
  for (uint32_t i = 0; i < n; ++i) {
    if (rank_[i] != kNoRank) heap_.push_back(entry(i));
  }
  std::make_heap(heap_.begin(), heap_.end(), std::greater<>());
  const auto push = [&](uint32_t at) {
    if (at == kEnd || rank_[at] == kNoRank) return;
    heap_.push_back(entry(at));
    std::push_heap(heap_.begin(), heap_.end(), std::greater<>());
  };
  while (!heap_.empty()) {
    const uint64_t top = heap_.front();
    std::pop_heap(heap_.begin(), heap_.end(), std::greater<>());
    heap_.pop_back();
    const uint32_t at = static_cast<uint32_t>(top);
    if (rank_[at] != top >> 32) continue;
    join(ids, at);
    push(at);
    push(previous_[at]);
  }
  return unlink(ids);
}

}  // namespace lmfast::bpe
