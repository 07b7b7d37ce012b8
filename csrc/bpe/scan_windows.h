// Pre-splitting by bit masks. Included once per instruction set.
//
// A window of 64 bytes begins at a piece boundary, so no state is carried into it. One class byte
// per text byte gives one mask per class; starts follow by shifts. What lies near the end of the
// window, or in whitespace that reaches it, is left to the next window, which begins at the last
// certain start. Non-ASCII characters get their class from the table of code points, all their
// bytes alike. What the algebra does not cover (non-ASCII whitespace where its last character
// matters, scripts without case in o200k, and pieces longer than a window) goes to next_piece.
//
// Measured on English: 250 MB/s scalar; the windows cost 1.3 cycles a byte less.
#pragma once
#include "kernels.h"
#include "unicode.h"

namespace lmfast::bpe {
namespace {

// Bits of a class byte.
constexpr uint8_t kBitLower = 1, kBitUpper = 2, kBitUncased = 4, kBitNumber = 8, kBitSpace = 16,
                  kBitNewline = 32, kBitMark = 64, kBitTail = 128;

// ASCII classes; kBitTail marks nothing in ASCII.
struct AsciiClasses {
  uint8_t of[128];
  constexpr AsciiClasses() : of() {
    for (int c = 0; c < 128; ++c) {
      of[c] = c >= 'a' && c <= 'z'                          ? kBitLower
              : c >= 'A' && c <= 'Z'                        ? kBitUpper
              : c >= '0' && c <= '9'                        ? kBitNumber
              : c == '\n' || c == '\r'                      ? kBitSpace | kBitNewline
              : c == ' ' || c == '\t' || c == 11 || c == 12 ? kBitSpace
                                                            : 0;
    }
  }
};
constexpr AsciiClasses kAscii;

constexpr uint8_t kBitsOfClass[8] = {0,        kBitUpper,  kBitLower, kBitUncased,
                                     kBitMark, kBitNumber, kBitSpace, kBitSpace | kBitNewline};

struct Window {
  uint64_t lower, upper, uncased, number, space, newline, mark, tail;
  uint64_t blank, quote, slash;  // ' ', '\'' and '/'
  uint64_t separator;            // 0x1C to 0x1F, which only kWords takes for whitespace
  bool odd_space;                // non-ASCII whitespace
  bool odd_number;               // non-ASCII numbers
};

// Overwrites the class bytes of the non-ASCII characters of a window; `ascii_only` bits are where
// no work is to do. A character that goes on beyond the window fills what there is.
inline void classify_characters(const uint8_t* text, uint64_t high, uint8_t* classes, Window* w) {
  w->odd_space = w->odd_number = false;
  while (high != 0) {
    const size_t at = static_cast<size_t>(__builtin_ctzll(high));
    const Char c = decode_char(text, at, 64 + 4);
    const uint8_t bits = kBitsOfClass[class_of(c)];
    w->odd_space |= (bits & kBitSpace) != 0;
    w->odd_number |= (bits & kBitNumber) != 0;
    classes[at] = bits;
    for (size_t i = 1; i < c.length; ++i) classes[at + i] = bits | kBitTail;
    high &= ~0ull << (at + c.length - 1) << 1;
    if (at + c.length >= 64) break;
  }
}

inline uint64_t from(size_t bit) { return bit >= 64 ? 0 : ~0ull << bit; }

// Bits of a byte window that may be used: starts before the last three bytes, which a contraction
// could reach, and not inside whitespace that reaches the end.
inline uint64_t certain(const Window& w) {
  const uint64_t open = ~w.space;
  const size_t solid = open == 0 ? 0 : 64 - static_cast<size_t>(__builtin_clzll(open));
  const size_t last = solid < 60 ? solid : 60;
  return ~from(last + 1);
}

// Length of '(?:[sdmt]|ll|ve|re), or 0.
inline size_t contraction_at(const uint8_t* p, bool ignore_case) {
  const uint8_t fold = ignore_case ? 0x20 : 0;
  const uint8_t a = p[1] | fold, b = p[2] | fold;
  if (a == 's' || a == 't' || a == 'd' || a == 'm') return 2;
  if ((a == 'l' && b == 'l') || (a == 'v' && b == 'e') || (a == 'r' && b == 'e')) return 3;
  return ignore_case && p[1] == 0xC5 && p[2] == 0xBF ? 3 : 0;
}

// The piece that begins at `at` is `size` bytes: no start inside it, one after it.
inline uint64_t with_piece(uint64_t starts, size_t at, size_t size) {
  return (starts & ~(from(at + 1) & ~from(at + size))) | 1ull << (at + size);
}

inline uint64_t starts_gpt2(const Window& w, const uint8_t* text, uint64_t valid) {
  const uint64_t letter = w.lower | w.upper | w.uncased;
  const uint64_t other = ~(letter | w.number | w.space);
  const uint64_t same = (letter & letter << 1) | (w.number & w.number << 1) | (other & other << 1);
  const uint64_t solid = ~w.space & ~same & ~(w.blank << 1);
  const uint64_t first_space = w.space & ~(w.space << 1);
  const uint64_t last_space = w.space & ~(w.space >> 1);
  uint64_t starts = solid | first_space | last_space | 1;
  uint64_t quotes = w.quote & solid & valid;
  for (; quotes != 0; quotes &= quotes - 1) {
    const size_t at = static_cast<size_t>(__builtin_ctzll(quotes));
    const size_t size = at > 60 ? 0 : contraction_at(text + at, false);
    if (size != 0) starts = with_piece(starts, at, size);
  }
  return starts;
}

// What cl100k, llama3 and o200k share: " ?[^\s\p{L}\p{N}]+[\r\n]*", an optional character before
// letters, numbers by three, and whitespace that ends with its last line end.
struct Shared {
  uint64_t letter, other, starts, symbol_start;
};

inline Shared starts_shared(const Window& w) {
  Shared s;
  s.letter = w.lower | w.upper | w.uncased;
  s.other = ~(s.letter | w.number | w.space);
  // Line ends right after symbols belong to them: the carry of the sum runs through them.
  const uint64_t after_symbol = s.other << 1 & w.newline;
  const uint64_t absorbed = w.newline & ~(w.newline + after_symbol);
  const uint64_t space = w.space & ~absorbed;
  const uint64_t blank = w.space & ~w.newline;
  const uint64_t first_space = space & ~(space << 1);
  const uint64_t last_space = blank & ~(w.space >> 1);
  s.symbol_start = s.other & ~(s.other << 1) & ~(w.blank << 1);
  // A lone symbol or any whitespace but a line end joins the letters that follow.
  uint64_t lone = s.symbol_start;
  lone |= lone << 1 & w.tail & s.other;
  lone |= lone << 1 & w.tail & s.other;
  lone |= lone << 1 & w.tail & s.other;
  const uint64_t letters = s.letter & ~(s.letter << 1) & ~(lone << 1) & ~(blank << 1);
  const uint64_t numbers = w.number & ~(w.number << 1);
  s.starts = s.symbol_start | letters | numbers | first_space | last_space | 1;
  // Blanks after a line end are a piece of their own unless another line end follows them.
  uint64_t after_line = blank & w.newline << 1 & ~first_space;
  for (; after_line != 0; after_line &= after_line - 1) {
    const size_t at = static_cast<size_t>(__builtin_ctzll(after_line));
    const uint64_t rest = ~blank & from(at);
    const uint64_t next = rest & (0 - rest);
    if ((next & w.space) == 0) s.starts |= 1ull << at;
  }
  // Runs of more than three numbers.
  uint64_t longer = w.number & w.number >> 1 & w.number >> 2 & w.number >> 3;
  longer &= numbers;
  for (; longer != 0; longer &= longer - 1) {
    const size_t at = static_cast<size_t>(__builtin_ctzll(longer));
    const uint64_t rest = ~w.number & from(at);
    const size_t end = rest == 0 ? 64 : static_cast<size_t>(__builtin_ctzll(rest));
    for (size_t i = at + 3; i < end; i += 3) s.starts |= 1ull << i;
  }
  return s;
}

inline uint64_t starts_cl100k(const Window& w, const uint8_t* text, uint64_t valid) {
  const Shared s = starts_shared(w);
  uint64_t starts = s.starts;
  for (uint64_t q = w.quote & s.symbol_start & valid; q != 0; q &= q - 1) {
    const size_t at = static_cast<size_t>(__builtin_ctzll(q));
    const size_t size = at > 60 ? 0 : contraction_at(text + at, true);
    if (size != 0) starts = with_piece(starts, at, size);
  }
  return starts;
}

inline uint64_t starts_o200k(const Window& w, const uint8_t* text, uint64_t valid) {
  const Shared s = starts_shared(w);
  uint64_t starts = s.starts | (w.upper & w.lower << 1);
  size_t suffix_end = 0;
  for (uint64_t q = w.quote & s.letter << 1 & valid; q != 0; q &= q - 1) {
    const size_t at = static_cast<size_t>(__builtin_ctzll(q));
    // Right after a suffix the apostrophe begins a piece: a word has at most one.
    const size_t size = at > 60 || at == suffix_end ? 0 : contraction_at(text + at, true);
    if (size == 0) continue;
    starts = with_piece(starts, at, size) & ~(1ull << at);
    suffix_end = at + size;
  }
  return starts;
}

// Whether the masks decide everything in the window.
inline bool covered(Pattern pattern, const Window& w) {
  if (pattern == Pattern::kWords || pattern == Pattern::kWhitespace) return true;
  if (w.odd_space) return false;
  if (pattern == Pattern::kGpt2) return true;
  if (w.odd_number) return false;
  if (pattern != Pattern::kO200k) return true;
  return (w.slash & w.newline << 1) == 0 && w.mark == 0 &&
         (w.uncased == 0 || (w.lower | w.upper) == 0);
}

template <class Ops>
size_t scan_words(const uint8_t* text, size_t n, uint16_t* starts, uint16_t* ends) {
  size_t count = 0, ended = 0, pos = 0;
  while (pos < n) {
    Window w;
    Ops::classify(text + pos, &w);
    const uint64_t space = w.space | w.separator;
    const uint64_t begin = ~space & (space << 1 | 1);
    uint64_t end = space & ~space << 1 & ~1ull;
    const size_t open =
        static_cast<size_t>(__builtin_popcountll(begin) - __builtin_popcountll(end));
    if (open != 0 && begin == 1) {
      const Piece piece = next_piece(Pattern::kWords, text, pos, n + kPadding / 2);
      if (piece.end + 8 >= n + kPadding / 2) break;
      starts[count++] = static_cast<uint16_t>(piece.start);
      ends[ended++] = static_cast<uint16_t>(piece.end);
      pos = piece.end;
      continue;
    }
    size_t last = open == 0 ? 64 : 63 - static_cast<size_t>(__builtin_clzll(begin));
    // A space of several bytes may go on beyond the window.
    while (open == 0 && last > 60 && (text[pos + last] & 0xC0) == 0x80) --last;
    Ops::positions(begin & ~from(last), pos, starts + count);
    Ops::positions(end, pos, ends + ended);
    ended += static_cast<size_t>(__builtin_popcountll(end));
    count = ended;
    pos += last;
  }
  starts[count++] = static_cast<uint16_t>(pos);
  return count;
}

template <class Ops>
size_t scan_windows(Pattern pattern, const uint8_t* text, size_t n, uint16_t* starts,
                    uint16_t* ends) {
  if (pattern == Pattern::kNone || pattern == Pattern::kLines) return 0;
  if (pattern == Pattern::kWords) return scan_words<Ops>(text, n, starts, ends);
  const size_t limit = n + kPadding / 2;
  size_t count = 0, pos = 0;
  while (pos < n) {
    Window w;
    Ops::classify(text + pos, &w);
    uint64_t found = 1;
    if (covered(pattern, w)) {
      uint64_t valid = certain(w);
      switch (pattern) {
        case Pattern::kGpt2:
          found = starts_gpt2(w, text + pos, valid);
          break;
        case Pattern::kO200k:
          found = starts_o200k(w, text + pos, valid);
          break;
        case Pattern::kWhitespace:
          found = (w.space ^ w.space << 1) | 1;
          valid = ~0ull;
          break;
        default:
          found = starts_cl100k(w, text + pos, valid);
          break;
      }
      found &= valid;
    }
    if (found == 1) {
      const Piece piece = next_piece(pattern, text, pos, limit);
      if (piece.end + 8 >= limit || all_space(text, pos, limit)) break;
      starts[count++] = static_cast<uint16_t>(pos);
      pos = piece.end;
      continue;
    }
    const size_t last = 63 - static_cast<size_t>(__builtin_clzll(found));
    found &= ~from(last);
    Ops::positions(found, pos, starts + count);
    count += static_cast<size_t>(__builtin_popcountll(found));
    pos += last;
  }
  starts[count++] = static_cast<uint16_t>(pos);
  return count;
}

}  // namespace
}  // namespace lmfast::bpe
