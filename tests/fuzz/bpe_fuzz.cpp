// Fuzz target of the tokenizer engine: any bytes into every scanner, a vocabulary made of them, the
// encoder at every level, the trainer and the decoder. Aborts where two ways to the same answer
// differ; the sanitizers find the rest.
//
// With libFuzzer: clang++ -fsanitize=fuzzer,address,undefined; without, link driver.cpp, which
// takes the same arguments. LMFAST_FUZZ_CLASSES names a file with the character classes in the form
// that set_character_classes takes.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "decoder.h"
#include "encoder.h"
#include "split.h"
#include "trainer.h"
#include "unicode.h"

using namespace lmfast::bpe;

namespace {

const char* const kLevels[] = {"default", "avx2", "avx512"};

void require(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "bpe_fuzz: %s\n", what);
  std::abort();
}

// Reads numbers off the front of the input; zeros when it is used up.
struct Input {
  const uint8_t* data;
  size_t size;
  uint32_t number(uint32_t below) {
    uint32_t value = 0;
    for (int i = 0; i < 2 && size > 0; ++i, ++data, --size) value = value << 8 | *data;
    return below == 0 ? 0 : value % below;
  }
};

std::vector<std::string> pieces_of(const Kernels& kernels, Pattern pattern, const uint8_t* text,
                                   size_t n) {
  std::vector<std::string> found;
  const auto one = [&](const uint8_t* piece, size_t size) {
    found.emplace_back(reinterpret_cast<const char*>(piece), size);
  };
  split_text(
      kernels, pattern, text, n,
      [&](const uint8_t* chunk, const PieceSpans& spans) {
        for (size_t i = 0; i < spans.count; ++i) {
          one(chunk + spans.start[i], static_cast<size_t>(spans.end[i] - spans.start[i]));
        }
      },
      one);
  return found;
}

void check_scanners(Pattern pattern, const uint8_t* text, size_t n) {
  std::vector<std::string> expected;
  for (size_t pos = 0; pos < n;) {
    const Piece piece = next_piece(pattern, text, pos, n);
    require(piece.end > pos && piece.end <= n, "next_piece does not advance");
    if (piece.end > piece.start) {
      expected.emplace_back(reinterpret_cast<const char*>(text + piece.start),
                            piece.end - piece.start);
    }
    pos = piece.end;
  }
  for (const char* level : kLevels) {
    const Kernels* kernels = kernels_by_name(level);
    if (kernels != nullptr) {
      require(pieces_of(*kernels, pattern, text, n) == expected, "a level splits differently");
    }
  }
}

// A vocabulary of bytes and of merges that the input chooses, sensible or not.
VocabularyData random_vocabulary(Input* input, Pattern pattern, bool sensible) {
  VocabularyData data;
  data.pattern = pattern;
  data.whole_piece = input->number(2) == 1;
  for (int b = 0; b < 256; ++b) {
    data.tokens.push_back(std::string(1, static_cast<char>(b)));
    data.symbols.push_back(static_cast<uint32_t>(b));
  }
  const uint32_t merges = input->number(40);
  std::set<std::pair<uint32_t, uint32_t>> used;
  for (uint32_t rank = 0; rank < merges; ++rank) {
    const uint32_t size = static_cast<uint32_t>(data.tokens.size());
    const uint32_t left = input->number(size), right = input->number(size);
    const std::string token = data.tokens[left] + data.tokens[right];
    if (sensible) {
      if (token.size() > 64 || !used.insert({left, right}).second) continue;
      data.tokens.push_back(token);
      data.merges.push_back({left, right, size, rank});
    } else {
      data.merges.push_back({left, right, input->number(size + 2), input->number(50)});
    }
  }
  return data;
}

// What the rule says, in quadratic time: the lowest rank, the leftmost of it, until none is left.
std::vector<uint32_t> plain_merge(const VocabularyData& data, const std::string& piece) {
  std::map<std::pair<uint32_t, uint32_t>, Merge> merges;
  for (const Merge& merge : data.merges) merges[{merge.left, merge.right}] = merge;
  if (data.whole_piece) {
    const auto whole = std::find(data.tokens.begin(), data.tokens.end(), piece);
    if (whole != data.tokens.end()) {
      return {static_cast<uint32_t>(whole - data.tokens.begin())};
    }
  }
  std::vector<uint32_t> ids;
  for (const char c : piece) ids.push_back(data.symbols[static_cast<uint8_t>(c)]);
  for (;;) {
    const Merge* best = nullptr;
    size_t at = 0;
    for (size_t i = 0; i + 1 < ids.size(); ++i) {
      const auto found = merges.find({ids[i], ids[i + 1]});
      if (found == merges.end() || (best != nullptr && found->second.rank >= best->rank)) continue;
      best = &found->second;
      at = i;
    }
    if (best == nullptr) return ids;
    ids[at] = best->id;
    ids.erase(ids.begin() + static_cast<std::ptrdiff_t>(at) + 1);
  }
}

std::vector<uint32_t> ids_of(const IdBuffer& ids) { return {ids.data(), ids.data() + ids.size()}; }

