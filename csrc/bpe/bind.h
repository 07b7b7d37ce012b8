// The parts of the _bpe module.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "buffer.h"
#include "scanner.h"

namespace lmfast::bpe {

void bind_encoder(pybind11::module_& module);
void bind_decoder(pybind11::module_& module);
void bind_trainer(pybind11::module_& module);

// A pattern by its number; throws where there is none.
inline Pattern pattern_of(int number) {
  if (number < 0 || number >= kPatterns) {
    throw pybind11::value_error("there is no pattern number " + std::to_string(number));
  }
  return static_cast<Pattern>(number);
}

// The ids as an int32 array that owns their memory.
pybind11::array_t<int32_t> to_array(IdBuffer&& ids);

}  // namespace lmfast::bpe
