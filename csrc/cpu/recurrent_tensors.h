// Tensors of the recurrent bindings as the pointers their kernels take.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstring>
#include <initializer_list>
#include <optional>
#include <vector>

#include "scratch.h"

namespace lmfast {

// A contiguous float32 CPU tensor of this shape.
inline const float* floats(const Tensor& t, const char* name,
                           std::initializer_list<int64_t> shape) {
  LMFAST_CHECK(t.is_cpu() && dtype_of(t, name) == DType::kF32 && t.is_contiguous(), name,
               " must be a contiguous float32 CPU tensor");
  bool fits = t.dim() == static_cast<int64_t>(shape.size());
  int64_t d = 0;
  for (int64_t size : shape) {
    fits = fits && t.size(d) == size;
    ++d;
  }
  LMFAST_CHECK(fits, name, " has a wrong shape");
  return static_cast<const float*>(t.const_data_ptr());
}

inline const float* floats(const std::optional<Tensor>& t, const char* name,
                           std::initializer_list<int64_t> shape) {
  return t.has_value() ? floats(*t, name, shape) : nullptr;
}

// An uninitialised float32 CPU tensor. 0.2 us; new_empty looks its operator up by name, 0.8 us.
inline Tensor empty_floats(const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(1, shape[d]);
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(),
                                                  strides.data(), aoti_torch_dtype_float32(),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline float* writable(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

}  // namespace lmfast
