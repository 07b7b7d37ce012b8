// The instructions of AMX in software, for tests: compiled with -DLMFAST_EMULATE_AMX the kernels of
// the amx level, packing and all, run on any processor with AVX512-BF16, under sanitizers too,
// which do not see what tile instructions read and write. What a processor answers with a fault
// ends the process with a message. Subnormal numbers are kept, which a processor takes for zeros.
// Not made for speed, as tiles_avx512.h is.
//
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, LDTILECFG to
// TDPBF16PS.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "simd.h"

namespace lmfast::LMFAST_ISA {

struct EmulatedTiles {
  alignas(64) uint8_t data[8][16][64];
  int rows[8], bytes[8];
  bool live = false;
};
inline thread_local EmulatedTiles emulated_tiles;

namespace {

inline void amx_fault(bool fault, const char* what) {
  if (!fault) return;
  std::fprintf(stderr, "lmfast: emulated AMX: %s\n", what);
  std::abort();
}

// `config` is the 64 bytes that ldtilecfg reads.
inline void load_tile_config(const void* config) {
  uint8_t b[64];
  std::memcpy(b, config, 64);
  amx_fault(b[0] != 1, "ldtilecfg: the palette is not 1");
  for (int i = 2; i < 16; ++i) amx_fault(b[i] != 0, "ldtilecfg: a reserved byte is not 0");
  EmulatedTiles& t = emulated_tiles;
  for (int i = 0; i < 16; ++i) {
    const int bytes = b[16 + 2 * i] | (b[17 + 2 * i] << 8), rows = b[48 + i];
    amx_fault(bytes > 64 || rows > 16, "ldtilecfg: a tile of more than 16 rows of 64 bytes");
    amx_fault((bytes == 0) != (rows == 0), "ldtilecfg: rows without bytes, or bytes without rows");
    if (i >= 8) {
      amx_fault(bytes != 0, "ldtilecfg: more than eight tiles");
      continue;
    }
    t.bytes[i] = bytes;
    t.rows[i] = rows;
  }
  std::memset(t.data, 0, sizeof t.data);
  t.live = true;
}
inline void release_tiles() { emulated_tiles.live = false; }

inline void need_tile(int tile) {
  amx_fault(!emulated_tiles.live, "a tile is used outside a TileSession");
  amx_fault(emulated_tiles.rows[tile] == 0, "a tile is used that is not configured");
}

template <int kTile>
inline void tile_zero() {
  need_tile(kTile);
  std::memset(emulated_tiles.data[kTile], 0, 1024);
}
template <int kTile>
inline void tile_load(const void* p, int64_t stride) {
  tile_zero<kTile>();
  EmulatedTiles& t = emulated_tiles;
  const char* from = static_cast<const char*>(p);
  for (int i = 0; i < t.rows[kTile]; ++i) {
    std::memcpy(t.data[kTile][i], from + i * stride, static_cast<size_t>(t.bytes[kTile]));
  }
}
template <int kTile>
inline void tile_store(void* p, int64_t stride) {
  need_tile(kTile);
  const EmulatedTiles& t = emulated_tiles;
  char* to = static_cast<char*>(p);
  for (int i = 0; i < t.rows[kTile]; ++i) {
    std::memcpy(to + i * stride, t.data[kTile][i], static_cast<size_t>(t.bytes[kTile]));
  }
}
template <int kC, int kA, int kB>
inline void tile_dot() {
  need_tile(kC), need_tile(kA), need_tile(kB);
  static_assert(kC != kA && kC != kB && kA != kB, "three different tiles, or the processor faults");
  EmulatedTiles& t = emulated_tiles;
  amx_fault(t.rows[kC] != t.rows[kA] || t.bytes[kC] != t.bytes[kB] || t.bytes[kA] != 4 * t.rows[kB],
            "tdpbf16ps: tiles that do not fit");
  // Even and odd k in sums of their own, which reach C at the end.
  const __m512i odd_half = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (int m = 0; m < t.rows[kC]; ++m) {
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    for (int k = 0; k < t.rows[kB]; ++k) {
      int32_t pair;
      std::memcpy(&pair, t.data[kA][m] + 4 * k, 4);
      const __m512i a = _mm512_set1_epi32(pair), b = _mm512_load_si512(t.data[kB][k]);
      even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)),
                             _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), even);
      odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a, odd_half)),
                            _mm512_castsi512_ps(_mm512_and_si512(b, odd_half)), odd);
    }
    const __m512 c = _mm512_load_ps(t.data[kC][m]);
    _mm512_store_ps(t.data[kC][m], _mm512_add_ps(c, _mm512_add_ps(even, odd)));
  }
}

}  // namespace
}  // namespace lmfast::LMFAST_ISA
