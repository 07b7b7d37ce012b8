#include "specials.h"

#include <algorithm>
#include <cstring>

namespace lmfast::bpe {

Specials::Specials(std::vector<std::pair<std::string, uint32_t>> tokens)
    : tokens_(std::move(tokens)) {
  std::stable_sort(tokens_.begin(), tokens_.end(),
                   [](const auto& a, const auto& b) { return a.first.size() > b.first.size(); });
  for (const auto& token : tokens_) begins_[static_cast<uint8_t>(token.first[0])] = true;
  if (std::count(begins_, begins_ + 256, true) == 1) {
    only_first_ = static_cast<int>(std::find(begins_, begins_ + 256, true) - begins_);
  }
}

bool Specials::match(const uint8_t* text, size_t pos, size_t n, SpecialMatch* found) const {
  for (const auto& [token, id] : tokens_) {
    if (token.size() > n - pos || std::memcmp(text + pos, token.data(), token.size()) != 0)
      continue;
    *found = {pos, pos + token.size(), id};
    return true;
  }
  return false;
}

SpecialMatch Specials::find(const uint8_t* text, size_t pos, size_t n) const {
  SpecialMatch found = {n, n, 0};
  if (tokens_.empty()) return found;
  while (pos < n) {
    if (only_first_ >= 0) {
      const void* at = std::memchr(text + pos, only_first_, n - pos);
      if (at == nullptr) return found;
      pos = static_cast<size_t>(static_cast<const uint8_t*>(at) - text);
    } else {
      while (pos < n && !begins_[text[pos]]) ++pos;
      if (pos == n) return found;
    }
    if (match(text, pos, n, &found)) return found;
    ++pos;
  }
  return found;
}

}  // namespace lmfast::bpe
