// UTF-8 decoding and the Unicode character classes of the pre-splitting patterns.
#pragma once
#include <cstddef>
#include <cstdint>

namespace lmfast::bpe {

// The numbering of lmfast/tokenizer/unicode_classes.py, which owns the table.
enum CharClass : uint8_t { kOther, kUpper, kLower, kLetter, kMark, kNumber, kSpace, kNewline };

constexpr uint32_t kCodePoints = 0x110000;

// One class per code point. Until set_character_classes is called every character is kOther.
extern uint8_t g_class_of[kCodePoints];

// Expands runs of varint((length << 3) | class) into g_class_of.
// Returns false, and changes nothing, unless the runs cover all code points exactly.
bool set_character_classes(const uint8_t* runs, size_t size);

struct Char {
  uint32_t code;    // the code point; the byte itself where the text is not UTF-8
  uint32_t length;  // bytes, at least 1
  bool valid;
};

// Decodes the character at text[pos], pos < n. Overlong forms, surrogates, values above U+10FFFF
// and truncated sequences are invalid and count as one byte, so that any bytes can be scanned.
static inline Char decode_char(const uint8_t* text, size_t pos, size_t n) {
  const uint8_t* p = text + pos;
  const size_t left = n - pos;
  const uint32_t a = p[0];
  if (a < 0x80) return {a, 1, true};
  const auto tail = [p](size_t i) { return (p[i] & 0xC0) == 0x80; };
  if (a >= 0xC2 && a <= 0xDF && left > 1 && tail(1)) return {(a & 31) << 6 | (p[1] & 63u), 2, true};
  if (a >= 0xE0 && a <= 0xEF && left > 2 && tail(1) && tail(2)) {
    const uint32_t code = (a & 15) << 12 | (p[1] & 63u) << 6 | (p[2] & 63u);
    if (code >= 0x800 && (code < 0xD800 || code > 0xDFFF)) return {code, 3, true};
  }
  if (a >= 0xF0 && a <= 0xF4 && left > 3 && tail(1) && tail(2) && tail(3)) {
    const uint32_t code = (a & 7) << 18 | (p[1] & 63u) << 12 | (p[2] & 63u) << 6 | (p[3] & 63u);
    if (code >= 0x10000 && code < kCodePoints) return {code, 4, true};
  }
  return {a, 1, false};
}

// How many bytes come before the first that is not UTF-8.
size_t valid_prefix(const uint8_t* text, size_t n);

static inline CharClass class_of(const Char& c) {
  return c.valid ? static_cast<CharClass>(g_class_of[c.code]) : kOther;
}

}  // namespace lmfast::bpe
