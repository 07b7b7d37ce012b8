#include "unicode.h"

#include <cstring>

namespace lmfast::bpe {

uint8_t g_class_of[kCodePoints];

namespace {

// Calls run(first, length, class) for each run; false when the runs do not cover the code points.
template <class Run>
bool for_each_run(const uint8_t* runs, size_t size, Run run) {
  uint64_t at = 0, value = 0;
  int shift = 0;
  for (size_t i = 0; i < size; ++i) {
    if (shift > 28) return false;
    value |= static_cast<uint64_t>(runs[i] & 127) << shift;
    shift += 7;
    if (runs[i] & 128) continue;
    const uint64_t length = value >> 3;
    if (length > kCodePoints - at) return false;
    run(at, length, static_cast<uint8_t>(value & 7));
    at += length;
    value = 0;
    shift = 0;
  }
  return at == kCodePoints && shift == 0;
}

}  // namespace

size_t valid_prefix(const uint8_t* text, size_t n) {
  size_t pos = 0;
  while (pos < n) {
    uint64_t word;
    while (pos + 8 <= n && (std::memcpy(&word, text + pos, 8), word & 0x8080808080808080ull) == 0) {
      pos += 8;
    }
    if (pos == n) break;
    const Char c = decode_char(text, pos, n);
    if (!c.valid) break;
    pos += c.length;
  }
  return pos;
}

bool set_character_classes(const uint8_t* runs, size_t size) {
  if (!for_each_run(runs, size, [](uint64_t, uint64_t, uint8_t) {})) return false;
  for_each_run(runs, size, [](uint64_t first, uint64_t length, uint8_t kind) {
    std::memset(g_class_of + first, kind, length);
  });
  return true;
}

}  // namespace lmfast::bpe
