// lmfast._bpe: binding only. Arguments are checked in lmfast/tokenizer; what is checked here guards
// memory.
#include "bind.h"

#include <string>

#include "kernels.h"
#include "python_text.h"
#include "scanner.h"
#include "split.h"
#include "unicode.h"

namespace py = pybind11;
using namespace lmfast::bpe;

namespace {

void set_classes(const py::bytes& runs) {
  const std::string_view view = runs;
  if (!set_character_classes(reinterpret_cast<const uint8_t*>(view.data()), view.size())) {
    throw py::value_error("the character classes do not cover all code points");
  }
}

const Kernels& named_kernels(const std::string& level) {
  const Kernels* found = kernels_by_name(level.c_str());
  if (found == nullptr) throw py::value_error("this machine does not have the level " + level);
  return *found;
}

// The pieces of a text, by the kernels of a level or, for the level "scalar", by next_piece alone.
py::list pieces(const py::object& text, int pattern, const std::string& level) {
  const bool scalar = level == "scalar";
  const Kernels& own = named_kernels(scalar ? "default" : level);
  PythonText view(text.ptr(), "text", own);
  view.prepare();
  const Pattern by = pattern_of(pattern);
  py::list found;
  const auto append = [&](const uint8_t* piece, size_t size) {
    found.append(py::bytes(reinterpret_cast<const char*>(piece), size));
  };
  if (scalar) {
    for (size_t pos = 0; pos < view.size();) {
      const Piece piece = next_piece(by, view.data(), pos, view.size());
      if (piece.end > piece.start) append(view.data() + piece.start, piece.end - piece.start);
      pos = piece.end;
    }
    return found;
  }
  split_text(
      own, by, view.data(), view.size(),
      [&](const uint8_t* chunk, const PieceSpans& s) {
        for (size_t i = 0; i < s.count; ++i) {
          append(chunk + s.start[i], static_cast<size_t>(s.end[i] - s.start[i]));
        }
      },
      append);
  return found;
}

py::list levels() {
  py::list names;
  for (const char* name : {"default", "avx2", "avx512"}) {
    if (kernels_by_name(name) != nullptr) names.append(name);
  }
  return names;
}

}  // namespace

PYBIND11_MODULE(_bpe, module) {
  module.doc() = "Byte-pair encoding: training, encoding and decoding.";
  module.def("set_character_classes", &set_classes, py::arg("runs"));
  module.def(
      "valid_prefix",
      [](const py::bytes& text) {
        const std::string_view view = text;
        return valid_prefix(reinterpret_cast<const uint8_t*>(view.data()), view.size());
      },
      py::arg("text"));
  module.def("pieces", &pieces, py::arg("text"), py::arg("pattern"), py::arg("level"));
  module.def("level", [] { return kernels().name; });
  module.def("levels", &levels);
  bind_encoder(module);
  bind_decoder(module);
  bind_trainer(module);
}
