// One kernel name, one copy per instruction-set level, one choice at run time. No torch header.
//
// Every kernel has the signature void name(const Args&, int64_t begin, int64_t end) and works on
// the half-open range [begin, end) of whatever its binding splits over threads (rows, heads, ...).
// LMFAST_DECLARE_KERNEL(name, Args), in kernels/<op>.h, declares the copies; kernels/<op>.cpp is
// compiled once per level with LMFAST_ISA naming the namespace; kernel_name() picks the copy.
#pragma once

#include <cstdint>

#include "features.h"

#if defined(__x86_64__)
#define LMFAST_DECLARE_KERNEL(name, Args)                                               \
  namespace isa_default {                                                               \
  void name(const Args&, int64_t, int64_t);                                             \
  }                                                                                     \
  namespace isa_avx2 {                                                                  \
  void name(const Args&, int64_t, int64_t);                                             \
  }                                                                                     \
  namespace isa_avx512 {                                                                \
  void name(const Args&, int64_t, int64_t);                                             \
  }                                                                                     \
  namespace isa_amx {                                                                   \
  void name(const Args&, int64_t, int64_t);                                             \
  }                                                                                     \
  using name##_fn = void (*)(const Args&, int64_t, int64_t);                            \
  inline name##_fn name##_kernel() {                                                    \
    constexpr name##_fn table[] = {isa_default::name, isa_avx2::name, isa_avx512::name, \
                                   isa_amx::name};                                      \
    return table[static_cast<int>(current_isa())];                                      \
  }
#else
#define LMFAST_DECLARE_KERNEL(name, Args)                    \
  namespace isa_default {                                    \
  void name(const Args&, int64_t, int64_t);                  \
  }                                                          \
  using name##_fn = void (*)(const Args&, int64_t, int64_t); \
  inline name##_fn name##_kernel() { return isa_default::name; }
#endif
