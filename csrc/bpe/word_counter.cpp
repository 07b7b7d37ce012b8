#include "word_counter.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "encode_loop.h"
#include "hash.h"
#include "split.h"

namespace lmfast::bpe {
WordCounter::WordCounter(Pattern pattern, const Kernels& kernels)
    : pattern_(pattern), kernels_(kernels), short_(1u << 10), long_(1u << 8) {}

// Words ---------------------------------------------------------------------------------------

uint32_t WordCounter::append(PieceKey key, uint64_t hash, uint64_t count, uint64_t place) {
  const size_t number = words_.size();
  if (number >= 0xFFFFFFFFu) throw std::length_error("more than 4294967295 distinct words");
  Entry* const entry = words_.room(1);
  uint64_t* const counted = counts_.room(1);
  *entry = {key, place, hash};
  *counted = count;
  words_.set_end(entry + 1);
  counts_.set_end(counted + 1);
  return static_cast<uint32_t>(number);
}

uint32_t WordCounter::count_again(uint32_t word, uint64_t count, uint64_t place) {
  counts_.data()[word] += count;
  Entry& entry = words_.data()[word];
  entry.place = std::min(entry.place, place);
  return word;
}

uint32_t WordCounter::add_short(PieceKey key, uint32_t hash, uint64_t count, uint64_t place) {
  for (size_t at = hash & (short_.size() - 1);; at = (at + 1) & (short_.size() - 1)) {
    CountBucket& bucket = short_[at];
    for (uint32_t i = 0; i < bucket.used; ++i) {
      if (bucket.key[i].low != key.low || bucket.key[i].high != key.high) continue;
      return count_again(bucket.word[i], count, place);
    }
    if (bucket.used == 3) continue;
    const uint32_t word = append(key, hash, count, place);
    bucket.word[bucket.used] = word;
    bucket.key[bucket.used++] = key;
    if (++short_words_ * 2 > short_.size() * 3) grow_short();
    return word;
  }
}

// The words that came first, which are the frequent ones, stay first in their buckets. Small tables
// grow faster: every word is moved each time.
void WordCounter::grow_short() {
  constexpr size_t kSmall = 1u << 13, kAhead = 16;
  const size_t grown = (short_.size() <= kSmall ? 4 : 2) * short_.size();
  std::vector<CountBucket>(grown).swap(short_);
  const size_t mask = grown - 1, size = words_.size();
  for (uint32_t word = 0; word < size; ++word) {
    const Entry& entry = words_.data()[word];
    __builtin_prefetch(&short_[words_.data()[std::min(word + kAhead, size - 1)].hash & mask], 1);
    if ((entry.key.high & kLong) == kLong) continue;
    size_t at = entry.hash & mask;
    while (short_[at].used == 3) at = (at + 1) & mask;
    CountBucket& bucket = short_[at];
    bucket.word[bucket.used] = word;
    bucket.key[bucket.used++] = entry.key;
  }
}

uint32_t WordCounter::add_long(const uint8_t* word, size_t size, uint64_t count, uint64_t place) {
  const uint64_t hash = hash_bytes(word, size);
  const size_t mask = long_.size() - 1;
  size_t at = hash & mask;
  for (; long_[at] != 0; at = (at + 1) & mask) {
    const Entry& entry = words_.data()[long_[at] - 1];
    if (entry.hash != hash || (entry.key.high & ~kLong) != size) continue;
    if (std::memcmp(long_bytes_.data() + entry.key.low, word, size) != 0) continue;
    return count_again(long_[at] - 1, count, place);
  }
  const PieceKey key = {long_bytes_.size(), kLong | size};
  const uint32_t number = append(key, hash, count, place);
  long_[at] = number + 1;
  uint8_t* const bytes = long_bytes_.room(size);
  std::memcpy(bytes, word, size);
  long_bytes_.set_end(bytes + size);
  if (++long_words_ * 2 > long_.size()) grow_long();
  return number;
}

void WordCounter::grow_long() {
  std::vector<uint32_t>(2 * long_.size()).swap(long_);
  const size_t mask = long_.size() - 1;
  for (uint32_t word = 0; word < words_.size(); ++word) {
    const Entry& entry = words_.data()[word];
    if ((entry.key.high & kLong) != kLong) continue;
    size_t at = entry.hash & mask;
    while (long_[at] != 0) at = (at + 1) & mask;
    long_[at] = word + 1;
  }
}

uint32_t WordCounter::add_piece(const uint8_t* word, size_t size, uint64_t count, uint64_t place) {
  if (size > kShortPiece) return add_long(word, size, count, place);
  uint8_t padded[16] = {};
  std::memcpy(padded, word, size);
  const PieceKey key = piece_key(padded, size);
  return add_short(key, kernels_.hash(key), count, place);
}

void WordCounter::add_word(const uint8_t* word, size_t size, uint64_t count, uint64_t place) {
  if (size > 0 && count > 0) add_piece(word, size, count, place);
}

std::string_view WordCounter::bytes_of(const Entry& word) const {
  if ((word.key.high & kLong) == kLong) {
    const uint8_t* const bytes = long_bytes_.data() + word.key.low;
    return {reinterpret_cast<const char*>(bytes), word.key.high & ~kLong};
  }
  return {reinterpret_cast<const char*>(&word.key), word.key.high >> 56};
}

void WordCounter::add(const WordCounter& other) {
  constexpr size_t kAhead = 8;
  for (size_t i = 0; i < other.words_.size(); ++i) {
    if (i + kAhead < other.words_.size()) {
      const uint64_t hash = other.words_.data()[i + kAhead].hash;
      __builtin_prefetch(short_.data() + (hash & (short_.size() - 1)));
    }
    const Entry& word = other.words_.data()[i];
    const uint64_t count = other.counts_.data()[i];
    if ((word.key.high & kLong) == kLong) {
      const std::string_view bytes = other.bytes_of(word);
      add_long(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size(), count, word.place);
    } else {
      add_short(word.key, static_cast<uint32_t>(word.hash), count, word.place);
    }
  }
}

std::vector<WordCounter::Word> WordCounter::words() const {
  const Entry* const entries = words_.data();
  const size_t size = words_.size();
  const auto earlier = [](const Entry& a, const Entry& b) { return a.place < b.place; };
  std::vector<Word> all;
  all.reserve(size);
  if (std::is_sorted(entries, entries + size, earlier)) {
    for (size_t i = 0; i < size; ++i) all.push_back({bytes_of(entries[i]), counts_.data()[i]});
    return all;
  }
  std::vector<std::pair<uint64_t, uint32_t>> order(size);
  for (size_t i = 0; i < size; ++i) order[i] = {entries[i].place, static_cast<uint32_t>(i)};
  std::sort(order.begin(), order.end());
  for (const auto& [place, i] : order) all.push_back({bytes_of(entries[i]), counts_.data()[i]});
  return all;
}

// Texts ---------------------------------------------------------------------------------------

// Three short loops: keys, so that the buckets are on their way to the cache when they are needed;
// words, without a branch on which of three it is; counts, whose addresses are then known early
// enough for one word twice in a row not to stall.
void WordCounter::add_pieces(const uint8_t* text, PieceSpans pieces, uint64_t place) {
  constexpr size_t kBatch = 128;
  alignas(64) PieceKey keys[kBatch];
  uint32_t hashes[kBatch], words[kBatch];
  for (size_t done = 0; done < pieces.count; done += kBatch) {
    const size_t count = std::min(kBatch, pieces.count - done);
    const PieceSpans batch = {pieces.start + done, pieces.end + done, count};
    kernels_.keys(table(), text, batch, keys, hashes);
    for (size_t i = 0;; ++i) {
      i += kernels_.find_words(table(), keys + i, hashes + i, count - i, words + i);
      if (i == count) break;
      // New, in the next bucket, or long.
      const size_t size = static_cast<size_t>(batch.end[i] - batch.start[i]);
      words[i] = size <= kShortPiece ? add_short(keys[i], hashes[i], 0, place + done + i)
                                     : add_long(text + batch.start[i], size, 0, place + done + i);
    }
    uint64_t* const counts = counts_.data();
    for (size_t i = 0; i < count; ++i) ++counts[words[i]];
  }
}

void WordCounter::add_text(const uint8_t* text, size_t n, uint64_t place) {
  split_text(
      kernels_, pattern_, text, n,
      [&](const uint8_t* chunk, const PieceSpans& pieces) {
        add_pieces(chunk, pieces, place);
        place += pieces.count;
      },
      [&](const uint8_t* piece, size_t size) { add_word(piece, size, 1, place++); });
}

namespace {

bool blank(uint8_t c) { return c == ' ' || (c >= 9 && c <= 13); }
bool solid(uint8_t c) { return c > ' ' && c < 0x7F; }

}  // namespace

bool WordCounter::joins_lines(Pattern pattern) {
  return pattern == Pattern::kWords || pattern == Pattern::kGpt2 || pattern == Pattern::kCl100k ||
         pattern == Pattern::kLlama3 || pattern == Pattern::kO200k;
}

// Whether the pieces of joined_ followed by the text are the pieces of both.
bool WordCounter::joins(const uint8_t* text, size_t n) const {
  const size_t size = joined_.size();
  const uint8_t last = joined_.data()[size - 1];
  const bool word_follows = text[0] == ' ' && n > 1 && solid(text[1]);
  switch (pattern_) {
    case Pattern::kWords:
      return blank(last) || blank(text[0]);
    case Pattern::kGpt2:
      // A space before a word begins a piece, whatever whitespace comes before it; a lone line end
      // is one.
      return word_follows ||
             (solid(text[0]) && last == '\n' && (size == 1 || solid(joined_.data()[size - 2])));
    case Pattern::kCl100k:
    case Pattern::kLlama3:
    case Pattern::kO200k:
      // Line ends stay with what comes before them; o200k adds slashes to them.
      return last == '\n' && (word_follows || solid(text[0])) && text[0] != '/';
    default:
      return false;
  }
}

// The whitespace that text[0, n) begins with, as far as it is a piece of GPT-2's pattern whatever
// comes before it is kept apart: all of an empty line, an indentation but for the last space.
// 19,000 of 48,000 lines of English are empty, most lines of code are indented.
inline size_t WordCounter::add_blank_start(const uint8_t* text, size_t n, uint64_t place) {
  if (pattern_ != Pattern::kGpt2 || !blank(text[0])) return 0;
  const bool line_end = n == 1 && text[0] == '\n';
  const size_t spaces = line_end ? 2 : kernels_.leading_spaces(text, n);
  if (!line_end && (spaces < 2 || spaces > kUsualBlanks || spaces == n || !solid(text[spaces]))) {
    return add_unusual_blank(text, n, place);
  }
  uint32_t& usual = usual_blanks_[line_end ? 0 : spaces - 1];
  if (__builtin_expect(usual == 0, 0)) {
    flush();  // what is joined came first
    usual = add_piece(text, spaces - 1, 0, place) + 1;
  }
  ++counts_.data()[usual - 1];
  return spaces - 1;
}

size_t WordCounter::add_unusual_blank(const uint8_t* text, size_t n, uint64_t place) {
  uint8_t padded[16] = {};
  size_t size = 0;
  for (; size < n && size <= kShortPiece && blank(text[size]); ++size) padded[size] = text[size];
  if (size < n) {
    if (size < 2 || text[size - 1] != ' ' || !solid(text[size])) return 0;
    padded[--size] = 0;
  }
  if (size > kShortPiece) return 0;
  const PieceKey key = piece_key(padded, size);
  const uint32_t hash = kernels_.hash(key);
  Blank& known = blanks_[hash % kBlanks];
  if (key.low != known.key.low || key.high != known.key.high) {
    flush();
    known = {key, add_short(key, hash, 0, place)};
  }
  ++counts_.data()[known.word];
  return size;
}

void WordCounter::add_line(const uint8_t* text, size_t n, uint64_t place) {
  constexpr size_t kJoined = 1u << 16;
  if (n == 0) return;
  if (place != joined_end_) flush();
  joined_end_ = place + n;
  const size_t start = add_blank_start(text, n, place);
  text += start;
  n -= start;
  place += start;
  if (n == 0) return;
  const bool alone = n > kLine;
  if (joined_.size() > 0 && (alone || joined_.size() > kJoined || !joins(text, n))) flush();
  if (alone) {
    add_text(text, n, place);
    return;
  }
  if (joined_.size() == 0) joined_place_ = place;
  uint8_t* const end = joined_.room(n + kCopied);
  kernels_.copy_line(text, n, end);
  joined_.set_end(end + n);
}

void WordCounter::flush() {
  add_text(joined_.data(), joined_.size(), joined_place_);
  joined_.set_end(joined_.data());
}

}  // namespace lmfast::bpe
