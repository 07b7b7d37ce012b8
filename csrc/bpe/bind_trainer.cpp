#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "bind.h"
#include "parallel.h"
#include "python_text.h"
#include "trainer.h"

namespace py = pybind11;

namespace lmfast::bpe {
namespace {

using Clock = std::chrono::steady_clock;

// Lets Ctrl-C through while the GIL is released. Only the thread that made it may call check().
class Interrupts {
 public:
  void check() {
    const Clock::time_point now = Clock::now();
    if (now < next_) return;
    next_ = now + kPause;
    const py::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }

 private:
  static constexpr Clock::duration kPause = std::chrono::milliseconds(20);
  Clock::time_point next_ = Clock::now() + kPause;
};

// Where a piece ends whatever follows, at `from` or later: in every named pattern a letter or digit
// ends one when a space or a line feed follows. n where there is no such place.
size_t next_cut(Pattern pattern, const uint8_t* text, size_t from, size_t n) {
  if (pattern == Pattern::kNone) return n;
  for (size_t at = from; at + 1 < n; ++at) {
    const uint8_t c = text[at], next = text[at + 1];
    if (pattern == Pattern::kLines) {
      if (c == '\n') return at + 1;
      continue;
    }
    const uint8_t lower = c | 0x20;
    const bool solid = (lower >= 'a' && lower <= 'z') || (c >= '0' && c <= '9');
    if (solid && (next == ' ' || next == '\n')) return at + 1;
  }
  return n;
}

struct Text {
  const uint8_t* data;
  size_t size;
};

// References to the items [first, first + most) of a list as far as they are texts, so that other
// threads may change the list. Needs the GIL, but for prepare().
//
// Strings lie anywhere in memory, so they are fetched ahead. With this instead of slices of the
// list, and usual indentations counted directly, 442,000 lines of code take 7 ms more than the same
// text in one piece instead of 23.
class Texts {
 public:
  Texts(const py::list& list, size_t first, size_t most) {
    constexpr size_t kAhead = 32;
    const size_t size = list.size();
    const size_t last = first < size ? first + std::min(size - first, most) : first;
    items_.reserve(last - first);
    views_.resize(last - first);
    PyObject** const items = PySequence_Fast_ITEMS(list.ptr());
    Text* view = views_.data();
    for (size_t i = first; i < last; ++i, ++view) {
      PyObject* const later = items[std::min(i + kAhead, last - 1)];
      __builtin_prefetch(later, 1);
      __builtin_prefetch(reinterpret_cast<const char*>(later) + 64);
      PyObject* const item = items[i];
      if (PyUnicode_Check(item) && PyUnicode_IS_COMPACT_ASCII(item)) {
        view->data = static_cast<const uint8_t*>(PyUnicode_DATA(item));
        view->size = static_cast<size_t>(PyUnicode_GET_LENGTH(item));
      } else if (PyUnicode_Check(item) || PyBytes_Check(item)) {
        PythonText text(item, "corpus");
        *view = {text.data(), text.size()};
        if (text.data() == nullptr) converted_.push_back(std::move(text));
      } else {
        break;
      }
      Py_INCREF(item);
      items_.push_back(item);
    }
    views_.resize(items_.size());
  }
  ~Texts() {
    for (PyObject* item : items_) Py_DECREF(item);
  }
  Texts(const Texts&) = delete;
  Texts& operator=(const Texts&) = delete;

  size_t size() const { return items_.size(); }
  const std::vector<Text>& prepare() {
    size_t next = 0;
    for (Text& view : views_) {
      if (next == converted_.size()) break;
      if (view.data != nullptr) continue;
      converted_[next].prepare();
      view = {converted_[next].data(), converted_[next].size()};
      ++next;
    }
    return views_;
  }

 private:
  std::vector<PyObject*> items_;
  std::vector<Text> views_;
  std::vector<PythonText> converted_;
};

class Counter {
 public:
  explicit Counter(int pattern) : pattern_(pattern_of(pattern)), counter_(pattern_, kernels()) {}

  // Splits and counts the texts of a list from `first` on, up to the first item that is none, and
  // returns where that is. Each thread has a counter of its own for as long as this object lives;
  // words know where they were first seen, so that the sum of the counters does not depend on who
  // counted what.
  size_t add_texts(const py::list& texts, int threads, size_t first) {
    // One thread finds in its cache what was just looked at; several need enough for all.
    const size_t most = threads > 1 ? size_t{1} << 16 : size_t{1} << 12;
    Interrupts interrupts;
    for (;;) {
      if (threads == 1) first = add_lines(texts, first, &interrupts);
      Texts some(texts, first, most);
      add(some, threads, &interrupts);
      first += some.size();
      if (some.size() < most) return first;
    }
  }

