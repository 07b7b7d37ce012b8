// What bindings need from torch, and the only header besides bindings that sees it: the stable ABI
// (TORCH_TARGET_VERSION), so one binary serves torch 2.11 and later.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>

#include "../cpu/dtype.h"
#include "../cpu/rows.h"

namespace lmfast {

using torch::stable::Tensor;

// A RuntimeError for Python. STD_TORCH_CHECK would begin it with a file and a line of ours.
template <class... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void raise_error(const Parts&... parts) {
  std::ostringstream message;
  (message << "lmfast: " << ... << parts);
  throw std::runtime_error(message.str());
}

// Guards memory safety. What a user can get wrong is checked in Python, with better words.
#define LMFAST_CHECK(condition, ...)                      \
  do {                                                    \
    if (!(condition)) ::lmfast::raise_error(__VA_ARGS__); \
  } while (false)

// The kernel type of a floating-point tensor; raises for any other.
DType dtype_of(const Tensor& t, const char* name);

// Raises unless `t` is on the CPU with unit stride in its last dimension.
void check_rows(const Tensor& t, const char* name);

// Raises unless both have the same sizes.
void check_same_shape(const Tensor& a, const Tensor& b, const char* name_a, const char* name_b);

// The leading dimensions of operands of one shape, merged where all of them allow it. A null
// pointer takes the first operand's strides. Raises when more than kMaxRowDims remain.
RowLayout row_layout(std::initializer_list<const Tensor*> operands);

// Smallest range worth a thread, for work of `elements` elements per item: about 32 k elements.
int64_t grain_size(int64_t elements);

}  // namespace lmfast
