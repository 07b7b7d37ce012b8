// The two products of linear_cross_entropy on AMX tiles, for one chunk of stream rows and one group
// of 64 lanes. The pass over tokens has tokens as lanes and streams the vocabulary, the pass over
// classes the other way round; both are this code.
//
//   S = rows . lanes          16 x 64 at a time, stored to 4 KB that alternate
//   P = exp(S + add)          two rows become one VNNI row of bf16, no transposition
//   acc += rows^T . P         [column of weight or hidden][lane], fp32
//
// Exponentials of one block of S are interleaved with the products of the next, so that half of
// their time is hidden. With kParts = 3 every factor is the exact sum of three bf16 numbers, and
// the six products of the larger parts are added: fp32's accuracy, at six times the tile products
// and still a third of the time of fp32 multiply-adds.
#pragma once

#include "../amx.h"
#include "../simd_exp.h"
#include "linear_cross_entropy_amx.h"

#if defined(LMFAST_AMX)

namespace lmfast::LMFAST_ISA {
namespace {

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kGone = -1e30f;  // a logit without weight

// What turns logits into the exponent of the exp in use: that of base 2 where P is rounded to bf16.
template <int kParts>
constexpr float exponent_unit() {
  return kParts == 1 ? kLog2e : 1.0f;
}

// A packed chunk: rows as A tiles in place, their transpose as A tiles, and what is added.
struct StreamChunk {
  const char* rows;     // [part][row][row_bytes]
  const char* columns;  // [row / 32][out tile][part] tiles
  const float* add;     // [row], in exponent units
  int64_t count;        // rows, a multiple of 32
};

struct Group {
  const char* lanes;  // [depth / 32][part][4] tiles
  const float* add;   // [64], in exponent units
  float* sums;        // [64]
  float* acc;         // [out_tiles * 16][64]
};

// Targets: places of S that are left out of P, by row of the chunk and lane.
struct Holes {
  int64_t count;
  int32_t row[kLceMaxChunk], lane[kLceMaxChunk];
};

enum class Mode { kSum, kPlain, kMax };

// The pairs of parts whose products are worth adding, smallest first.
template <int kParts>
struct Pairs {
  static constexpr int kCount = 1;
  static constexpr int a[] = {0}, b[] = {0};
};
template <>
struct Pairs<3> {
  static constexpr int kCount = 6;
  static constexpr int a[] = {1, 2, 0, 1, 0, 0}, b[] = {1, 0, 2, 0, 1, 0};
};

// C0..C3 += A . (B0..B3).
LMFAST_INLINE void dot_four(const char* a, int64_t a_stride, const char* b) {
  tile_load<4>(a, a_stride);
  tile_load<5>(b, 64);
  tile_dot<0, 4, 5>();
  tile_load<6>(b + kTileBytes, 64);
  tile_dot<1, 4, 6>();
  tile_load<7>(b + 2 * kTileBytes, 64);
  tile_dot<2, 4, 7>();
  tile_load<5>(b + 3 * kTileBytes, 64);
  tile_dot<3, 4, 5>();
}

LMFAST_INLINE __m512i high_halves(__m512 even, __m512 odd) {
  const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
  return _mm512_mask_blend_epi16(0xaaaaaaaau, low, _mm512_castps_si512(odd));
}
LMFAST_INLINE __m512 truncated(__m512 x) {
  return _mm512_castsi512_ps(
      _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

// Rows 2 * pair and the next of a block of S -> a VNNI row of P in each of 4 tiles per part.
template <int kParts, Mode kMode>
LMFAST_INLINE void exp_pair(const float* s, const float* row_add, const float* lane_add, char* p,
                            __m512* sum) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    __m512 e[2];
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r) {
      const __m512 logit = _mm512_loadu_ps(s + r * kLceLanes + 16 * j);
      const __m512 lane = _mm512_loadu_ps(lane_add + 16 * j), row = _mm512_set1_ps(row_add[r]);
      if constexpr (kParts == 1) {
        const __m512 x = _mm512_fmadd_ps(logit, _mm512_set1_ps(kLog2e), _mm512_add_ps(lane, row));
        if constexpr (kMode == Mode::kMax) {
          sum[j] = _mm512_max_ps(sum[j], x);
        } else {
          e[r] = exp2<kMode == Mode::kSum ? 4 : 3>(VecF{x}).v;
        }
      } else {
        const __m512 x = _mm512_add_ps(_mm512_add_ps(logit, row), lane);
        if constexpr (kMode == Mode::kMax) {
          sum[j] = _mm512_max_ps(sum[j], x);
        } else {
          e[r] = exp(VecF{x}).v;
        }
      }
    }
    if constexpr (kMode == Mode::kMax) continue;
    if constexpr (kMode == Mode::kSum) sum[j] = _mm512_add_ps(sum[j], _mm512_add_ps(e[0], e[1]));
    char* out = p + j * kTileBytes;
    if constexpr (kParts == 1) {
      _mm512_storeu_si512(out, interleave_rounded(e[0], e[1]));
    } else {
      // Truncated to the leading 8 bits, again the rest, and the 8 bits left: an exact split.
#pragma GCC unroll 3
      for (int part = 0; part < kParts; ++part) {
        _mm512_storeu_si512(out + part * 4 * kTileBytes, high_halves(e[0], e[1]));
        e[0] = _mm512_sub_ps(e[0], truncated(e[0]));
        e[1] = _mm512_sub_ps(e[1], truncated(e[1]));
      }
    }
  }
}

// The logits of a chunk, exponentiated into p ([row / 32][part][4] tiles); sums += their sums, or
// with kMax the largest of both. s: two blocks of 16 x 64 floats.
template <int kParts, Mode kMode>
void chunk_probs(const LceAmxArgs& a, const StreamChunk& chunk, const Group& group,
                 const Holes& holes, float* s, char* p) {
  const int64_t blocks = chunk.count / kTileRows, steps = a.depth / kTileDepth;
  const int64_t part_bytes = a.chunk * a.row_bytes;
  __m512 sum[4];
  for (int j = 0; j < 4; ++j) {
    sum[j] = kMode == Mode::kMax ? _mm512_loadu_ps(group.sums + 16 * j) : _mm512_setzero_ps();
  }
  for (int64_t b = 0; b <= blocks; ++b) {
    float* block = s + (b & 1) * kTileRows * kLceLanes;
    const float* before = s + (~b & 1) * kTileRows * kLceLanes;
    const char* rows = chunk.rows + b * kTileRows * a.row_bytes;
    if (b < blocks) {
      tile_zero<0>();
      tile_zero<1>();
      tile_zero<2>();
      tile_zero<3>();
    }
    int64_t pair = 0;
    for (int64_t k = 0; k < steps; ++k) {
#pragma GCC unroll 6
      for (int i = 0; i < Pairs<kParts>::kCount; ++i) {
        if (b < blocks) {
          dot_four(rows + Pairs<kParts>::a[i] * part_bytes + 64 * k, a.row_bytes,
                   group.lanes + (k * kParts + Pairs<kParts>::b[i]) * 4 * kTileBytes);
        }
        if (b == 0) continue;
        const int64_t done = k * Pairs<kParts>::kCount + i + 1;
        const int64_t due = 8 * done / (steps * Pairs<kParts>::kCount);
        for (; pair < due; ++pair) {
          const int64_t row = (b - 1) * kTileRows + 2 * pair;
          char* to = p + row / 32 * (4 * kParts * kTileBytes) + row % 32 / 2 * 64;
          exp_pair<kParts, kMode>(before + 2 * pair * kLceLanes, chunk.add + row, group.add, to,
                                  sum);
        }
      }
    }
    if (b == blocks) break;
    tile_store<0>(block, 4 * kLceLanes);
    tile_store<1>(block + 16, 4 * kLceLanes);
    tile_store<2>(block + 32, 4 * kLceLanes);
    tile_store<3>(block + 48, 4 * kLceLanes);
    for (int64_t i = 0; i < holes.count; ++i) {
      if (holes.row[i] / kTileRows != b) continue;
      block[holes.row[i] % kTileRows * kLceLanes + holes.lane[i]] = kGone;
    }
  }
  for (int j = 0; j < 4; ++j) {
    float* at = group.sums + 16 * j;
    if (kMode == Mode::kMax) _mm512_storeu_ps(at, sum[j]);
    if (kMode == Mode::kSum) _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), sum[j]));
  }
}

