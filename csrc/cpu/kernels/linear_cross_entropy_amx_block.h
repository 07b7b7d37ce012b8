// The two products of linear_cross_entropy on AMX tiles, for one chunk of stream rows and one group
// of 64 lanes. The pass over tokens has tokens as lanes and streams the vocabulary, the pass over
// classes the other way round; both are this code.
//
//   S = rows . lanes          32 x 32 at a time, stored to 4 KB that alternate
//   P = exp(S + add)          two rows become one VNNI row of bf16, no transposition
//   acc += rows^T . P         [column of weight or hidden][lane], fp32
//
// Exponentials of one block of S are interleaved with the products of the next. With kParts = 3
// every factor is the exact sum of three bf16 numbers, and the six products of the larger parts are
// added: a smaller error than fp32 multiply-adds in one chain, and 400 ms of one core against 630
// with multiply-adds (3712 x 128 x 32011, forward and backward; one part: 92 ms).
#pragma once

#include "../amx.h"
#include "../simd_exp.h"
#include "linear_cross_entropy_amx.h"

#if defined(__AMX_TILE__)

namespace lmfast::LMFAST_ISA {
namespace {

LMFAST_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kGone = -1e30f;  // a logit without weight

// What turns logits into the exponent of the exp in use: that of base 2 where P is rounded to bf16.
template <int kParts>
constexpr float exponent_unit() {
  return kParts == 1 ? kLog2e : 1.0f;
}

// The same for the pass over classes, and what rows add besides: with one part its exponentials are
// tabulated in 1/128 octave and start at the bias of bf16's exponent
// (linear_cross_entropy_amx_single.h).
constexpr float kTableUnit = 128 * kLog2e;
template <int kParts>
constexpr float class_unit() {
  return kParts == 1 ? kTableUnit : 1.0f;
}
template <int kParts>
constexpr float class_offset() {
  return kParts == 1 ? 127.0f * 128.0f : 0.0f;
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

// kSwap below says that A and B have changed roles, so that both passes make the same logits to the
// last bit: with logits of 300, dweight is 4 times less exact otherwise.

LMFAST_INLINE void zero_products() {
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
}
// Two by two tiles of a matrix of floats with rows of 64.
LMFAST_INLINE void load_products(const float* c) {
  tile_load<0>(c, 4 * kLceLanes);
  tile_load<1>(c + 16, 4 * kLceLanes);
  tile_load<2>(c + 16 * kLceLanes, 4 * kLceLanes);
  tile_load<3>(c + 16 * kLceLanes + 16, 4 * kLceLanes);
}
LMFAST_INLINE void store_products(float* c, int64_t row) {
  tile_store<0>(c, 4 * row);
  tile_store<1>(c + 16, 4 * row);
  tile_store<2>(c + 16 * row, 4 * row);
  tile_store<3>(c + 16 * row + 16, 4 * row);
}

// Operands of 2 x 2 products: where step 0 lies, and the bytes to the next step, part and tile.
struct Operands {
  const char* a;
  int64_t a_row, a_step, a_part, a_next;
  const char* b;  // parts of 4 tiles
};

// Two by two products of pair i of parts, behind those of pair i - 1: what they share is loaded.
// before<tile>() is called before the tile's product.
template <int kParts, bool kSwap, int i, class Before>
LMFAST_INLINE void dot_pair(const char* a, const char* b, const Operands& o, const Before& ready) {
  using P = Pairs<kParts>;
  constexpr bool kFirst = i == 0 || i == P::kSmall;
  constexpr int before = i == 0 ? 0 : i - 1;
  constexpr int of_a = kSwap ? P::b[i] : P::a[i], of_b = kSwap ? P::a[i] : P::b[i];
  if constexpr (kFirst || of_a != (kSwap ? P::b[before] : P::a[before])) {
    tile_load<4>(a + of_a * o.a_part, o.a_row);
    tile_load<5>(a + of_a * o.a_part + o.a_next, o.a_row);
  }
  if constexpr (kFirst || of_b != (kSwap ? P::a[before] : P::b[before])) {
    tile_load<6>(b + of_b * 4 * kTileBytes, 64);
    tile_load<7>(b + of_b * 4 * kTileBytes + kTileBytes, 64);
  }
  ready.template tile<0>();
  tile_dot<0, 4, 6>();
  ready.template tile<2>();
  tile_dot<2, 5, 6>();
  ready.template tile<1>();
  tile_dot<1, 4, 7>();
  ready.template tile<3>();
  tile_dot<3, 5, 7>();
}

struct Ready {
  template <int kTile>
  LMFAST_INLINE void tile() const {}
};

// `steps` steps of depth of all pairs; between() is called steps * (kSmall + 1) times.
template <int kParts, bool kSwap, class Between, class Before>
LMFAST_INLINE void dot_pairs(const Operands& o, int64_t steps, const Between& between,
                             const Before& first) {
  constexpr int kSmall = Pairs<kParts>::kSmall;
  const char *a = o.a, *b = o.b;
  const Ready ready;
  for (int64_t k = 0; kSmall > 0 && k < steps; ++k) {
    if constexpr (kSmall > 0) {
      if (k == 0) {
        dot_pair<kParts, kSwap, 0>(a, b, o, first);
      } else {
        dot_pair<kParts, kSwap, 0>(a, b, o, ready);
      }
      between();
      dot_pair<kParts, kSwap, 1>(a, b, o, ready);
      between();
      dot_pair<kParts, kSwap, 2>(a, b, o, ready);
      between();
      dot_pair<kParts, kSwap, 3>(a, b, o, ready);
      between();
      dot_pair<kParts, kSwap, 4>(a, b, o, ready);
      between();
    }
    a += o.a_step;
    b += kParts * 4 * kTileBytes;
  }
  a = o.a;
  b = o.b;
  for (int64_t k = 0; k < steps; ++k) {
    dot_pair<kParts, kSwap, kSmall>(a, b, o, ready);
    between();
    a += o.a_step;
    b += kParts * 4 * kTileBytes;
  }
}

LMFAST_INLINE __m512i high_halves(__m512 even, __m512 odd) {
  const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
  return _mm512_mask_blend_epi16(0xaaaaaaaau, low, _mm512_castps_si512(odd));
}

// Two rows of a block of S -> a VNNI row of P in each of two tiles per part.
template <int kParts, Mode kMode>
LMFAST_INLINE void exp_pair(const float* s, const float* row_add, const float* lane_add, char* p,
                            __m512* sum) {
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) {
    __m512 e[2];
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r) {
      const __m512 logit = _mm512_loadu_ps(s + r * 32 + 16 * j);
      const __m512 lane = _mm512_loadu_ps(lane_add + 16 * j), row = _mm512_set1_ps(row_add[r]);
      __m512 x;
      if constexpr (kParts == 1) {
        x = _mm512_fmadd_ps(logit, _mm512_set1_ps(kLog2e), _mm512_add_ps(lane, row));
      } else if constexpr (kMode == Mode::kPlain) {
        x = _mm512_add_ps(_mm512_add_ps(logit, lane), row);  // the bias first, as in the other pass
      } else {
        x = _mm512_add_ps(_mm512_add_ps(logit, row), lane);
      }
      if constexpr (kMode == Mode::kMax) {
        sum[j] = _mm512_max_ps(sum[j], x);
      } else if constexpr (kParts == 1) {
        e[r] = exp2<kMode == Mode::kSum ? 4 : 3>(VecF{x}).v;
      } else {
        e[r] = exp(VecF{x}).v;
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

// The logits of 32 rows and half of the lanes into s[half], while the other half's block before is
// exponentiated: that of the same rows for half 1, of the 32 rows before for half 0.
template <int kParts, Mode kMode, int kHalf>
LMFAST_INLINE void half_block(const LceAmxArgs& a, const StreamChunk& chunk, const Group& group,
                              const Holes& holes, int64_t row, bool products, bool exponentials,
                              float* s, char* p, __m512* sum) {
  constexpr int kOther = 1 - kHalf, kPairs = 16;
  const int64_t steps = a.depth / kTileDepth, total = steps * (Pairs<kParts>::kSmall + 1);
  const int64_t part_bytes = a.chunk * a.row_bytes, exp_row = kHalf == 0 ? row - 32 : row;
  const char* rows = chunk.rows + row * a.row_bytes;
  const float* before = s + kOther * 32 * 32;
  const float *row_add = chunk.add + exp_row, *lane_add = group.add + 32 * kOther;
  char* to = p + exp_row / 32 * (4 * kParts * kTileBytes) + kOther * 2 * kTileBytes;
  int64_t pair = 0;
  const auto exponentiate_to = [&](int64_t due) {
    for (; pair < due; ++pair) {
      exp_pair<kParts, kMode>(before + pair * 64, row_add + 2 * pair, lane_add, to + pair * 64,
                              sum + 2 * kOther);
    }
  };
  if (!products) return exponentiate_to(kPairs);
  zero_products();
  int64_t done = 0;
  const Operands operands = {rows,
                             a.row_bytes,
                             64,
                             part_bytes,
                             kTileRows * a.row_bytes,
                             group.lanes + 2 * kHalf * kTileBytes};
  dot_pairs<kParts, kMode == Mode::kPlain>(
      operands, steps,
      [&] {
        ++done;
        if (exponentials) exponentiate_to(kPairs * done / total);
      },
      Ready{});
  float* block = s + kHalf * 32 * 32;
  store_products(block, 32);
  for (int64_t i = 0; i < holes.count; ++i) {
    if (holes.row[i] / 32 != row / 32 || holes.lane[i] / 32 != kHalf) continue;
    block[holes.row[i] % 32 * 32 + holes.lane[i] % 32] = kGone;
  }
}

// The logits of a chunk, exponentiated into p ([row / 32][part][4] tiles); sums += their sums, or
// with kMax the largest of both. s: two blocks of 32 x 32 floats.
template <int kParts, Mode kMode>
void chunk_probs(const LceAmxArgs& a, const StreamChunk& chunk, const Group& group,
                 const Holes& holes, float* s, char* p) {
  __m512 sum[4];
  for (int j = 0; j < 4; ++j) {
    sum[j] = kMode == Mode::kMax ? _mm512_loadu_ps(group.sums + 16 * j) : _mm512_setzero_ps();
  }
  for (int64_t row = 0; row < chunk.count; row += 32) {
    half_block<kParts, kMode, 0>(a, chunk, group, holes, row, true, row > 0, s, p, sum);
    half_block<kParts, kMode, 1>(a, chunk, group, holes, row, true, true, s, p, sum);
  }
  half_block<kParts, kMode, 0>(a, chunk, group, holes, chunk.count, false, true, s, p, sum);
  for (int j = 0; j < 4; ++j) {
    float* at = group.sums + 16 * j;
    if (kMode == Mode::kMax) _mm512_storeu_ps(at, sum[j]);
    if (kMode == Mode::kSum) _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), sum[j]));
  }
}

// Before a tile's first product: the sums it held go to `from`, those at `to` are fetched. One by
// one behind the products that still run, as linear_cross_entropy_amx_single.h explains.
struct RenewSums {
  float* from;  // null: nothing is held
  const float* to;
  bool add;

