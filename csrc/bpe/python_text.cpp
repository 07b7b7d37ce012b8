#include "python_text.h"

#include <string>

namespace lmfast::bpe {

namespace py = pybind11;

PythonText::PythonText(PyObject* object, const char* argument) {
  if (PyBytes_Check(object)) {
    data_ = reinterpret_cast<const uint8_t*>(PyBytes_AS_STRING(object));
    size_ = static_cast<size_t>(PyBytes_GET_SIZE(object));
    return;
  }
  if (!PyUnicode_Check(object)) {
    throw py::type_error(std::string(argument) + " must be a str or bytes, got " +
                         Py_TYPE(object)->tp_name);
  }
#if PY_VERSION_HEX < 0x030C0000
  if (PyUnicode_READY(object) < 0) throw py::error_already_set();
#endif
  size_ = static_cast<size_t>(PyUnicode_GET_LENGTH(object));
  if (PyUnicode_IS_COMPACT_ASCII(object)) {
    data_ = static_cast<const uint8_t*>(PyUnicode_DATA(object));
    return;
  }
#if !defined(PYPY_VERSION)
  // Only where it exists: to create it costs 0.75 GB/s and doubles the object.
  const PyCompactUnicodeObject* compact = reinterpret_cast<PyCompactUnicodeObject*>(object);
  if (compact->utf8 != nullptr) {
    data_ = reinterpret_cast<const uint8_t*>(compact->utf8);
    size_ = static_cast<size_t>(compact->utf8_length);
    return;
  }
#endif
  units_ = PyUnicode_DATA(object);
  kind_ = static_cast<int>(PyUnicode_KIND(object));
}

template <class Unit>
void PythonText::convert(const Unit* units, size_t n) {
  // One unit gives at most 2, 3 or 4 bytes.
  own_.reset(new uint8_t[n * (sizeof(Unit) == 1 ? 2 : sizeof(Unit) == 2 ? 3 : 4) + 16]);
  uint8_t* out = own_.get();
  for (size_t i = 0; i < n;) {
    while (i + 8 <= n) {  // eight ASCII units at a time
      Unit any = 0;
      for (int k = 0; k < 8; ++k) any |= units[i + k];
      if (any >= 0x80) break;
      for (int k = 0; k < 8; ++k) out[k] = static_cast<uint8_t>(units[i + k]);
      out += 8;
      i += 8;
    }
    if (i == n) break;
    uint32_t c = units[i++];
    if (c >= 0xD800 && c <= 0xDFFF) {
      const bool pair = c < 0xDC00 && i < n && (units[i] & 0xFFFFFC00u) == 0xDC00;
      c = pair ? 0x10000 + ((c - 0xD800) << 10) + (static_cast<uint32_t>(units[i]) - 0xDC00)
               : 0xFFFD;
      i += pair;
    }
    if (c < 0x80) {
      *out++ = static_cast<uint8_t>(c);
    } else if (c < 0x800) {
      *out++ = static_cast<uint8_t>(0xC0 | c >> 6);
      *out++ = static_cast<uint8_t>(0x80 | (c & 63));
    } else if (c < 0x10000) {
      *out++ = static_cast<uint8_t>(0xE0 | c >> 12);
      *out++ = static_cast<uint8_t>(0x80 | (c >> 6 & 63));
      *out++ = static_cast<uint8_t>(0x80 | (c & 63));
    } else {
      *out++ = static_cast<uint8_t>(0xF0 | c >> 18);
      *out++ = static_cast<uint8_t>(0x80 | (c >> 12 & 63));
      *out++ = static_cast<uint8_t>(0x80 | (c >> 6 & 63));
      *out++ = static_cast<uint8_t>(0x80 | (c & 63));
    }
  }
  data_ = own_.get();
  size_ = static_cast<size_t>(out - own_.get());
}

void PythonText::prepare() {
  if (units_ == nullptr) return;
  if (kind_ == 1) convert(static_cast<const uint8_t*>(units_), size_);
  if (kind_ == 2) convert(static_cast<const uint16_t*>(units_), size_);
  if (kind_ == 4) convert(static_cast<const uint32_t*>(units_), size_);
  units_ = nullptr;
}

}  // namespace lmfast::bpe
