// Learning merges from counted words.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <unordered_map>
#include <vector>

#include "word_counter.h"

namespace lmfast::bpe {

// Among pairs of equal count: the one met first in the corpus, the one with the smallest (left id,
// right id), or the one with the smallest (left, right) strings.
enum class TieBreak : int { kFirst, kIds, kLexicographic };

struct TrainOptions {
  TieBreak tie_break = TieBreak::kFirst;
  size_t new_tokens = 0;    // stop after so many
  uint64_t min_count = 1;   // stop when no pair is as frequent
  uint32_t max_length = 0;  // only tokens of fewer symbols, 0: any; pairs of single symbols always
  uint32_t first_id = 0;    // id of the first new token, for ties
  std::unordered_map<std::string, uint32_t> taken;  // strings that have an id already
  std::function<bool(size_t)> go_on;                // called now and then with the number of merges
};

// The words of a corpus as symbols, one after the other with a boundary around each.
struct TrainCorpus {
  static constexpr uint32_t kBoundary = 0xFFFFFFFFu;
  std::vector<uint32_t> symbols;
  std::vector<uint64_t> weights;     // per word
  std::vector<std::string> strings;  // per symbol
  std::vector<uint32_t> ids;         // per symbol, for ties
};

struct LearnedMerge {
  uint32_t left, right;  // a symbol, or the number of symbols + the index of an earlier merge
  uint64_t count;
};

// Bytes are the symbols, their ids as given.
TrainCorpus byte_corpus(const std::vector<WordCounter::Word>& words,
                        const std::vector<uint32_t>& byte_ids);
// Characters are the symbols, sorted, each word preceded by the marker; ids count from first_id.
TrainCorpus character_corpus(const std::vector<WordCounter::Word>& words, const std::string& marker,
                             uint32_t first_id);

std::vector<LearnedMerge> learn_merges(const TrainCorpus& corpus, const TrainOptions& options,
                                       const Kernels& kernels);

}  // namespace lmfast::bpe
