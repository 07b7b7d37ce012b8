// The tile operations of amx.h on AVX-512 with BF16 (vdpbf16ps) for processors without AMX, so that
// one kernel source serves both. For kernels only; amx.h includes this.
//
// Tiles 0 to 3 hold sums and live in 4 KB of the thread; tiles 4 to 7 are operands, of which only
// the address is kept: a kernel must not overwrite them between load and product, and none does. A
// product keeps its 16 sums in registers: 256 vdpbf16ps, 16 loads and 16 stores of sums. Where
// speed matters a kernel calls soft_dots instead, which leaves the loads and stores out between
// steps.
#pragma once

#include "simd.h"

namespace lmfast::LMFAST_ISA {
namespace {

struct SoftTiles {
  alignas(64) float sums[4][16][16];
  const char* operand[4];
  int64_t stride[4];
};
inline thread_local SoftTiles soft_tiles;

struct TileSession {
  TileSession() {}
  ~TileSession() {}
};

template <int kTile>
LMFAST_INLINE void tile_zero() {
  static_assert(kTile < 4);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    _mm512_store_ps(soft_tiles.sums[kTile][i], _mm512_setzero_ps());
  }
}
template <int kTile>
LMFAST_INLINE void tile_load(const void* p, int64_t stride) {
  const char* from = static_cast<const char*>(p);
  if constexpr (kTile >= 4) {
    soft_tiles.operand[kTile - 4] = from;
    soft_tiles.stride[kTile - 4] = stride;
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      _mm512_store_ps(soft_tiles.sums[kTile][i], _mm512_loadu_ps(from + i * stride));
    }
  }
}
template <int kTile>
LMFAST_INLINE void tile_store(void* p, int64_t stride) {
  static_assert(kTile < 4);
  char* to = static_cast<char*>(p);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    _mm512_storeu_ps(to + i * stride, _mm512_load_ps(soft_tiles.sums[kTile][i]));
  }
}

// A sum of 16 x 16 over `steps` products, c with rows of c_row floats: the sums stay in registers
// for all of them. Out of line: 256 products a step are worth a call, and inlined everywhere they
// would be megabytes.
struct SoftOperand {
  const char* at;
  int64_t row, step;  // bytes
};
template <bool kAdd>
inline __attribute__((noinline)) void soft_dots(float* c, int64_t c_row, SoftOperand a,
                                                SoftOperand b, int64_t steps) {
  __m512 sum[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    sum[i] = kAdd ? _mm512_loadu_ps(c + i * c_row) : _mm512_setzero_ps();
  }
  for (int64_t step = 0; step < steps; ++step, a.at += a.step, b.at += b.step) {
    // Four addresses and three multiples of the stride reach 16 rows: all stay in registers.
    const char* rows[4] = {a.at, a.at + 4 * a.row, a.at + 8 * a.row, a.at + 12 * a.row};
    const int64_t next[4] = {0, a.row, 2 * a.row, 3 * a.row};
    const char* columns = b.at;
#pragma GCC unroll 1
    for (int k = 0; k < 16; ++k, columns += b.row) {
      const __m512i pairs = _mm512_loadu_si512(columns);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          int32_t pair;
          memcpy(&pair, rows[j] + next[i], 4);
          sum[4 * j + i] = _mm512_dpbf16_ps(sum[4 * j + i], reinterpret_cast<__m512bh>(pairs),
                                            reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair)));
        }
        rows[j] += 4;
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_storeu_ps(c + i * c_row, sum[i]);
}
template <int kC, int kA, int kB>
LMFAST_INLINE void tile_dot() {
  SoftTiles& t = soft_tiles;
  soft_dots<true>(t.sums[kC][0], 16, {t.operand[kA - 4], t.stride[kA - 4], 0},
                  {t.operand[kB - 4], t.stride[kB - 4], 0}, 1);
}

}  // namespace
}  // namespace lmfast::LMFAST_ISA
