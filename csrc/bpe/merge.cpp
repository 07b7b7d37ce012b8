#include "merge.h"

#include <algorithm>
#include <functional>

namespace lmfast::bpe {

uint32_t* Merger::encode(const uint8_t* piece, size_t size, uint32_t* out) {
  Symbols symbols = {piece, nullptr};
  size_t n = size;
  if (vocabulary_.characters()) {
    // The ids are read before they are written over: a token never begins left of its place.
    n = vocabulary_.initial_symbols(piece, size, out);
    symbols = {nullptr, out};
  }
  if (n <= kMergeSymbols) {
    uint32_t ids[kMergeSymbols];
    for (uint64_t begins = merge_few(symbols, n, ids); begins != 0; begins &= begins - 1) {
      *out++ = ids[__builtin_ctzll(begins)];
    }
    return out;
  }
  return vocabulary_.ordered() ? merge_windows(symbols, n, out) : merge_all(symbols, n, out);
}

uint64_t Merger::merge_few(Symbols symbols, size_t n, uint32_t* ids) const {
  if (n == 0) return 0;
  if (symbols.bytes == nullptr) std::copy(symbols.ids, symbols.ids + n, ids);
  return kernels_.merge(vocabulary_.ranks(), symbols.bytes, ids, n);
}

// A sequence of tokens is the encoding of a text exactly when every two neighbours are the encoding
// of theirs, if every merge ranks after those that make its parts (Berglund and van der Merwe 2023,
// arXiv 2309.08715): up to any rank no merge crosses the bounds between tokens, so that each side
// has the symbols it has alone. The next window begins at a token of the last one. Where it begins
// with the same token, all neighbours in the tokens before that one and in the next window have
// been seen together in one window, and the two make one encoding.
uint32_t* Merger::merge_windows(Symbols symbols, size_t n, uint32_t* out) {
  uint32_t* const begin = out;
  size_t at = 0, size = kMergeSymbols;
  merge_window(symbols, size, &window_);
  while (at + window_.size < n) {
    size_t cut = window_.count - 1;
    while (window_.starts[cut] > window_.size - window_.size / 4) --cut;
    const size_t skip = window_.starts[cut];
    if (2 * skip >= window_.size) {
      size = std::max(kMergeSymbols, window_.size / 2);
      merge_window(from(symbols, at + skip), std::min(size, n - at - skip), &next_window_);
      if (next_window_.ids[0] == window_.ids[cut] &&
          next_window_.end_of(0) + skip == window_.end_of(cut)) {
        out = std::copy(window_.ids.begin(), window_.ids.begin() + static_cast<std::ptrdiff_t>(cut),
                        out);
        at += skip;
        std::swap(window_, next_window_);
        continue;
      }
    }
    // Tokens nearly as long as the window, or a right end that reaches far back: a wider window.
    const uint32_t first = window_.ids[0];
    merge_window(from(symbols, at), std::min(4 * window_.size, n - at), &window_);
    if (at > 0 && window_.ids[0] != first) return merge_all(symbols, n, begin);
  }
  out = std::copy(window_.ids.begin(),
                  window_.ids.begin() + static_cast<std::ptrdiff_t>(window_.count), out);
  trim();
  return out;
}

void Merger::merge_window(Symbols symbols, size_t n, Window* window) {
  window->size = n;
  window->count = 0;
  if (window->ids.size() < n) {
    window->ids.resize(n);
    window->starts.resize(n);
  }
  const auto add = [window](uint32_t id, uint32_t start) {
    window->ids[window->count] = id;
    window->starts[window->count++] = start;
  };
  if (n <= kMergeSymbols) {
    uint32_t ids[kMergeSymbols];
    for (uint64_t begins = merge_few(symbols, n, ids); begins != 0; begins &= begins - 1) {
      const uint32_t start = static_cast<uint32_t>(__builtin_ctzll(begins));
      add(ids[start], start);
    }
    return;
  }
  link(symbols, n);
  merge_by_rank();
  for (uint32_t at = 0; at != kEnd; at = next_[at]) add(ids_[at], at);
}

uint32_t* Merger::merge_all(Symbols symbols, size_t n, uint32_t* out) {
  link(symbols, n);
  if (vocabulary_.ordered()) {
    merge_by_rank();
  } else {
    merge_by_heap();
  }
  return take_links(out);
}

void Merger::link(Symbols symbols, size_t n) {
  ids_.resize(n);
  next_.resize(n);
  previous_.resize(n);
  rank_.resize(n);
  for (size_t i = 0; i < n; ++i) {
    ids_[i] = symbols.bytes ? vocabulary_.symbol(symbols.bytes[i]) : symbols.ids[i];
    next_[i] = i + 1 < n ? static_cast<uint32_t>(i + 1) : kEnd;
    previous_[i] = i > 0 ? static_cast<uint32_t>(i - 1) : kEnd;
  }
  for (size_t i = 0; i < n; ++i) rank_[i] = rank_at(static_cast<uint32_t>(i));
}

// Merges the symbol at `at` with its right neighbour.
void Merger::join(uint32_t at) {
  const uint32_t gone = next_[at];
  ids_[at] = vocabulary_.id_of_rank(rank_[at]);
  rank_[gone] = kNoRank;
  next_[at] = next_[gone];
  if (next_[at] != kEnd) previous_[next_[at]] = at;
  rank_[at] = rank_at(at);
  if (previous_[at] != kEnd) rank_[previous_[at]] = rank_at(previous_[at]);
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
void Merger::merge_by_rank() {
  if (list_.size() < vocabulary_.rank_count()) list_.assign(vocabulary_.rank_count(), kEnd);
  nodes_.clear();
  for (size_t i = 0; i < rank_.size(); ++i) {
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
      join(at);
      if (rank_[at] != kNoRank) note(rank_[at], at);
      const uint32_t left = previous_[at];
      if (left != kEnd && rank_[left] != kNoRank) note(rank_[left], left);
    }
  }
}

void Merger::fill_heap() {
  heap_.clear();
  for (uint32_t i = 0; i < rank_.size(); ++i) {
    if (rank_[i] != kNoRank) heap_.push_back(static_cast<uint64_t>(rank_[i]) << 32 | i);
  }
  std::make_heap(heap_.begin(), heap_.end(), std::greater<>());
}

void Merger::push(uint64_t entry) {
  heap_.push_back(entry);
  std::push_heap(heap_.begin(), heap_.end(), std::greater<>());
}

uint64_t Merger::pop() {
  const uint64_t least = heap_.front();
  std::pop_heap(heap_.begin(), heap_.end(), std::greater<>());
  heap_.pop_back();
  return least;
}

void Merger::merge_by_heap() {
  fill_heap();
  while (!heap_.empty()) {
    const uint64_t entry = pop();
    if (!valid(entry)) continue;
    const uint32_t at = static_cast<uint32_t>(entry);
    join(at);
    push_pair(at);
    push_pair(previous_[at]);
  }
}

uint32_t* Merger::encode_dropout(const uint8_t* piece, size_t size, Dropout* dropout,
                                 uint32_t* out) {
  Symbols symbols = {piece, nullptr};
  size_t n = size;
  if (vocabulary_.characters()) {
    n = vocabulary_.initial_symbols(piece, size, out);
    symbols = {nullptr, out};
  }
  if (n == 0) return out;
  link(symbols, n);
  merge_with_dropout(dropout);
  return take_links(out);
}

void Merger::merge_with_dropout(Dropout* dropout) {
  fill_heap();
  left_out_.clear();
  while (!heap_.empty()) {
    const uint64_t entry = pop();
    if (!valid(entry)) continue;
    if (dropout->leaves_out()) {
      left_out_.push_back(entry);
      continue;
    }
    const uint32_t at = static_cast<uint32_t>(entry);
    join(at);
    push_pair(at);
    push_pair(previous_[at]);
    // Those left out are possible again in the next step.
    for (const uint64_t other : left_out_) {
      if (valid(other)) push(other);
    }
    left_out_.clear();
  }
}

uint32_t* Merger::take_links(uint32_t* out) {
  for (uint32_t at = 0; at != kEnd; at = next_[at]) *out++ = ids_[at];
  trim();
  return out;
}

void Merger::trim() {
  if (ids_.size() <= kKeptSymbols) return;
  for (std::vector<uint32_t>* v : {&ids_, &next_, &previous_, &rank_, &positions_}) {
    std::vector<uint32_t>().swap(*v);
  }
  std::vector<Node>().swap(nodes_);
  std::vector<uint64_t>().swap(heap_);
  std::vector<uint64_t>().swap(left_out_);
  window_ = next_window_ = Window();
}

}  // namespace lmfast::bpe
