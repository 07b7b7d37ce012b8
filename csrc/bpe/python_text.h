// A Python str or bytes object as UTF-8.
#pragma once
#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#include "kernels.h"

namespace lmfast::bpe {

// Borrows the object's own bytes where it has them (bytes, ASCII, an existing UTF-8 cache), else
// converts: pairs of surrogates are joined and lone ones become U+FFFD.
class PythonText {
 public:
  // Needs the GIL. Throws pybind11::type_error naming the argument.
  PythonText(PyObject* object, const char* argument, const Kernels& level = kernels());

  // Converts if that is still to do; needs no GIL. The object must stay alive.
  void prepare();
  const uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  size_t narrow(const uint8_t*, size_t, uint8_t*) const { return 0; }
  size_t narrow(const uint16_t* units, size_t n, uint8_t* out) const {
    return level_->narrow16(units, n, out);
  }
  size_t narrow(const uint32_t* units, size_t n, uint8_t* out) const {
    return level_->narrow32(units, n, out);
  }
  template <class Unit>
  void convert(const Unit* units, size_t n);

  const Kernels* level_;
  const uint8_t* data_ = nullptr;
  size_t size_ = 0;
  const void* units_ = nullptr;  // not yet converted
  int kind_ = 0;
  std::unique_ptr<uint8_t[]> own_;
};

// A str of UTF-8. Bytes that are not UTF-8 are treated as `errors` says; the Python error is set
// and thrown where it is "strict".
pybind11::object make_str(const uint8_t* text, size_t n, const char* errors);

}  // namespace lmfast::bpe
