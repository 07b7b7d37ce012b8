// Matrix products of bf16 pairs summed in float (vdpbf16ps), 16 x 16 numbers at a time, for
// processors with AVX512-BF16. For kernels only.
//
// A tile takes one vector of B and 16 broadcast pairs of A for 16 products, the broadcasts inside
// the product's instruction: 92 % of the peak of two cores of a Zen 4 EPYC (466 GF/s) with both
// operands in L1. A may lie by rows or by columns, and as only 4 bytes of it are read at a time it
// needs no packing beyond rounding; B is packed in panels of 16 columns, [pair][16 words], which
// keeps a panel contiguous: rows of a power of two would meet in a few sets of the cache.
#pragma once

#include "amx.h"

#if defined(__AVX512BF16__)

namespace lmfast::LMFAST_ISA {
namespace {

// Where pair k of row m of A lies: by rows at [m * stride + 4 k] bytes, by columns (rows of pairs
// of k, as B's but wider) at [k * stride + 4 m].
struct DotOperand {
  const char* at;
  int64_t stride;  // bytes
};

LMFAST_INLINE __m512 dot_bf16(__m512 sum, const char* at, __m512i column) {
  int32_t pair;
  memcpy(&pair, at, 4);
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(column),
                          reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair)));
}

// c[16][16] = or += A B over `pairs` pairs; c has rows of c_row floats. What is there is added
// last: it is fetched while the products run.
template <bool kColumns, bool kAdd>
inline __attribute__((noinline)) void dots_bf16(float* c, int64_t c_row, DotOperand a,
                                                const char* b, int64_t pairs) {
  if constexpr (kAdd) {
    for (int i = 0; i < 16; ++i) _mm_prefetch(reinterpret_cast<char*>(c + i * c_row), _MM_HINT_T0);
  }
  __m512 sum[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) sum[i] = _mm512_setzero_ps();
  if constexpr (kColumns) {
#pragma GCC unroll 1
    for (int64_t k = 0; k < pairs; ++k, a.at += a.stride, b += 64) {
      const __m512i column = _mm512_loadu_si512(b);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) sum[i] = dot_bf16(sum[i], a.at + 4 * i, column);
    }
  } else {
    // Four addresses and three multiples of the stride reach 16 rows: all stay in registers.
    const char* rows[4] = {a.at, a.at + 4 * a.stride, a.at + 8 * a.stride, a.at + 12 * a.stride};
    const int64_t next[4] = {0, a.stride, 2 * a.stride, 3 * a.stride};
#pragma GCC unroll 1
    for (int64_t k = 0; k < pairs; ++k, b += 64) {
      const __m512i column = _mm512_loadu_si512(b);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          sum[4 * j + i] = dot_bf16(sum[4 * j + i], rows[j] + next[i], column);
        }
        rows[j] += 4;
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    float* to = c + i * c_row;
    _mm512_storeu_ps(to, kAdd ? _mm512_add_ps(sum[i], _mm512_loadu_ps(to)) : sum[i]);
  }
}

}  // namespace
}  // namespace lmfast::LMFAST_ISA

#endif
