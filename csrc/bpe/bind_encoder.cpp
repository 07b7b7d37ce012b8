#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bind.h"
#include "encoder.h"
#include "parallel.h"
#include "python_text.h"

namespace py = pybind11;

namespace lmfast::bpe {
namespace {

using Ids = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;
using SpecialList = std::vector<std::pair<std::string, uint32_t>>;
// Below this many bytes the GIL is kept: giving it up costs more than the work.
constexpr size_t kKeepGil = 1u << 16;

struct GilGuard {
  explicit GilGuard(bool release) {
    if (release) released.reset(new py::gil_scoped_release);
  }
  std::unique_ptr<py::gil_scoped_release> released;
};

class EncoderBinding {
 public:
  EncoderBinding(VocabularyData data, Specials specials, const char* level)
      : specials_(std::move(specials)),
        vocabulary_(std::move(data)),
        kernels_(level == nullptr ? kernels() : *kernels_by_name(level)),
        encoder_(vocabulary_, kernels_) {}
  ~EncoderBinding() {
    for (PyObject* number : numbers_) Py_XDECREF(number);
  }

  // The usual call, with all special tokens, as a plain C function: a document of 700 bytes takes
  // 1.0 us instead of 1.5. It gives NotImplemented for what is not a str.
  static py::object encode_text(const py::object& self) {
    static PyMethodDef method = {"encode_text", &encode_str, METH_O, nullptr};
    py::capsule owner(self.cast<EncoderBinding*>());
    owner.set_name(kCapsule);
    if (PyCapsule_SetContext(owner.ptr(), self.ptr()) != 0) throw py::error_already_set();
    PyCapsule_SetDestructor(owner.ptr(), [](PyObject* capsule) {
      Py_XDECREF(static_cast<PyObject*>(PyCapsule_GetContext(capsule)));
    });
    Py_INCREF(self.ptr());
    PyObject* function = PyCFunction_New(&method, owner.ptr());
    if (function == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(function);
  }

  py::list encode(const py::object& text, const Specials& specials, const py::object& ends) {
    IdBuffer ids;
    run(text, specials, ends, &ids);
    return to_list(ids);
  }

  py::array_t<int32_t> encode_array(const py::object& text, const Specials& specials,
                                    const py::object& ends) {
    IdBuffer ids;
    run(text, specials, ends, &ids);
    return to_array(std::move(ids));
  }

  size_t count(const py::object& text, const Specials& specials) {
    check(specials);
    PythonText view(text.ptr(), "text");
    const GilGuard gil(view.size() >= kKeepGil);
    view.prepare();
    return encoder_.count(view.data(), view.size(), specials);
  }

  // (ids, the state after): the state is what a later part of the same text goes on with.
  py::tuple encode_dropout(const py::object& text, const Specials& specials, const py::object& ends,
                           double probability, uint64_t state) {
    check(specials);
    py::array_t<int64_t, py::array::c_style> given;
    if (!ends.is_none()) given = py::cast<py::array_t<int64_t, py::array::c_style>>(ends);
    const GivenEnds pieces = {given.data(), static_cast<size_t>(given.size())};
    IdBuffer ids;
    Dropout dropout = {probability, state};
    {
      PythonText view(text.ptr(), "text");
      const GilGuard gil(view.size() >= kKeepGil);
      view.prepare();
      encoder_.encode_dropout(view.data(), view.size(), specials,
                              ends.is_none() ? nullptr : &pieces, &dropout, &ids);
    }
    return py::make_tuple(to_list(ids), dropout.state);
  }

  // (all ids, offsets): text i has ids[offsets[i]:offsets[i + 1]].
  py::tuple encode_batch(const py::list& texts, const Specials& specials, int threads) {
    check(specials);
    const size_t n = texts.size();
    std::vector<PythonText> views;
    views.reserve(n);
    for (size_t i = 0; i < n; ++i) views.emplace_back(PyList_GET_ITEM(texts.ptr(), i), "texts");
    py::array_t<int64_t> offsets(static_cast<py::ssize_t>(n + 1));
    int64_t* const at = offsets.mutable_data();
    // Contiguous shares of about equal size, several per thread.
    size_t total = 0;
    for (const PythonText& view : views) total += view.size();
    const size_t shares = threads > 1 ? std::min<size_t>(n, 8 * static_cast<size_t>(threads)) : 1;
    std::vector<size_t> bounds(1, 0);
    size_t seen = 0;
    for (size_t i = 0; i < n; ++i) {
      seen += views[i].size();
      if (bounds.size() < shares && seen * shares >= total * bounds.size()) bounds.push_back(i + 1);
    }
    bounds.push_back(n);
    std::vector<IdBuffer> parts(bounds.size() - 1);
    at[0] = 0;
    {
      py::gil_scoped_release release;
      parallel_for(parts.size(), threads, [&](size_t share) {
        encoder_.encode_many(
            bounds[share], bounds[share + 1],
            [&](size_t i) {
              views[i].prepare();
              return TextView{views[i].data(), views[i].size()};
            },
            specials, at + 1, &parts[share]);
      });
      for (size_t share = 1; share < parts.size(); ++share) {
        const int64_t before = at[bounds[share]];
        for (size_t i = bounds[share]; i < bounds[share + 1]; ++i) at[i + 1] += before;
      }
      for (size_t share = 1; share < parts.size(); ++share) {
        uint32_t* const to = parts[0].room(parts[share].size());
        std::copy(parts[share].data(), parts[share].data() + parts[share].size(), to);
        parts[0].set_end(to + parts[share].size());
      }
    }
    return py::make_tuple(parts.empty() ? py::array_t<int32_t>(0) : to_array(std::move(parts[0])),
                          offsets);
  }

 private:
  static constexpr const char* kCapsule = "lmfast.Encoder";

  static PyObject* encode_str(PyObject* capsule, PyObject* text) {
    if (!PyUnicode_Check(text)) Py_RETURN_NOTIMPLEMENTED;
    auto* const self = static_cast<EncoderBinding*>(PyCapsule_GetPointer(capsule, kCapsule));
    if (self == nullptr) return nullptr;
    try {
      IdBuffer ids;
      self->run(text, self->specials_, &ids);
      return self->to_list(ids).release().ptr();
    } catch (py::error_already_set& error) {
      error.restore();
    } catch (const std::bad_alloc&) {
      PyErr_NoMemory();
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_ValueError, error.what());
    }
    return nullptr;
  }