  void add_words(const std::vector<std::string>& words, const std::vector<uint64_t>& counts) {
    if (words.size() != counts.size()) throw py::value_error("words and counts differ in number");
    for (size_t i = 0; i < words.size(); ++i) {
      counter_.add_word(reinterpret_cast<const uint8_t*>(words[i].data()), words[i].size(),
                        counts[i], place_++);
    }
  }

  // [(word, count)] by first appearance.
  py::list items() {
    py::list list;
    for (const WordCounter::Word& word : counter().words()) {
      list.append(py::make_tuple(py::bytes(word.bytes.data(), word.bytes.size()), word.count));
    }
    return list;
  }

  size_t size() { return counter().size(); }

  const WordCounter& counter() {
    for (const auto& part : parts_) counter_.add(*part);
    parts_.clear();
    return counter_;
  }

 private:
  // Below kLeastShared, threads take longer to start than to count. Up to kMostWhole each thread
  // takes one share, so that the sum of two counters is in order at once.
  static constexpr size_t kLeastShared = 1u << 19, kMostWhole = 8u << 20, kShare = 1u << 20;

  // Bytes from `begin` of text `first` to `end` of text `last`.
  struct Share {
    size_t first, begin, last, end;
    uint64_t place;
  };

  void add(Texts& texts, int threads, Interrupts* interrupts) {
    const py::gil_scoped_release release;
    const std::vector<Text>& views = texts.prepare();
    size_t total = 0;
    for (const Text& view : views) total += view.size;
    const std::vector<Share> shares = share_out(views, total, threads);
    threads =
        std::max(1, std::min(threads, static_cast<int>(std::min<size_t>(shares.size(), 1024))));
    while (parts_.size() + 1 < static_cast<size_t>(threads)) {
      parts_.push_back(std::make_unique<WordCounter>(pattern_, kernels()));
    }
    std::vector<WordCounter*> idle;
    for (const auto& part : parts_) idle.push_back(part.get());
    idle.push_back(&counter_);  // the first share: what the others add comes later, as a rule
    std::mutex guard;
    const auto caller = std::this_thread::get_id();
    parallel_for(shares.size(), threads, [&](size_t i) {
      WordCounter* counter = nullptr;
      {
        const std::lock_guard<std::mutex> lock(guard);
        counter = idle.back();
        idle.pop_back();
      }
      count(shares[i], views, counter);
      {
        const std::lock_guard<std::mutex> lock(guard);
        idle.push_back(counter);
      }
      if (std::this_thread::get_id() == caller) interrupts->check();
    });
    place_ += total;
  }

  // One thread copies short ASCII strings under the GIL and lets go of it to count what it copied:
  // holding and dropping each would write to every one (442,000 lines of code: 2 ms of 49 for a
  // whole training). Lines that cannot be joined are counted where they are met, and the GIL is let
  // go of after kLines of them. Returns where other items begin.
  size_t add_lines(const py::list& list, size_t first, Interrupts* interrupts) {
    constexpr size_t kAhead = 32, kFull = 1u << 14, kLines = 1u << 12;
    if (!WordCounter::joins_lines(pattern_)) return first;
    PyObject** items = PySequence_Fast_ITEMS(list.ptr());
    size_t held = 0;
    for (size_t size = list.size(); first < size; ++first) {
      PyObject* const later = items[std::min(first + kAhead, size - 1)];
      __builtin_prefetch(later);
      __builtin_prefetch(reinterpret_cast<const char*>(later) + 64);
      PyObject* const item = items[first];
      if (!PyUnicode_Check(item) || !PyUnicode_IS_COMPACT_ASCII(item)) break;
      const size_t n = static_cast<size_t>(PyUnicode_GET_LENGTH(item));
      if (n > WordCounter::kLine) break;
      counter_.add_line(static_cast<const uint8_t*>(PyUnicode_DATA(item)), n, place_);
      place_ += n;
      if (counter_.joined() < kFull && ++held < kLines) continue;
      held = 0;
      {
        const py::gil_scoped_release release;
        counter_.flush();
        interrupts->check();
      }
      items = PySequence_Fast_ITEMS(list.ptr());
      size = list.size();
    }
    const py::gil_scoped_release release;
    counter_.flush();
    return first;
  }

