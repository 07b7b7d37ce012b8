// lmfast._bpe: binding only. Arguments are checked in lmfast/tokenizer; what is checked here guards
// memory.
#include "bind.h"

#include <string>

#include "kernels.h"
#include "python_text.h"
#include "scanner.h"
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

// The (start, end) byte offsets of the pieces of a text, by the scalar scanner.
py::list pieces(const py::object& text, int pattern) {
  PythonText view(text.ptr(), "text");
  view.prepare();
  py::list spans;
  for (size_t pos = 0; pos < view.size();) {
    const Piece piece = next_piece(static_cast<Pattern>(pattern), view.data(), pos, view.size());
    if (piece.end > piece.start) spans.append(py::make_tuple(piece.start, piece.end));
    pos = piece.end;
  }
  return spans;
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
  module.def("pieces", &pieces, py::arg("text"), py::arg("pattern"));
  module.def("level", [] { return kernels().name; });
  module.def("levels", &levels);
  bind_encoder(module);
  bind_decoder(module);
  bind_trainer(module);
}