  // An id has an object in numbers_.
  void check(const Specials& specials) const {
    if (specials.ids_end() > vocabulary_.tokens().size()) {
      throw py::value_error("the special token with the id " +
                            std::to_string(specials.ids_end() - 1) + " is outside the vocabulary");
    }
  }

  void run(PyObject* text, const Specials& specials, IdBuffer* out) {
    check(specials);
    PythonText view(text, "text");
    const GilGuard gil(view.size() >= kKeepGil);
    view.prepare();
    encoder_.encode(view.data(), view.size(), specials, out);
  }

  // With piece boundaries that were found elsewhere, unless `ends` is None.
  void run(const py::object& text, const Specials& specials, const py::object& ends,
           IdBuffer* out) {
    if (ends.is_none()) return run(text.ptr(), specials, out);
    const auto given = py::cast<py::array_t<int64_t, py::array::c_style>>(ends);
    const GivenEnds pieces = {given.data(), static_cast<size_t>(given.size())};
    PythonText view(text.ptr(), "text");
    const GilGuard gil(view.size() >= kKeepGil);
    view.prepare();
    encoder_.encode_given(view.data(), view.size(), pieces, out);
  }

  // One int object per id is made once; a list then costs a reference count per id: 5 to 6 ns
  // instead of the 15 to 25 of PyLong_FromLong.
  py::list to_list(IdBuffer& ids) {
    const size_t n = ids.size();
    const size_t size = vocabulary_.tokens().size();
    numbers_.reserve(size);
    while (numbers_.size() < size) {
      PyObject* number = PyLong_FromSize_t(numbers_.size());
      if (number == nullptr) throw py::error_already_set();
      numbers_.push_back(number);
    }
    PyObject* list = PyList_New(static_cast<Py_ssize_t>(n));
    if (list == nullptr) throw py::error_already_set();
    PyObject* const* const numbers = numbers_.data();
    const uint32_t* const data = ids.data();
    for (size_t i = 0; i < n; ++i) {
      PyObject* number = numbers[data[i]];
      Py_INCREF(number);
      PyList_SET_ITEM(list, static_cast<Py_ssize_t>(i), number);
    }
    return py::reinterpret_steal<py::list>(list);
  }

