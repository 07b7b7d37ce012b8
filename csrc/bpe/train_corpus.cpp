#include <cstring>
#include <stdexcept>

#include "trainer.h"
#include "unicode.h"

namespace lmfast::bpe {
namespace {

constexpr uint32_t kReplacement = 0xFFFD;
constexpr size_t kBlock = 16;  // bytes that can be read of every word

std::string to_utf8(uint32_t c) {
  std::string out;
  if (c < 0x80) {
    out += static_cast<char>(c);
  } else if (c < 0x800) {
    out += static_cast<char>(0xC0 | c >> 6);
    out += static_cast<char>(0x80 | (c & 63));
  } else if (c < 0x10000) {
    out += static_cast<char>(0xE0 | c >> 12);
    out += static_cast<char>(0x80 | (c >> 6 & 63));
    out += static_cast<char>(0x80 | (c & 63));
  } else {
    out += static_cast<char>(0xF0 | c >> 18);
    out += static_cast<char>(0x80 | (c >> 12 & 63));
    out += static_cast<char>(0x80 | (c >> 6 & 63));
    out += static_cast<char>(0x80 | (c & 63));
  }
  return out;
}

template <class Use>
void for_each_character(std::string_view text, Use use) {
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(text.data());
  for (size_t pos = 0; pos < text.size();) {
    const Char c = decode_char(bytes, pos, text.size());
    use(c.valid ? c.code : kReplacement);
    pos += c.length;
  }
}

// Room for every symbol and boundary, and how many they are; positions are 32-bit.
size_t reserve(TrainCorpus* corpus, const std::vector<WordCounter::Word>& words, size_t marker) {
  size_t total = 1;
  for (const auto& word : words) total += word.bytes.size() + marker + 1;
  if (total >= 0xFFFFFFF0u)
    throw std::length_error("the distinct words have more than 4 G symbols");
  corpus->symbols.reserve(total + kBlock);
  corpus->symbols.push_back(TrainCorpus::kBoundary);
  corpus->weights.reserve(words.size());
  return total;
}

}  // namespace

TrainCorpus byte_corpus(const std::vector<WordCounter::Word>& words,
                        const std::vector<uint32_t>& byte_ids) {
  TrainCorpus corpus;
  const size_t total = reserve(&corpus, words, 0);
  corpus.symbols.resize(total + kBlock);
  uint32_t* symbol = corpus.symbols.data() + 1;
  for (const auto& word : words) {
    // Most words fit one block; how long they are is not predictable.
    const uint8_t* const bytes = reinterpret_cast<const uint8_t*>(word.bytes.data());
    const size_t size = word.bytes.size();
    uint8_t block[kBlock];
    std::memcpy(block, bytes, kBlock);
    for (size_t i = 0; i < kBlock; ++i) symbol[i] = block[i];
    for (size_t i = kBlock; i < size; ++i) symbol[i] = bytes[i];
    symbol[size] = TrainCorpus::kBoundary;
    symbol += size + 1;
    corpus.weights.push_back(word.count);
  }
  corpus.symbols.resize(total);
  for (int b = 0; b < 256; ++b) corpus.strings.push_back(std::string(1, static_cast<char>(b)));
  corpus.ids = byte_ids;
  return corpus;
}

TrainCorpus character_corpus(const std::vector<WordCounter::Word>& words, const std::string& marker,
                             uint32_t first_id) {
  TrainCorpus corpus;
  reserve(&corpus, words, marker.size());
  std::vector<uint32_t> symbol_of(kCodePoints, 0);
  const auto mark = [&](uint32_t code) { symbol_of[code] = 1; };
  for_each_character(marker, mark);
  for (const auto& word : words) for_each_character(word.bytes, mark);
  for (uint32_t code = 0; code < kCodePoints; ++code) {
    if (symbol_of[code] == 0) continue;
    symbol_of[code] = static_cast<uint32_t>(corpus.strings.size());
    corpus.ids.push_back(first_id + symbol_of[code]);
    corpus.strings.push_back(to_utf8(code));
  }
  const auto append = [&](uint32_t code) { corpus.symbols.push_back(symbol_of[code]); };
  for (const auto& word : words) {
    for_each_character(marker, append);
    for_each_character(word.bytes, append);
    corpus.symbols.push_back(TrainCorpus::kBoundary);
    corpus.weights.push_back(word.count);
  }
  return corpus;
}

}  // namespace lmfast::bpe
