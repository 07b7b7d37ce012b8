// Attention, forward, for bf16 on tiles (of AMX, or tiles_avx512.h's): both products on tiles, the
// softmax in fp32 between them; otherwise as attention_fwd.cpp.
//
// A pair of 32 keys by 32 lanes is four products per step of 32 in depth, for two tiles of K and
// two of Q^T. P^T is rounded to bf16 and interleaved in registers into the layout of tile B; V^T is
// packed once per unit (4 % of the time at T = 1024).
//
// Without AMX, on AVX512-BF16, products have twice the rate of fp32: (4, 16, 1024, 64) on two cores
// of a Zen 4 takes 26 ms instead of 44 by the fp32 kernel; the products alone would take 20, at the
// processor's rate of 0.27 ns each. In tiles_avx512.h's loops they take 0.31 two steps deep, as
// scores of 64 columns are, and 0.28 eight deep, as outputs are: what is lost is the loading and
// storing of sums, which a register block of another shape repeats; the inner loop is at 96 %. The
// exponentials, 16 vectors beside every 1024 products, are another 12 %.
#include "attention_softmax.h"
#include "attention_tiles.h"

namespace lmfast::LMFAST_ISA {

#if defined(LMFAST_AMX)

namespace {

constexpr int kOutputKeys = 256;

// P^T of 32 rows of S^T by 16 lanes as a tile B, and its sums.
template <bool kExact>
LMFAST_INLINE VecF exponential_tile(const float* s, VecF unit, VecF shift, char* p) {
  VecF l0 = VecF::zero(), l1 = l0;
#pragma GCC unroll 4
  for (int j = 0; j < 16; ++j) {
    const VecF p0 = exp2<3>(rough_exponent<kExact>(VecF::load(s + 2 * j * kLanes), unit, shift));
    const VecF p1 =
        exp2<3>(rough_exponent<kExact>(VecF::load(s + (2 * j + 1) * kLanes), unit, shift));
    l0 = l0 + p0;
    l1 = l1 + p1;
    _mm512_storeu_si512(p + 64 * j, interleave_rounded(p0.v, p1.v));
  }
  return l0 + l1;
}

// What a unit has prepared for its blocks of queries.
struct UnitTiles {
  TileRows k;
  const char* v_tiles;  // (keys / 32, D / 16)
  int64_t first_key;    // of v_tiles
  const char* q_tiles;  // of the block: (4 tiles of lanes, D / 32)
  int depth;            // D / 32
  float *out, *s, *bias;
  char* p;
};

// One block of queries against the keys it sees: scores and exponentials by 64 keys, so that S
// stays in the first-level cache, and P^T into the output by 256, so that its sums stay in tiles
// longer.
//
// Interleaving the exponentials with the tile products of other chunks, one square after every 32 x
// 16 of them, was slower than one after the other: products do overlap with vector code, but tile
// loads and stores cost more than they do alone.
template <bool kOptions>
LMFAST_INLINE void attend_block(const AttentionArgs& a, QueryBlock& q, const UnitTiles& u) {
  constexpr int kStep = 2, kGroups = kOutputKeys / 32;  // groups of 32 keys
  const VecF unit = VecF::set1(exponent_unit(a));
  // Groups start where those of V do.
  const int64_t first = u.first_key + (q.first - u.first_key) / 32 * 32;
  float past[2] = {0.0f, 0.0f};  // the end of the keys that each half of the lanes sees
  for (int i = 0; i < q.rows; ++i) past[i / 32] = q.hi[i] > past[i / 32] ? q.hi[i] : past[i / 32];
  bool started[kLanes / VecF::kWidth] =
      {};  // every lane has seen a key and has its reference value
  for (int64_t key = first; key < q.last; key += kOutputKeys) {
    int groups[2], added[2] = {0, 0};
    for (int pair = 0; pair < 2; ++pair) {
      const int64_t left = (static_cast<int64_t>(past[pair]) - key + 31) / 32;
      groups[pair] = static_cast<int>(clamp(left, 0, kGroups));
    }
    const auto add_output = [&](int pair, int end) {
      const int steps = end - added[pair];
      if (steps <= 0) return;
      const int64_t group = (key - u.first_key) / 32 + added[pair];
      for (int d = 0; d < 2 * u.depth; d += 2) {
        output_square(u.v_tiles + group * 2 * u.depth * kTileBytes, 2 * u.depth,
                      u.p + added[pair] * kLaneTiles * kTileBytes, steps, d, 2 * pair, u.out);
      }
      added[pair] = end;
    };
    const int most = groups[0] > groups[1] ? groups[0] : groups[1];
    for (int g = 0; g < most; g += kStep) {
      const int64_t at = key + 32 * g;
      int steps[2];
      for (int pair = 0; pair < 2; ++pair) {
        steps[pair] = static_cast<int>(clamp(groups[pair] - g, 0, kStep));
        score_rows(u.k, at, steps[pair], u.q_tiles, u.depth, pair, u.s);
      }
      const int n = 32 * (steps[0] > steps[1] ? steps[0] : steps[1]);
      if constexpr (kOptions) {
        apply_options(a, q, at, static_cast<int>(a.keys - at < n ? a.keys - at : n), u.s, u.bias);
      }
      hide_invisible(q, at, n, u.s);
      for (int i = 0; i < q.vecs; ++i) {
        const int pair = i / 2, lane = i * VecF::kWidth;
        if (steps[pair] == 0) continue;
        const auto exponentials_by = [&](auto exact) {
          constexpr bool kExact = decltype(exact)::value != 0;
          const VecF shift = rough_shift<kExact>(VecF::load(q.m + lane), unit);
          VecF l = VecF::zero();
          for (int t = 0; t < steps[pair]; ++t) {
            l = l + exponential_tile<kExact>(u.s + t * 32 * kLanes + lane, unit, shift,
                                             u.p + ((g + t) * kLaneTiles + i) * kTileBytes);
          }
          return l;
        };
        const auto exponentials = [&] {
          const bool exact = kOptions || needs_exact(VecF::load(q.m + lane), unit);
          return __builtin_expect(exact, kOptions) ? exponentials_by(Constant<true>())
                                                   : exponentials_by(Constant<false>());
        };
        // Whether the reference value still serves shows in the sum: looking for the largest score
        // first, as attention_fwd.cpp does, reads every score once more.
        VecF l = VecF::zero();
        if (started[i]) l = exponentials();
        if (__builtin_expect(!started[i] || any_above(l, 16384.0f), 0)) {
          // What is still to be added to the output belongs to the old reference value.
          add_output(pair, g);
          raise_maximum(a, q, lane, largest(u.s + lane, 32 * steps[pair]), u.out);
          started[i] = !any_above(VecF::set1(0.5f * kLowest), VecF::load(q.m + lane));
          l = exponentials();
        }
        (VecF::load(q.l + lane) + l).store(q.l + lane);
      }
    }
    add_output(0, groups[0]);
    add_output(1, groups[1]);
  }
}

void fwd_unit(const AttentionArgs& a, const Unit& u) {
  const int64_t width = round_up(a.head_dim, 32);
  const int columns = static_cast<int>(a.head_dim);
  const int depth = static_cast<int>(width / 32), d_tiles = 2 * depth;
  const Span rows = unit_rows(a, u);
  const Span keys = keys_of_rows(a, u, rows);
  const int64_t count = round_up(keys.hi - keys.lo, 32);
  Scratch scratch(a.scratch);
  bf16* k_copy = scratch.take<bf16>(count * width);
  char* v_tiles = scratch.take<char>(count * width * 2);
  bf16* q_rows = scratch.take<bf16>(kLanes * width);
  char* q_tiles = scratch.take<char>(kLanes * width * 2);
  float* out_rows = scratch.take<float>(kLanes * width);
  float* out = scratch.take<float>(kLanes * width);
  float* s = scratch.take<float>(kChunk * kLanes);
  float* bias = scratch.take<float>(kChunk * kLanes);
  char* p = scratch.take<char>(kOutputKeys * kLanes * 2);
  const TileRows k = stored_tile_rows(a, u, keys, width, k_copy);
  for (int64_t j = 0; j < count; j += 32) {
    const int n = static_cast<int>(keys.hi - keys.lo - j < 32 ? keys.hi - keys.lo - j : 32);
    const Bf16Rows v = stored_values_as_bf16(a, u, keys.lo + j, n, width, q_rows);
    for (int t = 0; t < depth; ++t) {
      pack_columns(v.data + 32 * t, v.stride, n, columns - 32 * t,
                   v_tiles + (j / 32 * d_tiles + 2 * t) * kTileBytes, kTileBytes);
    }
  }
  memset(p, 0, kOutputKeys * kLanes * 2);

  TileSession tiles;
  for (int64_t row = rows.lo; row < rows.hi; row += kLanes) {
    QueryBlock q;
    describe_block(a, u, row, static_cast<int>(rows.hi - row < kLanes ? rows.hi - row : kLanes), q);
    const int lane_tiles = (q.vecs + 1) / 2 * 2;
    // In place where the rows are all of one head.
    const bool together = q.row[0].t + q.rows <= a.length;
    for (int i = 0; i < q.rows && !together; ++i) {
      memcpy(q_rows + i * width, row_of<bf16>(a.q, u.b, q.row[i].head, q.row[i].t),
             sizeof(bf16) * static_cast<size_t>(columns));
    }
    const bf16* from = together ? row_of<bf16>(a.q, u.b, q.row[0].head, q.row[0].t) : q_rows;
    const int64_t stride = together ? a.q.row : width;
    for (int v = 0; v < lane_tiles; ++v) {
      for (int t = 0; t < depth; ++t) {
        pack_transposed(from + v * 16 * stride + 32 * t, stride, q.rows - v * 16, columns - 32 * t,
                        q_tiles + (v * depth + t) * kTileBytes);
      }
    }
    memset(out, 0, sizeof(float) * static_cast<size_t>(kLanes * width));
    const UnitTiles tiles_of_unit{k, v_tiles, keys.lo, q_tiles, depth, out, s, bias, p};
    if (has_score_options(a)) {
      attend_block<true>(a, q, tiles_of_unit);
    } else {
      attend_block<false>(a, q, tiles_of_unit);
    }
    if (a.splits > 1) {
      store_partial(a, u, q, row, out);
      continue;
    }
    finish_block(a, q);
    store_block<bf16>(a, q, out, out_rows);
  }
}

}  // namespace

void attention_fwd_amx(const AttentionArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) fwd_unit(a, unit_at(a, i));
}

#else

void attention_fwd_amx(const AttentionArgs&, int64_t, int64_t) {}

#endif

}  // namespace lmfast::LMFAST_ISA