  const Specials specials_;
  Vocabulary vocabulary_;
  const Kernels& kernels_;
  Encoder encoder_;
  std::vector<PyObject*> numbers_;
};

std::unique_ptr<EncoderBinding> make_encoder(int pattern, bool characters, bool whole_piece,
                                             int64_t marker, int64_t unk, const py::list& tokens,
                                             const Ids& symbols, const Ids& merges,
                                             const Specials& specials, const py::object& level) {
  VocabularyData data;
  data.pattern = pattern_of(pattern);
  data.characters = characters;
  data.whole_piece = whole_piece;
  data.marker = marker < 0 ? kNoId : static_cast<uint32_t>(marker);
  data.unk = unk < 0 ? kNoId : static_cast<uint32_t>(unk);
  data.tokens.reserve(tokens.size());
  for (const py::handle token : tokens) data.tokens.push_back(py::cast<std::string>(token));
  data.symbols.assign(symbols.data(), symbols.data() + symbols.size());
  if (merges.ndim() != 2 || merges.shape(1) != 4) {
    throw py::value_error("merges must have the shape (n, 4)");
  }
  const int32_t* m = merges.data();
  data.merges.resize(static_cast<size_t>(merges.shape(0)));
  for (Merge& merge : data.merges) {
    merge = {static_cast<uint32_t>(m[0]), static_cast<uint32_t>(m[1]), static_cast<uint32_t>(m[2]),
             static_cast<uint32_t>(m[3])};
    m += 4;
  }
  const std::string name = level.is_none() ? "" : py::cast<std::string>(level);
  if (!name.empty() && kernels_by_name(name.c_str()) == nullptr) {
    throw py::value_error("this machine does not have the level " + name);
  }
  return std::make_unique<EncoderBinding>(std::move(data), specials,
                                          name.empty() ? nullptr : name.c_str());
}

Specials make_specials(const SpecialList& tokens) {
  for (const auto& token : tokens) {
    if (token.first.empty()) throw py::value_error("a special token must not be empty");
    if (token.second > 0x7FFFFFFF) throw py::value_error("the id of a special token is too large");
  }
  return Specials(tokens);
}

}  // namespace

py::array_t<int32_t> to_array(IdBuffer&& ids) {
  const py::ssize_t n = static_cast<py::ssize_t>(ids.size());
  if (n < 1 << 12) {
    py::array_t<int32_t> small(n);
    if (n > 0)
      std::copy(ids.data(), ids.data() + n, reinterpret_cast<uint32_t*>(small.mutable_data()));
    return small;
  }
  ids.trim();
  IdBuffer* owner = new IdBuffer(std::move(ids));
  const py::capsule release(owner, [](void* p) { delete static_cast<IdBuffer*>(p); });
  return py::array_t<int32_t>({n}, {sizeof(int32_t)}, reinterpret_cast<int32_t*>(owner->data()),
                              release);
}

void bind_encoder(py::module_& module) {
  py::class_<Specials>(module, "Specials").def(py::init(&make_specials), py::arg("tokens"));
  py::class_<EncoderBinding>(module, "Encoder")
      .def(py::init(&make_encoder), py::arg("pattern"), py::arg("characters"),
           py::arg("whole_piece"), py::arg("marker"), py::arg("unk"), py::arg("tokens"),
           py::arg("symbols"), py::arg("merges"), py::arg("specials"),
           py::arg("level") = py::none())
      .def_property_readonly("encode_text", &EncoderBinding::encode_text)
      .def("encode", &EncoderBinding::encode, py::arg("text"), py::arg("specials"),
           py::arg("ends") = py::none())
      .def("encode_array", &EncoderBinding::encode_array, py::arg("text"), py::arg("specials"),
           py::arg("ends") = py::none())
      .def("count", &EncoderBinding::count, py::arg("text"), py::arg("specials"))
      .def("encode_dropout", &EncoderBinding::encode_dropout, py::arg("text"), py::arg("specials"),
           py::arg("ends"), py::arg("dropout"), py::arg("state"))
      .def("encode_batch", &EncoderBinding::encode_batch, py::arg("texts"), py::arg("specials"),
           py::arg("threads"));
}

}  // namespace lmfast::bpe
