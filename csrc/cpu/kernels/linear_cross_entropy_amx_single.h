// The two products of linear_cross_entropy for one bf16 part, where speed is all: what
// linear_cross_entropy_amx_block.h does for any number of parts, laid out for the ports.
//
// tdpbf16ps keeps port 5 busy for its 16 cycles and a tile load takes 8 cycles of ports 0 and 5, so
// 2 x 2 blocks at full speed (one load a product) leave nothing for vector instructions: products
// and exponentials add up instead of hiding each other. Measured on one core, ns a tdp: products
// alone 4.6; with operands from L1 4.8; four vectors of exp alone 8.4, both together 13.3. What
// helps is therefore fewer instructions, not another order of them:
//   - tilestored costs 16 cycles of the front end. Stored in one go behind the last product, four
//     tiles wait for the products' latency; stored one by one before each tile's next first
//     product, they do not: 6.5 -> 5.0 ns a tdp for S, 8.2 -> 7.0 for the sums. 1 x 4 blocks do
//     best for the sums, as 32 KB of P stay in L1 and each transposed tile is read once.
//   - exp of the pass over classes is a table: its argument, rounded to 1/128 octave as a 16-bit
//     number, is already a bf16 but for the curvature of 2^f over [0, 1), at most 11 units in the
//     last place, which one byte permutation looks up: 4 instructions a vector where a polynomial
//     and the rounding take 11. A relative error of 2.2e-3 (rms) where rounding alone makes 1.6e-3.
//   - the pass over tokens sums its exponentials in fp32 and keeps a polynomial, of degree 3.
#pragma once

#include "linear_cross_entropy_amx_block.h"

#if defined(__AMX_TILE__)

namespace lmfast::LMFAST_ISA {
namespace {

// What differs between the passes: the exponential of two rows, `pair`, of 32 logits each.
// kBoth: both rows and lanes add something; otherwise only lanes do (sum) or only rows (table).
template <bool kBoth>
struct SummedExp {
  const float *row_add, *lane_add;
  __m512 sum[4];

  LMFAST_INLINE void pair(const float* s, int64_t row, int64_t half, char* to) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512 lane = _mm512_loadu_ps(lane_add + 32 * half + 16 * j);
      __m512 e[2];
#pragma GCC unroll 2
      for (int r = 0; r < 2; ++r) {
        const __m512 add = kBoth ? _mm512_add_ps(lane, _mm512_set1_ps(row_add[row + r])) : lane;
        const __m512 logit = _mm512_loadu_ps(s + r * 32 + 16 * j);
        e[r] = exp2<3>(VecF{_mm512_fmadd_ps(logit, _mm512_set1_ps(kLog2e), add)}).v;
      }
      sum[2 * half + j] = _mm512_add_ps(sum[2 * half + j], _mm512_add_ps(e[0], e[1]));
      _mm512_storeu_si512(to + j * kTileBytes, interleave_rounded(e[0], e[1]));
    }
  }
};

// f - 128 (2^(f / 128) - 1), rounded, for f = 0 .. 127.
alignas(64) constexpr uint8_t kCurvature[128] = {
    0,  0,  1,  1,  1,  1,  2,  2,  2,  3,  3,  3,  3,  4,  4,  4,  4,  5,  5,  5,  5,  6,
    6,  6,  6,  6,  7,  7,  7,  7,  7,  8,  8,  8,  8,  8,  8,  9,  9,  9,  9,  9,  9,  9,
    10, 10, 10, 10, 10, 10, 10, 10, 10, 10, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11,
    11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 10, 10, 10, 10, 10, 10,
    10, 10, 10, 9,  9,  9,  9,  9,  9,  9,  8,  8,  8,  8,  8,  7,  7,  7,  7,  7,  6,  6,
    6,  6,  5,  5,  5,  4,  4,  4,  3,  3,  3,  3,  2,  2,  1,  1,  1,  0};

