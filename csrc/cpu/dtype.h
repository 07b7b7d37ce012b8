// Element types of kernels. No torch header.
#pragma once

#include <cstdint>

namespace lmfast {

enum class DType : int { kF64, kF32, kBF16, kF16 };

// Storage only: arithmetic happens after conversion to float (simd.h).
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

}  // namespace lmfast

// Runs BODY with `scalar_t` bound to the storage type of `dtype`.
#define LMFAST_DISPATCH_DTYPE(dtype, scalar_t, ...) \
  switch (dtype) {                                  \
    case DType::kF64: {                             \
      using scalar_t = double;                      \
      __VA_ARGS__;                                  \
      break;                                        \
    }                                               \
    case DType::kF32: {                             \
      using scalar_t = float;                       \
      __VA_ARGS__;                                  \
      break;                                        \
    }                                               \
    case DType::kBF16: {                            \
      using scalar_t = bf16;                        \
      __VA_ARGS__;                                  \
      break;                                        \
    }                                               \
    case DType::kF16: {                             \
      using scalar_t = f16;                         \
      __VA_ARGS__;                                  \
      break;                                        \
    }                                               \
  }