  std::vector<Share> share_out(const std::vector<Text>& texts, size_t total, int threads) const {
    const size_t whole =
        std::max(total / static_cast<size_t>(std::max(threads, 1)) + 1, kLeastShared);
    const size_t each = whole <= kMostWhole ? whole : kShare;
    std::vector<Share> shares;
    Share open = {0, 0, 0, 0, place_};
    uint64_t place = place_;
    size_t filled = 0;
    for (size_t i = 0; i < texts.size(); ++i) {
      for (size_t at = 0; at < texts[i].size;) {
        const size_t wanted = each - filled;
        const size_t end = texts[i].size - at < wanted
                               ? texts[i].size
                               : next_cut(pattern_, texts[i].data, at + wanted - 1, texts[i].size);
        filled += end - at;
        place += end - at;
        at = end;
        open.last = i;
        open.end = end;
        if (filled < each) continue;
        shares.push_back(open);
        open = {i, end, i, end, place};
        filled = 0;
      }
    }
    if (filled > 0) shares.push_back(open);
    return shares;
  }

  static void count(const Share& share, const std::vector<Text>& texts, WordCounter* counter) {
    uint64_t place = share.place;
    for (size_t i = share.first; i <= share.last; ++i) {
      const size_t begin = i == share.first ? share.begin : 0;
      const size_t end = i == share.last ? share.end : texts[i].size;
      counter->add_line(texts[i].data + begin, end - begin, place);
      place += end - begin;
    }
    counter->flush();
  }

  Pattern pattern_;
  WordCounter counter_;
  std::vector<std::unique_ptr<WordCounter>> parts_;  // of the other threads
  uint64_t place_ = 0;
};

// The symbols, then what each merge makes of two earlier entries.
py::list texts_of(const std::vector<std::string>& symbols,
                  const std::vector<LearnedMerge>& merges) {
  py::list texts(symbols.size() + merges.size());
  PyObject* const list = texts.ptr();
  const auto add = [list](size_t i, const char* bytes, Py_ssize_t size) {
    PyObject* const text = PyBytes_FromStringAndSize(bytes, size);
    if (text == nullptr) throw py::error_already_set();
    PyList_SET_ITEM(list, static_cast<Py_ssize_t>(i), text);
    return PyBytes_AS_STRING(text);
  };
  for (size_t i = 0; i < symbols.size(); ++i) {
    add(i, symbols[i].data(), static_cast<Py_ssize_t>(symbols[i].size()));
  }
  for (size_t i = 0; i < merges.size(); ++i) {
    PyObject* const left = PyList_GET_ITEM(list, static_cast<Py_ssize_t>(merges[i].left));
    PyObject* const right = PyList_GET_ITEM(list, static_cast<Py_ssize_t>(merges[i].right));
    const Py_ssize_t middle = PyBytes_GET_SIZE(left), more = PyBytes_GET_SIZE(right);
    char* const bytes = add(symbols.size() + i, nullptr, middle + more);
    std::memcpy(bytes, PyBytes_AS_STRING(left), static_cast<size_t>(middle));
    std::memcpy(bytes + middle, PyBytes_AS_STRING(right), static_cast<size_t>(more));
  }
  return texts;
}

// Returns (symbols as bytes, merges as an (n, 2) array, counts): a merge's entry below the number
// of symbols is a symbol, any other the product of an earlier merge.
py::tuple learn(Counter& counter, const py::object& byte_ids, const std::string& marker,
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
  if (tie_break < 0 || tie_break > static_cast<int>(TieBreak::kLexicographic)) {
    throw py::value_error("there is no tie break number " + std::to_string(tie_break));
  }
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
    merges = learn_merges(corpus, options, kernels());
  }
  py::array_t<int64_t> pairs({static_cast<py::ssize_t>(merges.size()), py::ssize_t{2}});
  py::array_t<int64_t> counts(static_cast<py::ssize_t>(merges.size()));
  int64_t* pair = pairs.mutable_data();
  int64_t* count = counts.mutable_data();
  for (const LearnedMerge& merge : merges) {
    *pair++ = merge.left;
    *pair++ = merge.right;
    *count++ = static_cast<int64_t>(merge.count);
  }
  return py::make_tuple(texts_of(corpus.strings, merges), pairs, counts);
}

}  // namespace

void bind_trainer(py::module_& module) {
  py::class_<Counter>(module, "Counter")
      .def(py::init<int>(), py::arg("pattern"))
      .def("add_texts", &Counter::add_texts, py::arg("texts"), py::arg("threads"),
           py::arg("first") = 0)
      .def("add_words", &Counter::add_words, py::arg("words"), py::arg("counts"))
      .def("items", &Counter::items)
      .def("__len__", &Counter::size);
  module.def("learn", &learn, py::arg("counter"), py::arg("byte_ids"), py::arg("marker"),
             py::arg("first_symbol_id"), py::arg("tie_break"), py::arg("vocabulary_left"),
             py::arg("min_frequency"), py::arg("max_token_length"), py::arg("first_new_id"),
             py::arg("taken"), py::arg("progress"));
}

}  // namespace lmfast::bpe