template <bool kBoth>
struct TabulatedExp {
  const float *row_add, *lane_add;

  LMFAST_INLINE void pair(const float* s, int64_t row, int64_t half, char* to) {
    const __m512i order =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
    const __m512i low = _mm512_load_si512(kCurvature), high = _mm512_load_si512(kCurvature + 64);
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      __m512i fixed[2];
#pragma GCC unroll 2
      for (int r = 0; r < 2; ++r) {
        __m512 add = _mm512_set1_ps(row_add[row + r]);
        if (kBoth) add = _mm512_add_ps(add, _mm512_loadu_ps(lane_add + 32 * half + 16 * j));
        const __m512 logit = _mm512_loadu_ps(s + r * 32 + 16 * j);
        fixed[r] = _mm512_cvtps_epi32(_mm512_fmadd_ps(logit, _mm512_set1_ps(kTableUnit), add));
      }
      // Saturation to unsigned 16 bits makes 0 of all that is too small.
      const __m512i line = _mm512_shuffle_epi8(_mm512_packus_epi32(fixed[0], fixed[1]), order);
      const __m512i curve = _mm512_maskz_permutex2var_epi8(0x5555555555555555u, low, line, high);
      _mm512_storeu_si512(to + j * kTileBytes, _mm512_sub_epi16(line, curve));
    }
  }
};

// Before a tile's first product: what it held before goes to `from`, and it starts at 0.
template <int kTile>
LMFAST_INLINE void renew_logits(float* from, bool store) {
  if (store) tile_store<kTile>(from + kTile / 2 * 16 * 32 + kTile % 2 * 16, 4 * 32);
  tile_zero<kTile>();
}

// The logits of a chunk, exponentiated into p ([row / 32][4] tiles). s: 32 x 32 floats, those of
// the block before the one in the tiles.
template <class Exp>
LMFAST_INLINE void single_probs(const LceAmxArgs& a, const StreamChunk& chunk, const Group& group,
                                const Holes& holes, float* s, char* p, Exp& exp) {
  constexpr int64_t kPairs = 16;
  const int64_t steps = a.depth / kTileDepth, each = (kPairs + steps - 1) / steps;
  const int64_t blocks = chunk.count / 16;  // two halves of 32 rows
  const auto punch = [&](int64_t block) {
    for (int64_t i = 0; i < holes.count; ++i) {
      if (holes.row[i] / 32 != block / 2 || holes.lane[i] / 32 != block % 2) continue;
      s[holes.row[i] % 32 * 32 + holes.lane[i] % 32] = kGone;
    }
  };
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t row = block / 2 * 32, half = block % 2, last = block - 1;
    const char* rows = chunk.rows + row * a.row_bytes;
    const char* lanes = group.lanes + 2 * half * kTileBytes;
    char* to = p + last / 2 * (4 * kTileBytes) + last % 2 * 2 * kTileBytes;
    int64_t pair = block > 0 ? 0 : kPairs;
    for (int64_t k = 0; k < steps; ++k) {
      const char* b = lanes + k * 4 * kTileBytes;
      tile_load<4>(rows + 64 * k, a.row_bytes);
      tile_load<6>(b, 64);
      if (k == 0) renew_logits<0>(s, block > 0);
      tile_dot<0, 4, 6>();
      tile_load<5>(rows + 64 * k + kTileRows * a.row_bytes, a.row_bytes);
      if (k == 0) renew_logits<2>(s, block > 0);
      tile_dot<2, 5, 6>();
      tile_load<7>(b + kTileBytes, 64);
      if (k == 0) renew_logits<1>(s, block > 0);
      tile_dot<1, 4, 7>();
      if (k == 0) renew_logits<3>(s, block > 0);
      tile_dot<3, 5, 7>();
      if (k == 0 && block > 0) punch(last);
      for (const int64_t due = smaller(pair + each, kPairs); pair < due; ++pair) {
        exp.pair(s + pair * 64, last / 2 * 32 + 2 * pair, last % 2, to + pair * 64);
      }
    }
  }
  store_products(s, 32);
  punch(blocks - 1);
  char* to = p + (chunk.count / 32 - 1) * (4 * kTileBytes) + 2 * kTileBytes;
  for (int64_t pair = 0; pair < kPairs; ++pair) {
    exp.pair(s + pair * 64, chunk.count - 32 + 2 * pair, 1, to + pair * 64);
  }
}

