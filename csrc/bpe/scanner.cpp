#include "scanner.h"

#include "unicode.h"

namespace lmfast::bpe {
namespace {

bool is_letter(CharClass c) { return c == kUpper || c == kLower || c == kLetter; }
bool is_space(CharClass c) { return c == kSpace || c == kNewline; }
bool is_other(CharClass c) { return c == kOther || c == kMark; }
// The two overlapping letter classes of o200k.
bool in_upper(CharClass c) { return c == kUpper || c == kLetter || c == kMark; }
bool in_lower(CharClass c) { return c == kLower || c == kLetter || c == kMark; }

struct Text {
  const uint8_t* bytes;
  size_t n;

  CharClass kind(size_t pos, size_t* next) const {
    const Char c = decode_char(bytes, pos, n);
    *next = pos + c.length;
    return class_of(c);
  }

  template <class Test>
  size_t skip(size_t pos, Test test) const {
    size_t next;
    while (pos < n && test(kind(pos, &next))) pos = next;
    return pos;
  }

  uint8_t at(size_t pos) const { return pos < n ? bytes[pos] : 0; }
};

// Length of the contraction at `pos`: '(?:[sdmt]|ll|ve|re), or 0.
size_t contraction(const Text& t, size_t pos, bool ignore_case) {
  if (t.at(pos) != '\'') return 0;
  uint8_t a = t.at(pos + 1), b = t.at(pos + 2);
  if (ignore_case) {
    if (a == 0xC5 && b == 0xBF) return 3;  // U+017F, the long s, folds to s
    if (a >= 'A' && a <= 'Z') a += 32;
    if (b >= 'A' && b <= 'Z') b += 32;
  }
  if (a == 's' || a == 'd' || a == 'm' || a == 't') return 2;
  return ((a == 'l' && b == 'l') || (a == 'v' && b == 'e') || (a == 'r' && b == 'e')) ? 3 : 0;
}

// The end of the whole blocks from `pos` on whose bytes all pass the test, which compiles to a few
// vector instructions: a known piece of a megabyte takes 0.25 ms in all instead of 0.48.
template <class Test>
size_t skip_blocks(const Text& t, size_t pos, Test test) {
  constexpr size_t kBlock = 64;
  for (; pos + kBlock <= t.n; pos += kBlock) {
    uint8_t all = 1;
    for (size_t i = 0; i < kBlock; ++i) all &= static_cast<uint8_t>(test(t.bytes[pos + i]));
    if (!all) break;
  }
  return pos;
}

bool ascii_letter(uint8_t c) { return static_cast<uint8_t>((c | 0x20) - 'a') < 26; }
bool ascii_digit(uint8_t c) { return static_cast<uint8_t>(c - '0') < 10; }

// Letters of two and three bytes, which most scripts consist of: half the time of kind().
size_t skip_wide_letters(const Text& t, size_t pos) {
  while (pos + 4 <= t.n) {
    const uint8_t* const p = t.bytes + pos;
    uint32_t code, length;
    if ((p[0] & 0xF0) == 0xE0 && (p[1] & 0xC0) == 0x80 && (p[2] & 0xC0) == 0x80) {
      code = (p[0] & 15u) << 12 | (p[1] & 63u) << 6 | (p[2] & 63u);
      length = 3;
      if (code < 0x800) break;
    } else if ((p[0] & 0xE0) == 0xC0 && (p[1] & 0xC0) == 0x80) {
      code = (p[0] & 31u) << 6 | (p[1] & 63u);
      length = 2;
      if (code < 0x80) break;
    } else {
      break;
    }
    // Surrogates, which are not UTF-8, are no letters in the table either.
    if (!is_letter(static_cast<CharClass>(g_class_of[code]))) break;
    pos += length;
  }
  return pos;
}

size_t skip_letters(const Text& t, size_t pos) {
  for (;;) {
    pos = skip_blocks(t, pos, ascii_letter);
    while (pos < t.n && ascii_letter(t.bytes[pos])) ++pos;
    pos = skip_wide_letters(t, pos);
    if (pos < t.n && ascii_letter(t.bytes[pos])) continue;
    size_t next;
    if (pos == t.n || t.bytes[pos] < 0x80 || !is_letter(t.kind(pos, &next))) return pos;
    pos = next;
  }
}

size_t skip_numbers(const Text& t, size_t pos) {
  return t.skip(skip_blocks(t, pos, ascii_digit), [](CharClass k) { return k == kNumber; });
}

size_t up_to_three_numbers(const Text& t, size_t pos) {
  size_t next;
  for (int i = 0; i < 3 && pos < t.n && t.kind(pos, &next) == kNumber; ++i) pos = next;
  return pos;
}

// A run of whitespace: \s+(?!\S)|\s+, preceded by \s*[\r\n] where `newlines` and by \s+$ where
// `whole_at_end`.
size_t whitespace(const Text& t, size_t pos, bool newlines, bool whole_at_end) {
  size_t end = skip_blocks(t, pos, [](uint8_t c) { return c == ' '; });
  size_t last = end > pos ? end - 1 : pos, after_newline = pos, next;
  while (end < t.n) {
    const CharClass c = t.kind(end, &next);
    if (!is_space(c)) break;
    last = end;
    end = next;
    if (c == kNewline) after_newline = end;
  }
  if (end == t.n && whole_at_end) return end;
  if (newlines && after_newline > pos) return after_newline;
  return end < t.n && last > pos ? last : end;
}

size_t gpt2(const Text& t, size_t pos) {
  if (const size_t k = contraction(t, pos, false)) return pos + k;
  size_t start = pos, next;
  if (t.bytes[pos] == ' ' && pos + 1 < t.n) start = pos + 1;
  const CharClass c = t.kind(start, &next);
  if (is_letter(c)) return skip_letters(t, next);
  if (c == kNumber) return skip_numbers(t, next);
  if (!is_space(c)) return t.skip(next, is_other);
  return whitespace(t, pos, false, false);
}

// The part after the letters and numbers: " ?[^\s\p{L}\p{N}]+[\r\n]*" and the whitespace rules.
size_t symbols_or_space(const Text& t, size_t pos, bool slash, bool whole_at_end) {
  size_t start = pos, next;
  if (t.bytes[pos] == ' ' && pos + 1 < t.n) start = pos + 1;
  if (!is_other(t.kind(start, &next))) return whitespace(t, pos, true, whole_at_end);
  size_t end = t.skip(next, is_other);
  while (end < t.n &&
         (t.bytes[end] == '\r' || t.bytes[end] == '\n' || (slash && t.bytes[end] == '/'))) {
    ++end;
  }
  return end;
}

size_t cl100k(const Text& t, size_t pos, bool whole_at_end) {
  if (const size_t k = contraction(t, pos, true)) return pos + k;
  size_t next, after;
  const CharClass c = t.kind(pos, &next);
  if (is_letter(c)) return skip_letters(t, next);
  if (c == kNumber) return up_to_three_numbers(t, pos);
  if (c != kNewline && next < t.n && is_letter(t.kind(next, &after))) {
    return skip_letters(t, after);
  }
  return symbols_or_space(t, pos, false, whole_at_end);
}

// [upper]*[lower]+ at `pos`, else [upper]+[lower]*; returns `pos` when neither matches. The first
// gives back characters until one of them is also lower: its end is after the last such one.
size_t cased_word(const Text& t, size_t pos, bool* has_lower) {
  size_t next, end = pos, after_lower = pos;
  CharClass c = kOther;
  while (end < t.n && in_upper(c = t.kind(end, &next))) {
    end = next;
    if (in_lower(c)) after_lower = end;
  }
  *has_lower = true;
  if (end < t.n && c == kLower) return t.skip(end, in_lower);
  if (after_lower > pos) return after_lower;
  *has_lower = false;
  return end;
}

size_t o200k(const Text& t, size_t pos) {
  size_t next;
  const CharClass c = t.kind(pos, &next);
  if (c == kNumber) return up_to_three_numbers(t, pos);
  size_t end = pos;
  bool has_lower = false;
  if (is_letter(c)) {
    end = cased_word(t, pos, &has_lower);
  } else if (c != kNewline) {
    // A mark can be the optional first character or part of the word: the former is tried first,
    // the latter only if it gives a word with a lower-case part.
    const size_t with_prefix = cased_word(t, next, &has_lower);
    if (with_prefix > next) end = with_prefix;
    if (c == kMark && !has_lower) end = next;
  }
  if (end > pos) return end + contraction(t, end, true);
  return symbols_or_space(t, pos, true, false);
}

bool is_separator(const Char& c) {
  return is_space(class_of(c)) || (c.code >= 0x1C && c.code <= 0x1F);
}

bool is_line_end(const Char& c) { return c.code == '\r' || c.code == '\n'; }

template <class Test>
size_t run_of(const uint8_t* text, size_t pos, size_t n, Test test) {
  while (pos < n) {
    const Char c = decode_char(text, pos, n);
    if (!test(c)) break;
    pos += c.length;
  }
  return pos;
}

template <class Test>
Piece separated(const uint8_t* text, size_t pos, size_t n, Test separator) {
  const size_t start = run_of(text, pos, n, separator);
  return {start, run_of(text, start, n, [&](const Char& c) { return !separator(c); })};
}

}  // namespace

Piece next_piece(Pattern pattern, const uint8_t* text, size_t pos, size_t n) {
  if (pos >= n) return {n, n};
  const Text t{text, n};
  switch (pattern) {
    case Pattern::kNone:
      return {pos, n};
    case Pattern::kWords:
      return separated(text, pos, n, is_separator);
    case Pattern::kLines:
      return separated(text, pos, n, is_line_end);
    case Pattern::kWhitespace: {
      size_t next;
      const bool space = is_space(t.kind(pos, &next));
      return {pos, t.skip(next, [space](CharClass c) { return is_space(c) == space; })};
    }
    case Pattern::kGpt2:
      return {pos, gpt2(t, pos)};
    case Pattern::kCl100k:
      return {pos, cl100k(t, pos, true)};
    case Pattern::kLlama3:
      return {pos, cl100k(t, pos, false)};
    case Pattern::kO200k:
      return {pos, o200k(t, pos)};
  }
  return {n, n};
}

bool all_space(const uint8_t* text, size_t pos, size_t n) {
  return Text{text, n}.skip(pos, is_space) >= n;
}

}  // namespace lmfast::bpe
