// Pre-splitting by bit masks. Included once per instruction set.
//
// A window of 64 bytes begins at a piece boundary, so no state is carried into it. One class byte
// per text byte gives one mask per class; starts follow by shifts. What lies near the end of the
// window, or in whitespace that reaches it, is left to the next window, which begins at the last
// certain start. Non-ASCII characters get their class from the table of code points, all their
// bytes alike. What the algebra does not cover (non-ASCII whitespace where its last character
// matters, scripts without case in o200k, and pieces longer than a window) goes to next_piece.
//
// Measured on 3.5 MB of English, GPT-2's pattern: 244 MB/s scalar, 1.7 GB/s AVX2, 7.4 GB/s AVX-512.
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

// The part of a character that lies in the next 64 bytes.
struct Carry {
  size_t tail = 0;
  uint8_t bits = 0;
};

// Overwrites the class bytes of the non-ASCII characters of 64 bytes; `high` has their bits. A
// character that goes on beyond them is left in `carry`.
inline void classify_characters(const uint8_t* text, uint64_t high, uint8_t* classes, Carry* carry,
                                Window* w) {
  for (size_t i = 0; i < carry->tail; ++i) classes[i] = carry->bits | kBitTail;
  w->odd_space = carry->tail > 0 && (carry->bits & kBitSpace);
  high &= ~0ull << carry->tail;
  carry->tail = 0;
  while (high != 0) {
    const size_t at = static_cast<size_t>(__builtin_ctzll(high));
    const Char c = decode_char(text, at, 64 + 4);
    const uint8_t bits = kBitsOfClass[class_of(c)];
    w->odd_space |= (bits & kBitSpace) != 0;
    w->odd_number |= (bits & kBitNumber) != 0;
    classes[at] = bits;
    for (size_t i = 1; i < c.length; ++i) classes[at + i] = bits | kBitTail;
    if (at + c.length >= 64) {
      *carry = {at + c.length - 64, bits};
      break;
    }
    high &= ~0ull << (at + c.length);
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
    Carry carry;
    Ops::classify(text + pos, &carry, &w);
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

// GPT-2's pattern by whole blocks: its starts depend on the class of the byte before, so that a few
// bits are all that one block must know of the last, where one window must wait for the start that
// the last one found. Stops before a block it cannot decide; returns the number of starts, the last
// of which is where to go on.
template <class Ops>
size_t scan_gpt2_blocks(const uint8_t* text, size_t n, size_t pos, uint16_t* starts) {
  size_t count = 0;
  uint64_t letter_before = 0, number_before = 0, other_before = 0, blank_before = 0;
  uint64_t space_before = 0, set = 1, clear = 0;
  Carry carry;
  for (; pos + 64 <= n; pos += 64) {
    Window w;
    Ops::classify(text + pos, &carry, &w);
    const uint8_t after = text[pos + 64];
    if (w.odd_space || (after >= 0x80 && (w.space >> 63) != 0)) break;
    const uint64_t space_after =
        static_cast<uint64_t>(after < 0x80 && (kAscii.of[after] & kBitSpace));
    const uint64_t letter = w.lower | w.upper | w.uncased;
    const uint64_t other = ~(letter | w.number | w.space);
    const uint64_t same = (letter & (letter << 1 | letter_before)) |
                          (w.number & (w.number << 1 | number_before)) |
                          (other & (other << 1 | other_before));
    const uint64_t solid = ~(w.space | same | w.blank << 1 | blank_before);
    const uint64_t first_space = w.space & ~(w.space << 1 | space_before);
    const uint64_t last_space = w.space & ~(w.space >> 1 | space_after << 63);
    uint64_t found = ((solid | first_space | last_space) & ~clear) | set;
    set = clear = 0;
    for (uint64_t quotes = w.quote & solid; quotes != 0; quotes &= quotes - 1) {
      const size_t at = static_cast<size_t>(__builtin_ctzll(quotes));
      const size_t size = contraction_at(text + pos + at, false);
      if (size == 0) continue;
      if (at + size < 64) {
        found = with_piece(found, at, size);
      } else {
        found &= ~from(at + 1);
        clear = ~from(at + size - 64);
        set = 1ull << (at + size - 64);
      }
    }
    Ops::positions(found, pos, starts + count);
    count += static_cast<size_t>(__builtin_popcountll(found));
    letter_before = letter >> 63;
    number_before = w.number >> 63;
    other_before = other >> 63;
    blank_before = w.blank >> 63;
    space_before = w.space >> 63;
  }
  return count;
}

template <Pattern pattern, class Ops>
size_t scan_windows(const uint8_t* text, size_t n, uint16_t* starts) {
  const size_t limit = n + kPadding / 2;
  size_t count = 0, pos = 0;
  while (pos < n) {
    if (pattern == Pattern::kGpt2 && pos + 128 <= n) {
      const size_t found = scan_gpt2_blocks<Ops>(text, n, pos, starts + count);
      if (found > 1) {
        count += found - 1;
        pos = starts[count];
      }
    }
    Window w;
    Carry carry;
    Ops::classify(text + pos, &carry, &w);
    uint64_t found = 1;
    if (covered(pattern, w)) {
      uint64_t valid = certain(w);
      if (pattern == Pattern::kGpt2) found = starts_gpt2(w, text + pos, valid);
      if (pattern == Pattern::kO200k) found = starts_o200k(w, text + pos, valid);
      if (pattern == Pattern::kCl100k || pattern == Pattern::kLlama3) {
        found = starts_cl100k(w, text + pos, valid);
      }
      if (pattern == Pattern::kWhitespace) {
        found = (w.space ^ w.space << 1) | 1;
        valid = ~0ull;
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

template <class Ops>
size_t scan_pattern(Pattern pattern, const uint8_t* text, size_t n, uint16_t* starts,
                    uint16_t* ends) {
  switch (pattern) {
    case Pattern::kWords:
      return scan_words<Ops>(text, n, starts, ends);
    case Pattern::kWhitespace:
      return scan_windows<Pattern::kWhitespace, Ops>(text, n, starts);
    case Pattern::kGpt2:
      return scan_windows<Pattern::kGpt2, Ops>(text, n, starts);
    case Pattern::kCl100k:
      return scan_windows<Pattern::kCl100k, Ops>(text, n, starts);
    case Pattern::kLlama3:
      return scan_windows<Pattern::kLlama3, Ops>(text, n, starts);
    case Pattern::kO200k:
      return scan_windows<Pattern::kO200k, Ops>(text, n, starts);
    default:
      return 0;
  }
}

}  // namespace
}  // namespace lmfast::bpe