// p of the pass over tokens; sums += its sums.
inline void single_probs_of_tokens(const LceAmxArgs& a, const StreamChunk& chunk,
                                   const Group& group, const Holes& holes, bool rows_add, float* s,
                                   char* p) {
  const auto run = [&](auto exp) {
    for (auto& sum : exp.sum) sum = _mm512_setzero_ps();
    single_probs(a, chunk, group, holes, s, p, exp);
    for (int j = 0; j < 4; ++j) {
      float* at = group.sums + 16 * j;
      _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), exp.sum[j]));
    }
  };
  rows_add ? run(SummedExp<true>{chunk.add, group.add, {}})
           : run(SummedExp<false>{chunk.add, group.add, {}});
}
// p of the pass over classes.
inline void single_probs_of_classes(const LceAmxArgs& a, const StreamChunk& chunk,
                                    const Group& group, const Holes& holes, bool lanes_add,
                                    float* s, char* p) {
  const auto run = [&](auto exp) { single_probs(a, chunk, group, holes, s, p, exp); };
  lanes_add ? run(TabulatedExp<true>{chunk.add, group.add})
            : run(TabulatedExp<false>{chunk.add, group.add});
}

// Before a tile's first product: the sums it held go to `from`, those at `to` are fetched.
template <int kTile>
LMFAST_INLINE void renew_sums(float* from, const float* to, bool store, bool add) {
  if (store) tile_store<kTile>(from + 16 * kTile, 4 * kLceLanes);
  if (add) {
    tile_load<kTile>(to + 16 * kTile, 4 * kLceLanes);
  } else {
    tile_zero<kTile>();
  }
}

// acc += transposed chunk . p; without `add`, acc is overwritten.
inline void single_product(const LceAmxArgs& a, const StreamChunk& chunk, const char* p, float* acc,
                           bool add) {
  const int64_t steps = chunk.count / kTileDepth, step_bytes = a.out_tiles * kTileBytes;
  float* last = acc;
  for (int64_t t = 0; t < a.out_tiles; ++t) {
    float* c = acc + t * kTileRows * kLceLanes;
    const char *columns = chunk.columns + t * kTileBytes, *b = p;
    for (int64_t k = 0; k < steps; ++k, columns += step_bytes, b += 4 * kTileBytes) {
      const bool first = k == 0;
      tile_load<4>(columns, 64);
      tile_load<5>(b, 64);
      if (first) renew_sums<0>(last, c, t > 0, add);
      tile_dot<0, 4, 5>();
      tile_load<6>(b + kTileBytes, 64);
      if (first) renew_sums<1>(last, c, t > 0, add);
      tile_dot<1, 4, 6>();
      tile_load<7>(b + 2 * kTileBytes, 64);
      if (first) renew_sums<2>(last, c, t > 0, add);
      tile_dot<2, 4, 7>();
      tile_load<5>(b + 3 * kTileBytes, 64);
      if (first) renew_sums<3>(last, c, t > 0, add);
      tile_dot<3, 4, 5>();
    }
    last = c;
  }
  tile_store<0>(last, 4 * kLceLanes);
  tile_store<1>(last + 16, 4 * kLceLanes);
  tile_store<2>(last + 32, 4 * kLceLanes);
  tile_store<3>(last + 48, 4 * kLceLanes);
}

}  // namespace
}  // namespace lmfast::LMFAST_ISA

#endif
