// The immutable tables of one tokenizer: what encoding and decoding read.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "rank_table.h"
#include "scanner.h"

namespace lmfast::bpe {

constexpr uint32_t kNoId = 0xFFFFFFFFu;

struct Merge {
  uint32_t left, right, id, rank;
};

struct VocabularyData {
  Pattern pattern = Pattern::kNone;
  bool characters = false;   // symbols are code points of words, not bytes
  bool whole_piece = false;  // a piece that is a token is that token, whatever the merges say
  uint32_t marker = kNoId;   // id put before each word (characters mode)
  uint32_t unk = kNoId;      // id of a character outside the alphabet (characters mode)
  std::vector<std::string> tokens;  // id -> bytes; an unused id and a special token are empty
  std::vector<uint32_t> symbols;    // 256 byte ids, or code point, id, code point, id, ...
  std::vector<Merge> merges;        // ascending by rank
};

class Vocabulary {
 public:
  // Throws std::invalid_argument naming the entry that is inconsistent.
  explicit Vocabulary(VocabularyData data);

  Pattern pattern() const { return data_.pattern; }
  bool characters() const { return data_.characters; }
  const std::vector<std::string>& tokens() const { return data_.tokens; }
  const RankTable& ranks() const { return ranks_; }
  uint32_t rank(uint32_t left, uint32_t right) const { return find_rank(ranks_, left, right); }
  // The id that a merge of this rank gives.
  uint32_t id_of_rank(uint32_t rank) const { return ranks_.id(rank); }
  size_t rank_count() const { return id_of_rank_.size(); }
  // Every merge ranks after those that make its parts: then ranks can be worked off in order.
  bool ordered() const { return ordered_; }

  // What is put before each word; empty in the bytes mode.
  const std::string& marker() const { return marker_; }
  // The initial symbol of a byte (bytes mode).
  uint32_t symbol(uint8_t byte) const { return data_.symbols[byte]; }

  // Most symbols a piece of `size` bytes can have.
  static size_t max_symbols(size_t size) { return size + 1; }
  // Writes the initial symbols of a piece, returns how many.
  size_t initial_symbols(const uint8_t* piece, size_t size, uint32_t* out) const;
  // The id of a piece that is one token by itself (whole_piece only), or kNoId.
  uint32_t whole_piece_id(const uint8_t* piece, size_t size) const;

 private:
  uint32_t character_id(uint32_t code) const;
  void set_characters();
  void set_bytes();
  void set_merges();
  // False when the pair is already there.
  bool insert(uint32_t left, uint32_t right, uint32_t rank);

  VocabularyData data_;
  std::string marker_;
  std::vector<uint64_t> slots_;  // of ranks_, which begins on a cache line
  RankTable ranks_ = {};
  std::vector<uint32_t> id_of_rank_;
  bool ordered_ = true;
  std::vector<uint32_t> byte_pairs_;
  std::vector<uint32_t> low_characters_;  // code points below 0x3000, direct
  std::unordered_map<uint32_t, uint32_t> high_characters_;
  std::unordered_map<std::string, uint32_t> whole_;
};

}  // namespace lmfast::bpe
