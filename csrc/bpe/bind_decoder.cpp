#include <algorithm>
#include <string>
#include <vector>

#include "bind.h"
#include "decoder.h"
#include "python_text.h"

namespace py = pybind11;

namespace lmfast::bpe {
namespace {

using Bytes = Buffer<uint8_t>;

class DecoderBinding {
 public:
  DecoderBinding(const std::vector<std::string>& bytes, const std::vector<bool>& unknown)
      : decoder_(checked(bytes, unknown), unknown) {}

  // Index of the first id without a meaning, or -1.
  int64_t first_unknown(const py::object& ids) const {
    std::vector<uint32_t> own;
    const View view = read(ids, &own);
    const size_t at = decoder_.first_unknown(view.ids, view.size);
    return at == view.size ? -1 : static_cast<int64_t>(at);
  }

  py::object decode_bytes(const py::object& ids) const {
    const Bytes text = bytes_of(ids);
    return py::bytes(reinterpret_cast<const char*>(text.data()), text.size());
  }

  py::object decode(const py::object& ids, const char* errors) const {
    const Bytes text = bytes_of(ids);
    return make_str(text.data(), text.size(), errors);
  }

 private:
  static const std::vector<std::string>& checked(const std::vector<std::string>& bytes,
                                                 const std::vector<bool>& unknown) {
    if (bytes.size() != unknown.size()) {
      throw py::value_error("bytes and unknown differ in number");
    }
    return bytes;
  }

  struct View {
    const uint32_t* ids;
    size_t size;
  };

  // A list of int, or a one-dimensional contiguous array of int32 or uint32.
  View read(const py::object& ids, std::vector<uint32_t>* own) const {
    if (PyList_Check(ids.ptr())) {
      const size_t n = static_cast<size_t>(PyList_GET_SIZE(ids.ptr()));
      own->resize(n);
      for (size_t i = 0; i < n; ++i) {
        PyObject* const item = PyList_GET_ITEM(ids.ptr(), static_cast<Py_ssize_t>(i));
        int overflow = 0;
        const long value = PyLong_AsLongAndOverflow(item, &overflow);
        if (value == -1 && PyErr_Occurred()) {
          PyErr_Clear();
          throw py::type_error("ids[" + std::to_string(i) + "] must be an int, got " +
                               Py_TYPE(item)->tp_name);
        }
        const bool outside = overflow != 0 || value < 0 || value > 0x7FFFFFFF;
        (*own)[i] = outside ? 0xFFFFFFFFu : static_cast<uint32_t>(value);
      }
      return {own->data(), n};
    }
    const py::array array = py::cast<py::array>(ids);
    if (array.ndim() != 1 || array.itemsize() != 4 || !(array.flags() & py::array::c_style)) {
      throw py::value_error("ids must be a one-dimensional contiguous array of 32-bit integers");
    }
    return {static_cast<const uint32_t*>(array.data()), static_cast<size_t>(array.size())};
  }

  Bytes bytes_of(const py::object& ids) const {
    std::vector<uint32_t> own;
    const View view = read(ids, &own);
    const size_t at = decoder_.first_unknown(view.ids, view.size);
    if (at != view.size) {
      const std::string value =
          PyList_Check(ids.ptr())
              ? std::string(py::str(PyList_GET_ITEM(ids.ptr(), static_cast<Py_ssize_t>(at))))
              : std::to_string(static_cast<int32_t>(view.ids[at]));
      throw py::value_error("ids[" + std::to_string(at) + "] is " + value +
                            ", which is not in the vocabulary");
    }
    Bytes out;
    constexpr size_t kBlock = 256;
    for (size_t i = 0; i < view.size; i += kBlock) {
      const size_t n = std::min(kBlock, view.size - i);
      uint8_t* const to = out.room(decoder_.room(n));
      char* const end = decoder_.decode(view.ids + i, n, reinterpret_cast<char*>(to));
      out.set_end(reinterpret_cast<uint8_t*>(end));
    }
    return out;
  }

  Decoder decoder_;
};

}  // namespace

void bind_decoder(py::module_& module) {
  py::class_<DecoderBinding>(module, "Decoder")
      .def(py::init<const std::vector<std::string>&, const std::vector<bool>&>(), py::arg("bytes"),
           py::arg("unknown"))
      .def("first_unknown", &DecoderBinding::first_unknown, py::arg("ids"))
      .def("decode_bytes", &DecoderBinding::decode_bytes, py::arg("ids"))
      .def("decode", &DecoderBinding::decode, py::arg("ids"), py::arg("errors"));
}

}  // namespace lmfast::bpe
