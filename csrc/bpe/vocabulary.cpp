#include "vocabulary.h"

#include <stdexcept>

#include "unicode.h"

namespace lmfast::bpe {
namespace {

constexpr uint32_t kLowCharacters = 0x3000;

void require(bool ok, const std::string& text) {
  if (!ok) throw std::invalid_argument(text);
}

std::string entry(size_t index, const Merge& m) {
  return "merge " + std::to_string(index) + " (" + std::to_string(m.left) + ", " +
         std::to_string(m.right) + " -> " + std::to_string(m.id) + ")";
}

}  // namespace

Vocabulary::Vocabulary(VocabularyData data) : data_(std::move(data)) {
  const size_t size = data_.tokens.size();
  require(size < kMaxIds,
          "the vocabulary has " + std::to_string(size) + " ids, at most 2097151 are possible");
  if (data_.characters) {
    set_characters();
  } else {
    require(data_.symbols.size() == 256, "the bytes mode needs 256 byte ids");
    for (size_t b = 0; b < 256; ++b) {
      require(data_.symbols[b] < size,
              "byte " + std::to_string(b) + " has no id inside the vocabulary");
    }
  }
  set_merges();
  if (!data_.characters) set_bytes();
  if (data_.whole_piece) {
    for (size_t id = 0; id < size; ++id) {
      if (!data_.tokens[id].empty()) whole_.emplace(data_.tokens[id], static_cast<uint32_t>(id));
    }
  }
}

void Vocabulary::set_characters() {
  const size_t size = data_.tokens.size();
  low_characters_.assign(kLowCharacters, data_.unk);
  require(data_.symbols.size() % 2 == 0, "symbols must be pairs of code point and id");
  for (size_t i = 0; i < data_.symbols.size(); i += 2) {
    const uint32_t code = data_.symbols[i], id = data_.symbols[i + 1];
    require(id < size, "character " + std::to_string(code) + " has id " + std::to_string(id) +
                           ", outside the vocabulary");
    if (code < kLowCharacters) {
      low_characters_[code] = id;
    } else {
      high_characters_[code] = id;
    }
  }
  require(data_.unk < size, "the characters mode needs an id for unknown characters");
  require(data_.marker < size, "the characters mode needs the id of the word marker");
  marker_ = data_.tokens[data_.marker];
}

void Vocabulary::set_merges() {
  const size_t size = data_.tokens.size();
  size_t lines = 1;
  while (lines * kLineSlots < 2 * data_.merges.size() + 2) lines *= 2;
  slots_.assign((lines + 1) * kLineSlots, kEmptySlot);
  const uintptr_t begin = reinterpret_cast<uintptr_t>(slots_.data());
  const size_t skip = (64 - begin % 64) % 64 / sizeof(uint64_t);
  ranks_.slots = slots_.data() + skip;
  ranks_.line_mask = lines - 1;

  std::vector<uint32_t> made_at(size, 0);  // 1 + the last rank that makes the token
  uint32_t previous = kNoRank;
  for (size_t i = 0; i < data_.merges.size(); ++i) {
    const Merge& m = data_.merges[i];
    const auto check = [&](bool ok, const char* problem) {
      if (!ok) throw std::invalid_argument(entry(i, m) + problem);
    };
    check(m.left < size && m.right < size && m.id < size, " has an id outside the vocabulary");
    check(previous == kNoRank || m.rank >= previous, " is out of rank order");
    if (m.rank != previous) id_of_rank_.push_back(m.id);
    previous = m.rank;
    check(id_of_rank_.back() == m.id, " shares its rank with another token");
    check(id_of_rank_.size() < kMaxRanks, " is one too many");
    const uint32_t rank = static_cast<uint32_t>(id_of_rank_.size() - 1);
    check(insert(m.left, m.right, rank), " repeats an earlier pair");
    made_at[m.id] = rank + 1;
  }
  for (const Merge& m : data_.merges) {
    const uint32_t rank = find_rank(ranks_, m.left, m.right);
    if (made_at[m.left] > rank || made_at[m.right] > rank) ordered_ = false;
  }
  bool linear = true;
  for (size_t r = 0; r < id_of_rank_.size(); ++r) {
    if (id_of_rank_[r] != id_of_rank_[0] + r) linear = false;
  }
  ranks_.id_of_rank = linear ? nullptr : id_of_rank_.data();
  ranks_.first_id = id_of_rank_.empty() ? 0 : id_of_rank_[0];
}

bool Vocabulary::insert(uint32_t left, uint32_t right, uint32_t rank) {
  const uint64_t key = pair_key(left, right);
  uint64_t* const slots = slots_.data() + (ranks_.slots - slots_.data());
  for (size_t line = line_of(ranks_, key);; line = (line + 1) & ranks_.line_mask) {
    for (size_t i = line * kLineSlots; i < (line + 1) * kLineSlots; ++i) {
      if (slots[i] >> 22 == key) return false;
      if (slots[i] != kEmptySlot) continue;
      slots[i] = key << 22 | rank;
      return true;
    }
  }
}

void Vocabulary::set_bytes() {
  byte_pairs_.resize(1u << 16);
  for (uint32_t pair = 0; pair < byte_pairs_.size(); ++pair) {
    const uint32_t found = rank(data_.symbols[pair >> 8], data_.symbols[pair & 255]);
    byte_pairs_[pair] = found == kNoRank ? kNoRank : found << 6;
  }
  ranks_.byte_symbols = data_.symbols.data();
  ranks_.byte_pairs = byte_pairs_.data();
}

uint32_t Vocabulary::character_id(uint32_t code) const {
  if (code < kLowCharacters) return low_characters_[code];
  const auto found = high_characters_.find(code);
  return found == high_characters_.end() ? data_.unk : found->second;
}

size_t Vocabulary::initial_symbols(const uint8_t* piece, size_t size, uint32_t* out) const {
  if (!data_.characters) {
    for (size_t i = 0; i < size; ++i) out[i] = data_.symbols[piece[i]];
    return size;
  }
  size_t count = 0;
  out[count++] = data_.marker;
  for (size_t pos = 0; pos < size;) {
    const Char c = decode_char(piece, pos, size);
    out[count++] = c.valid ? character_id(c.code) : data_.unk;
    pos += c.length;
  }
  return count;
}

uint32_t Vocabulary::whole_piece_id(const uint8_t* piece, size_t size) const {
  if (!data_.whole_piece) return kNoId;
  const auto found = whole_.find(std::string(reinterpret_cast<const char*>(piece), size));
  return found == whole_.end() ? kNoId : found->second;
}

}  // namespace lmfast::bpe
