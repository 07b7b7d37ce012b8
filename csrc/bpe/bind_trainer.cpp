#include <memory>
#include <string>
#include <vector>

#include "bind.h"
#include "parallel.h"
#include "python_text.h"
#include "trainer.h"

namespace py = pybind11;

namespace lmfast::bpe {
namespace {

class Counter {
 public:
  explicit Counter(int pattern)
      : pattern_(static_cast<Pattern>(pattern)), counter_(pattern_, kernels()) {}

  // Splits and counts the texts of a list. The result does not depend on the number of threads:
  // each counts a contiguous share, and the shares are added up in order.
  void add_texts(const py::list& texts, int threads) {
    std::vector<PythonText> views;
    views.reserve(texts.size());
    size_t total = 0;
    for (const py::handle text : texts) {
      views.emplace_back(text.ptr(), "corpus");
      total += views.back().size();
    }
    py::gil_scoped_release release;
    if (threads <= 1 || total < kLeastShared) {
      for (PythonText& view : views) count(&view, &counter_);
      counter_.flush();
      return;
    }
    const size_t shares = static_cast<size_t>(threads);
    std::vector<WordCounter> parts(shares, WordCounter(pattern_, kernels()));
    std::vector<size_t> bounds(1, 0);
    size_t seen = 0;
    for (size_t i = 0; i < views.size(); ++i) {
      seen += views[i].size();
      if (bounds.size() < shares && seen * shares >= total * bounds.size()) bounds.push_back(i + 1);
    }
    bounds.resize(shares + 1, views.size());
    bounds.back() = views.size();
    parallel_for(shares, threads, [&](size_t share) {
      for (size_t i = bounds[share]; i < bounds[share + 1]; ++i) count(&views[i], &parts[share]);
      parts[share].flush();
    });
    for (const WordCounter& part : parts) counter_.add(part);
  }

  void add_words(const std::vector<std::string>& words, const std::vector<uint64_t>& counts) {
    if (words.size() != counts.size()) throw py::value_error("words and counts differ in number");
    for (size_t i = 0; i < words.size(); ++i) {
      counter_.add_word(reinterpret_cast<const uint8_t*>(words[i].data()), words[i].size(),
                        counts[i]);
    }
  }

  // [(word, count)] by first appearance.
  py::list items() const {
    py::list list;
    for (const WordCounter::Word& word : counter_.words()) {
      list.append(py::make_tuple(py::bytes(word.bytes.data(), word.bytes.size()), word.count));
    }
    return list;
  }

  size_t size() const { return counter_.size(); }
  const WordCounter& counter() const { return counter_; }

 private:
  static constexpr size_t kLeastShared = 2u << 20;

  static void count(PythonText* view, WordCounter* counter) {
    PythonText text = std::move(*view);
    text.prepare();
    counter->add_line(text.data(), text.size());
  }

  Pattern pattern_;
  WordCounter counter_;
};

// Returns (symbols as bytes, merges as an (n, 2) array, counts): a merge's entry below the number
// of symbols is a symbol, any other the product of an earlier merge.
py::tuple learn(const Counter& counter, const py::object& byte_ids, const std::string& marker,
                uint32_t first_symbol_id, int tie_break, size_t vocabulary_left,
                uint64_t min_frequency, uint32_t max_token_length, int64_t first_new_id,
                const std::unordered_map<std::string, uint32_t>& taken,
                const py::object& progress) {
  const std::vector<WordCounter::Word> words = counter.counter().words();
  TrainCorpus corpus;
  std::vector<LearnedMerge> merges;
  const bool characters = byte_ids.is_none();
  std::vector<uint32_t> ids;
  if (!characters) ids = py::cast<std::vector<uint32_t>>(byte_ids);
  if (!characters && ids.size() != 256) throw py::value_error("byte_ids must have 256 entries");
  {
    py::gil_scoped_release release;
    corpus =
        characters ? character_corpus(words, marker, first_symbol_id) : byte_corpus(words, ids);
    TrainOptions options;
    options.tie_break = static_cast<TieBreak>(tie_break);
    const size_t symbols = characters ? corpus.strings.size() : 0;
    options.new_tokens = vocabulary_left > symbols ? vocabulary_left - symbols : 0;
    options.min_count = min_frequency;
    options.max_length = max_token_length;
    options.first_id = first_new_id >= 0
                           ? static_cast<uint32_t>(first_new_id)
                           : first_symbol_id + static_cast<uint32_t>(corpus.strings.size());
    options.taken = taken;
    options.go_on = [&progress](size_t done) {
      py::gil_scoped_acquire acquire;
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      if (!progress.is_none()) progress(done);
      return true;
    };
    merges = learn_merges(corpus, options);
  }
  py::array_t<int64_t> pairs({static_cast<py::ssize_t>(merges.size()), py::ssize_t{2}});
  py::array_t<int64_t> counts(static_cast<py::ssize_t>(merges.size()));
  int64_t* pair = pairs.mutable_data();
  int64_t* count = counts.mutable_data();
  std::vector<std::string>& strings = corpus.strings;
  for (const LearnedMerge& merge : merges) {
    strings.push_back(strings[merge.left] + strings[merge.right]);
    *pair++ = merge.left;
    *pair++ = merge.right;
    *count++ = static_cast<int64_t>(merge.count);
  }
  py::list texts(strings.size());
  for (size_t i = 0; i < strings.size(); ++i) {
    PyList_SET_ITEM(texts.ptr(), static_cast<Py_ssize_t>(i), py::bytes(strings[i]).release().ptr());
  }
  return py::make_tuple(texts, pairs, counts);
}

}  // namespace

void bind_trainer(py::module_& module) {
  py::class_<Counter>(module, "Counter")
      .def(py::init<int>(), py::arg("pattern"))
      .def("add_texts", &Counter::add_texts, py::arg("texts"), py::arg("threads"))
      .def("add_words", &Counter::add_words, py::arg("words"), py::arg("counts"))
      .def("items", &Counter::items)
      .def("__len__", &Counter::size);
  module.def("learn", &learn, py::arg("counter"), py::arg("byte_ids"), py::arg("marker"),
             py::arg("first_symbol_id"), py::arg("tie_break"), py::arg("vocabulary_left"),
             py::arg("min_frequency"), py::arg("max_token_length"), py::arg("first_new_id"),
             py::arg("taken"), py::arg("progress"));
}

}  // namespace lmfast::bpe