// acc += transposed chunk . p; without `add`, acc is overwritten.
template <int kParts>
void chunk_product(const LceAmxArgs& a, const StreamChunk& chunk, const char* p, float* acc,
                   bool add) {
  const int64_t steps = chunk.count / kTileDepth;
  const int64_t step_bytes = a.out_tiles * kParts * kTileBytes;
  for (int64_t t = 0; t < a.out_tiles; ++t) {
    float* c = acc + t * kTileRows * kLceLanes;
    if (add) {
      tile_load<0>(c, 4 * kLceLanes);
      tile_load<1>(c + 16, 4 * kLceLanes);
      tile_load<2>(c + 32, 4 * kLceLanes);
      tile_load<3>(c + 48, 4 * kLceLanes);
    } else {
      tile_zero<0>();
      tile_zero<1>();
      tile_zero<2>();
      tile_zero<3>();
    }
    const char* columns = chunk.columns + t * kParts * kTileBytes;
    for (int64_t k = 0; k < steps; ++k) {
#pragma GCC unroll 6
      for (int i = 0; i < Pairs<kParts>::kCount; ++i) {
        dot_four(columns + k * step_bytes + Pairs<kParts>::a[i] * kTileBytes, 64,
                 p + (k * kParts + Pairs<kParts>::b[i]) * 4 * kTileBytes);
      }
    }
    tile_store<0>(c, 4 * kLceLanes);
    tile_store<1>(c + 16, 4 * kLceLanes);
    tile_store<2>(c + 32, 4 * kLceLanes);
    tile_store<3>(c + 48, 4 * kLceLanes);
  }
}

}  // namespace
}  // namespace lmfast::LMFAST_ISA

#endif
