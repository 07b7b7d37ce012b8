// What counting does with each line of a corpus. Lines are short and their lengths not predictable:
// a call of memcpy costs more than most of them.
#pragma once
#include <cstring>

#include "hash.h"

namespace lmfast::bpe {
namespace {

inline size_t leading_spaces_of(const uint8_t* text, size_t n) {
  size_t count = 0;
  for (; count + 8 <= n; count += 8) {
    const uint64_t others = load_word(text + count) ^ 0x2020202020202020ull;
    if (others != 0) return count + static_cast<size_t>(__builtin_ctzll(others)) / 8;
  }
  while (count < n && text[count] == ' ') ++count;
  return count;
}

inline void copy_line_to(const uint8_t* from, size_t n, uint8_t* to) {
  if (n < 16) {
    for (size_t i = 0; i < n; ++i) to[i] = from[i];
    return;
  }
  for (size_t i = 0; i + 16 < n; i += 16) std::memcpy(to + i, from + i, 16);
  std::memcpy(to + n - 16, from + n - 16, 16);
}

}  // namespace
}  // namespace lmfast::bpe
