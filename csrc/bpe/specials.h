// Finding special tokens in a text before it is split.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace lmfast::bpe {

struct SpecialMatch {
  size_t start, end;  // start == end: none is left
  uint32_t id;
};

// The special tokens that one call may match. Leftmost first; at one place the longest.
class Specials {
 public:
  explicit Specials(std::vector<std::pair<std::string, uint32_t>> tokens);

  // One more than the largest id.
  uint32_t ids_end() const { return ids_end_; }
  bool empty() const { return tokens_.empty(); }
  SpecialMatch find(const uint8_t* text, size_t pos, size_t n) const;

 private:
  bool match(const uint8_t* text, size_t pos, size_t n, SpecialMatch* found) const;

  std::vector<std::pair<std::string, uint32_t>> tokens_;  // longest first
  uint32_t ids_end_ = 0;
  bool begins_[256] = {};
  // A byte that all tokens have at the same place, the rarest in text; -1: there is none.
  int common_ = -1;
  size_t common_at_ = 0;
};

}  // namespace lmfast::bpe
