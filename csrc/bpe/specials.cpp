#include "specials.h"

#include <algorithm>
#include <cstring>

namespace lmfast::bpe {

namespace {

// How rare a byte is in ordinary text, roughly.
int rarity(uint8_t c) {
  if (c == '|' || c == '\\' || c == '^' || c == '~' || c < ' ') return 4;
  if (c == '<' || c == '>' || c == '[' || c == ']' || c == '{' || c == '}' || c >= 0x80) return 3;
  if (c >= 'A' && c <= 'Z') return 2;
  return c == ' ' || (c >= 'a' && c <= 'z') ? 0 : 1;
}

}  // namespace

Specials::Specials(std::vector<std::pair<std::string, uint32_t>> tokens)
    : tokens_(std::move(tokens)) {
  std::stable_sort(tokens_.begin(), tokens_.end(),
                   [](const auto& a, const auto& b) { return a.first.size() > b.first.size(); });
  for (const auto& token : tokens_) {
    begins_[static_cast<uint8_t>(token.first[0])] = true;
    ids_end_ = std::max(ids_end_, token.second + 1);
  }
  if (tokens_.empty()) return;
  const std::string& shortest = tokens_.back().first;
  int best = -1;
  for (size_t at = 0; at < shortest.size(); ++at) {
    const auto same = [&](const auto& token) { return token.first[at] == shortest[at]; };
    const uint8_t c = static_cast<uint8_t>(shortest[at]);
    if (rarity(c) <= best || !std::all_of(tokens_.begin(), tokens_.end(), same)) continue;
    best = rarity(c);
    common_ = c;
    common_at_ = at;
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
    if (common_ >= 0) {
      if (n - pos <= common_at_) return found;
      const void* at = std::memchr(text + pos + common_at_, common_, n - pos - common_at_);
      if (at == nullptr) return found;
      pos = static_cast<size_t>(static_cast<const uint8_t*>(at) - text) - common_at_;
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