  template <int kTile>
  LMFAST_INLINE void tile() const {
    constexpr int64_t at = kTile / 2 * 16 * kLceLanes + kTile % 2 * 16;
    if (from != nullptr) tile_store<kTile>(from + at, 4 * kLceLanes);
    if (add) {
      tile_load<kTile>(to + at, 4 * kLceLanes);
    } else {
      tile_zero<kTile>();
    }
  }
};

// acc += transposed chunk . p; without `add`, acc is overwritten.
template <int kParts>
void chunk_product(const LceAmxArgs& a, const StreamChunk& chunk, const char* p, float* acc,
                   bool add) {
  const int64_t steps = chunk.count / kTileDepth;
  const int64_t step_bytes = a.out_tiles * kParts * kTileBytes;
  float* last = nullptr;
  for (int64_t t = 0; t < a.out_tiles; t += 2) {
    const char* columns = chunk.columns + t * kParts * kTileBytes;
    for (int half = 0; half < 2; ++half) {
      float* c = acc + t * kTileRows * kLceLanes + 32 * half;
      const Operands operands = {
          columns, 64, step_bytes, kTileBytes, kParts * kTileBytes, p + 2 * half * kTileBytes};
      dot_pairs<kParts, false>(operands, steps, [] {}, RenewSums{last, c, add});
      last = c;
    }
  }
  store_products(last, kLceLanes);
}

}  // namespace
}  // namespace lmfast::LMFAST_ISA

#endif
