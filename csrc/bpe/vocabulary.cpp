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

Vocabulary::Vocabulary(VocabularyData data) : data_(std::move(data)), pairs_(data_.merges.size()) {
  const size_t size = data_.tokens.size();
  require(size < kMaxIds,
          "the vocabulary has " + std::to_string(size) + " ids, at most 2097151 are possible");
  if (data_.characters) {
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
  } else {
    require(data_.symbols.size() == 256, "the bytes mode needs 256 byte ids");
    for (size_t b = 0; b < 256; ++b) {
      require(data_.symbols[b] < size,
              "byte " + std::to_string(b) + " has no id inside the vocabulary");
    }
  }
  std::vector<uint32_t> made_at(size, 0);  // 1 + the last rank that makes the token
  uint32_t previous = kNoRank;
  for (size_t i = 0; i < data_.merges.size(); ++i) {
    const Merge& m = data_.merges[i];
    require(m.left < size && m.right < size && m.id < size,
            entry(i, m) + " has an id outside the vocabulary of " + std::to_string(size));
    require(previous == kNoRank || m.rank >= previous, entry(i, m) + " is out of rank order");
    if (m.rank != previous) id_of_rank_.push_back(m.id);
    previous = m.rank;
    require(id_of_rank_.back() == m.id, entry(i, m) + " shares its rank with another token");
    require(id_of_rank_.size() < kMaxRanks, "the vocabulary has too many merges");
    const uint32_t rank = static_cast<uint32_t>(id_of_rank_.size() - 1);
    require(pairs_.insert(m.left, m.right, rank), entry(i, m) + " repeats an earlier pair");
    made_at[m.id] = rank + 1;
  }
  for (const Merge& m : data_.merges) {
    const uint32_t rank = pairs_.find(m.left, m.right);
    if (made_at[m.left] > rank || made_at[m.right] > rank) ordered_ = false;
  }
  linear_ = true;
  for (size_t r = 0; r < id_of_rank_.size(); ++r) {
    if (id_of_rank_[r] != id_of_rank_[0] + r) linear_ = false;
  }
  linear_base_ = id_of_rank_.empty() ? 0 : id_of_rank_[0];
  if (data_.whole_piece) {
    for (size_t id = 0; id < size; ++id) {
      if (!data_.tokens[id].empty()) whole_.emplace(data_.tokens[id], static_cast<uint32_t>(id));
    }
  }
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