void check_encoding(const VocabularyData& data, const uint8_t* text, size_t n) {
  const Vocabulary vocabulary(data);
  const Decoder decoder(data.tokens, std::vector<bool>(data.tokens.size(), false));
  const Specials specials({{"<s>", 0}, {"ab<", 1}});
  std::vector<uint32_t> expected;
  const std::vector<std::string> pieces = pieces_of(kernels(), data.pattern, text, n);
  const bool small = std::all_of(pieces.begin(), pieces.end(),
                                 [](const std::string& piece) { return piece.size() <= 500; });
  for (const std::string& piece : pieces) {
    if (!small) break;
    const std::vector<uint32_t> ids = plain_merge(data, piece);
    expected.insert(expected.end(), ids.begin(), ids.end());
  }
  for (const char* level : kLevels) {
    const Kernels* kernels = kernels_by_name(level);
    if (kernels == nullptr) continue;
    Encoder encoder(vocabulary, *kernels);
    for (int pass = 0; pass < 2; ++pass) {
      IdBuffer ids, rest;
      encoder.encode(text, n, Specials({}), &ids);
      encoder.encode(text, n, specials, &rest);
      if (expected.empty() && !small) expected = ids_of(ids);
      require(ids_of(ids) == expected, "a level or a warm cache encodes differently");
      require(encoder.count(text, n, specials) == rest.size(), "the count is not that of the ids");
    }
    IdBuffer ids;
    Dropout never = {0.0, 1};
    encoder.encode_dropout(text, n, Specials({}), nullptr, &never, &ids);
    require(data.whole_piece || ids_of(ids) == expected, "no dropout encodes differently");
  }
  require(decoder.first_unknown(expected.data(), expected.size()) == expected.size(),
          "encoding gave an unknown id");
  std::vector<char> bytes(decoder.room(expected.size()) + 1);
  const char* end = decoder.decode(expected.data(), expected.size(), bytes.data());
  require(std::string(static_cast<const char*>(bytes.data()), end) ==
              std::string(reinterpret_cast<const char*>(text), n),
          "decoding does not give the text back");
}

// Counters of the lines, split among two in any order, add up to the counter of all lines.
void check_counting(Pattern pattern, const Kernels& kernels, Input input) {
  WordCounter alone(pattern, kernels), first(pattern, kernels), second(pattern, kernels);
  for (size_t pos = 0; pos < input.size;) {
    const size_t size = std::min<size_t>(1 + input.data[pos] % 40, input.size - pos);
    WordCounter& other = input.data[pos] % 3 == 0 ? first : second;
    alone.add_text(input.data + pos, size, pos);
    other.add_line(input.data + pos, size, pos);
    pos += size;
  }
  first.flush();
  second.flush();
  first.add(second);
  const std::vector<WordCounter::Word> one = alone.words(), sum = first.words();
  require(one.size() == sum.size() && first.size() == sum.size(), "words get lost in a sum");
  for (size_t i = 0; i < one.size(); ++i) {
    require(one[i].bytes == sum[i].bytes && one[i].count == sum[i].count, "a sum differs");
  }
}

// The same merges at every level, with counts that never grow.
void check_training(Pattern pattern, Input* input) {
  TrainOptions options;
  options.tie_break = static_cast<TieBreak>(input->number(3));
  options.new_tokens = input->number(30);
  options.max_length = input->number(6);
  options.min_count = input->number(3);
  const bool characters = pattern == Pattern::kWords;
  std::vector<LearnedMerge> expected;
  for (const char* level : kLevels) {
    const Kernels* kernels = kernels_by_name(level);
    if (kernels == nullptr) continue;
    WordCounter counter(pattern, *kernels);
    counter.add_text(input->data, input->size, 0);
    check_counting(pattern, *kernels, *input);
    std::vector<uint32_t> ids(256);
    for (uint32_t b = 0; b < 256; ++b) ids[b] = b;
    const TrainCorpus corpus =
        characters ? character_corpus(counter.words(), "_", 0) : byte_corpus(counter.words(), ids);
    const std::vector<LearnedMerge> merges = learn_merges(corpus, options, *kernels);
    if (expected.empty()) expected = merges;
    require(merges.size() == expected.size(), "a level trains differently");
    for (size_t i = 0; i < merges.size(); ++i) {
      require(merges[i].left == expected[i].left && merges[i].right == expected[i].right,
              "a level learns another merge");
      require(i == 0 || merges[i].count <= merges[i - 1].count, "counts grow");
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  const char* const path = std::getenv("LMFAST_FUZZ_CLASSES");
  require(path != nullptr, "LMFAST_FUZZ_CLASSES is not set");
  std::ifstream file(path, std::ios::binary);
  const std::string classes((std::istreambuf_iterator<char>(file)), {});
  require(set_character_classes(reinterpret_cast<const uint8_t*>(classes.data()), classes.size()),
          "the character classes are damaged");
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input = {data, size};
  const uint32_t what = input.number(4);
  const Pattern pattern = static_cast<Pattern>(input.number(8));
  const bool lossless = pattern != Pattern::kWords && pattern != Pattern::kLines;
  if (what == 0) check_scanners(pattern, input.data, input.size);
  if (what == 1 && lossless) {
    const VocabularyData vocabulary = random_vocabulary(&input, pattern, true);
    check_encoding(vocabulary, input.data, input.size);
  }
  if (what == 2) check_training(pattern, &input);
  if (what == 3) {
    try {
      const Vocabulary vocabulary(random_vocabulary(&input, pattern, false));
      Encoder encoder(vocabulary, kernels());
      IdBuffer ids;
      encoder.encode(input.data, input.size, Specials({}), &ids);
    } catch (const std::invalid_argument&) {
      // What a damaged file should lead to.
    }
  }
  return 0;
}
