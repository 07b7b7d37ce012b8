// Attention, backward, for bf16 on tiles (of AMX, or tiles_avx512.h's); attention_bwd.cpp has the
// formulas.
//
// One elementwise step per 32 rows by 64 keys writes P and dS in the three layouts that the
// products behind it read: both interleaved as tiles B (depth = query rows), and dS by rows as
// tiles A (depth = keys). So nothing is transposed inside the loop; Q^T and dO^T are packed once
// per head, and K^T, V^T and K once per block of keys. dQ is summed in fp32, per head, in the
// second-level cache. Without AMX, on AVX512-BF16: (4, 16, 1024, 64), two cores of a Zen 4, 66 ms
// instead of 106 by the fp32 kernel; the products alone would take 50.
#include "attention_grad.h"
#include "attention_tiles.h"

namespace lmfast::LMFAST_ISA {

#if defined(LMFAST_AMX)

namespace {

constexpr int kStep = 2;       // groups of 32 rows whose scores are in the first-level cache
constexpr int kSumRows = 256;  // rows added to dV and dK at once

struct GradTiles {
  char *p, *ds;   // B: (rows / 32, 4 tiles of keys)
  char* ds_rows;  // A: (rows / 16, 2 groups of 32 keys)
};

// The exponent of a probability; h as sums_to_exponents leaves it.
template <bool kExact>
LMFAST_INLINE VecF gradient_exponent(VecF score, VecF unit, VecF minus_m, VecF rest) {
  return fmadd(kExact ? score + minus_m : score, unit, kExact ? rest : minus_m);
}

// P and dS of 32 * steps rows; h as sums_to_exponents leaves it.
template <bool kExact, bool kSlope>
LMFAST_INLINE void score_gradient_tiles(const HeadRows& h, int64_t t, int steps, VecF unit,
                                        const float* s, const float* dp, const float* slope,
                                        const GradTiles& out) {
  for (int j = 0; j < 32 * steps; j += 2) {
    const VecF m0 = VecF::set1(h.minus_m[t + j]), m1 = VecF::set1(h.minus_m[t + j + 1]);
    const VecF rest0 = VecF::set1(h.inverse[t + j]), rest1 = VecF::set1(h.inverse[t + j + 1]);
    const VecF delta0 = VecF::set1(h.delta[t + j]), delta1 = VecF::set1(h.delta[t + j + 1]);
    const int tile_row = 64 * (j % 32 / 2);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m512 p0[2], p1[2], ds0[2], ds1[2];
#pragma GCC unroll 2
      for (int c = 0; c < 2; ++c) {
        const int at = j * kLanes + 32 * half + 16 * c;
        const VecF x0 = exp2<3>(gradient_exponent<kExact>(VecF::load(s + at), unit, m0, rest0));
        const VecF x1 =
            exp2<3>(gradient_exponent<kExact>(VecF::load(s + at + kLanes), unit, m1, rest1));
        VecF y0 = x0 * (VecF::load(dp + at) - delta0);
        VecF y1 = x1 * (VecF::load(dp + at + kLanes) - delta1);
        if constexpr (kSlope) {
          y0 = y0 * VecF::load(slope + at);
          y1 = y1 * VecF::load(slope + at + kLanes);
        }
        p0[c] = x0.v;
        p1[c] = x1.v;
        ds0[c] = y0.v;
        ds1[c] = y1.v;
      }
      const int64_t b_tile = (j / 32 * 4 + 2 * half) * kTileBytes + tile_row;
      __m512i first, second;
      interleave(to_pairs(p0[0], p0[1]), to_pairs(p1[0], p1[1]), &first, &second);
      _mm512_storeu_si512(out.p + b_tile, first);
      _mm512_storeu_si512(out.p + b_tile + kTileBytes, second);
      const __m512i row0 = to_pairs(ds0[0], ds0[1]), row1 = to_pairs(ds1[0], ds1[1]);
      interleave(row0, row1, &first, &second);
      _mm512_storeu_si512(out.ds + b_tile, first);
      _mm512_storeu_si512(out.ds + b_tile + kTileBytes, second);
      char* rows = out.ds_rows + (j / 16 * 2 + half) * kTileBytes + 64 * (j % 16);
      _mm512_storeu_si512(rows, row0);
      _mm512_storeu_si512(rows + 64, row1);
    }
  }
}

// delta = dout . out of a head's rows; 0 for rows of padding.
LMFAST_INLINE void rough_deltas(const AttentionBwdArgs& a, int64_t b, const HeadRows& h,
                                int64_t padded) {
  const AttentionArgs& f = a.fwd;
  for (int64_t t = 0; t < padded; ++t) {
    VecF total = VecF::zero();
    for (int64_t d = 0; t < f.length && d < f.head_dim; d += 16) {
      const int n = static_cast<int>(f.head_dim - d < 16 ? f.head_dim - d : 16);
      total = fmadd(VecF::load(row_of<bf16>(f.out, b, h.head, t) + d, n),
                    VecF::load(row_of<bf16>(a.dout, b, h.head, t) + d, n), total);
    }
    h.delta[t] = sum(total);
  }
}

// Puts the division by the sum into the exponent, where it costs nothing: log2(1 / sum) takes the
// place of 1 / sum, or is added to minus_m, then in base 2, where that is exact enough. Rounded to
// bf16 a probability does not show the difference. Returns whether exponents are to be kExact.
LMFAST_INLINE bool sums_to_exponents(const AttentionArgs& a, const HeadRows& h, int64_t length) {
  const VecF unit = VecF::set1(exponent_unit(a));
  bool exact = has_score_options(a);
  for (int64_t t = 0; t < length && !exact; t += 16) {
    exact = needs_exact(VecF::load(h.minus_m + t), unit);
  }
  for (int64_t t = 0; t < length; t += 16) {
    const VecF rest = log2(VecF::load(h.inverse + t));
    rest.store(h.inverse + t);
    if (!exact) fmadd(VecF::load(h.minus_m + t), unit, rest).store(h.minus_m + t);
  }
  return exact;
}

// Rows of a head as tiles A with depth = row: (rows / 32, D / 16).
LMFAST_INLINE void pack_head(const AttentionTensor& x, int64_t b, int64_t head, int64_t rows,
                             int columns, int d_tiles, char* tiles) {
  for (int64_t t = 0; t < rows; t += 32) {
    const int n = static_cast<int>(rows - t < 32 ? rows - t : 32);
    for (int d = 0; d < d_tiles; d += 2) {
      pack_columns(row_of<bf16>(x, b, head, t) + 16 * d, x.row, n, columns - 16 * d,
                   tiles + (t / 32 * d_tiles + d) * kTileBytes, kTileBytes);
    }
  }
}

struct KeyTiles {
  char *k_lanes, *v_lanes;  // B: (4 tiles of keys, D / 32), depth = D
  char* k_rows;             // B: (2 groups of 32 keys, D / 16), depth = keys
};

LMFAST_INLINE void pack_keys(const AttentionArgs& f, const Unit& u, int64_t key, int count,
                             int columns, int depth, const KeyTiles& out) {
  const bf16* k = row_of<bf16>(f.k, u.b, u.kv_head, key);
  const bf16* v = row_of<bf16>(f.v, u.b, u.kv_head, key);
  for (int t = 0; t < depth; ++t) {
    for (int i = 0; i < 4; ++i) {
      const int64_t tile = (i * depth + t) * kTileBytes;
      pack_transposed(k + 16 * i * f.k.row + 32 * t, f.k.row, count - 16 * i, columns - 32 * t,
                      out.k_lanes + tile);
      pack_transposed(v + 16 * i * f.v.row + 32 * t, f.v.row, count - 16 * i, columns - 32 * t,
                      out.v_lanes + tile);
    }
    for (int i = 0; i < 2; ++i) {
      pack_rows(k + 32 * i * f.k.row + 32 * t, f.k.row, count - 32 * i, columns - 32 * t,
                out.k_rows + (i * 2 * depth + 2 * t) * kTileBytes, kTileBytes);
    }
  }
}

void bwd_unit(const AttentionBwdArgs& a, const Unit& u) {
  const AttentionArgs& f = a.fwd;
  const int64_t width = round_up(f.head_dim, 32), group = f.heads / f.kv_heads;
  const int64_t length = round_up(f.length, 32);
  const int columns = static_cast<int>(f.head_dim);
  const int depth = static_cast<int>(width / 32), d_tiles = 2 * depth;
  const Span keys = unit_keys(f, u);
  const int64_t blocks = (keys.hi - keys.lo + kLanes - 1) / kLanes;
  const int64_t sums = group > 1 ? blocks : 1;  // a group's sums wait for its last head
  Scratch scratch(f.scratch);
  bf16* q_copy = scratch.take<bf16>(length * width);
  bf16* dout_copy = scratch.take<bf16>(length * width);
  char* q_tiles = scratch.take<char>(length * width * 2);
  char* dout_tiles = scratch.take<char>(length * width * 2);
  float* own_dq = scratch.take<float>(length * width);
  HeadRows h{0, scratch.take<float>(length), scratch.take<float>(length),
             scratch.take<float>(length)};
  float* dk = scratch.take<float>(sums * kLanes * width);
  float* dv = scratch.take<float>(sums * kLanes * width);
  const int64_t key_bytes = kLanes * width * 2;
  const KeyTiles kt{scratch.take<char>(key_bytes), scratch.take<char>(key_bytes),
                    scratch.take<char>(key_bytes)};
  float* s = scratch.take<float>(kChunk * kLanes);
  float* dp = scratch.take<float>(kChunk * kLanes);
  float* slope = scratch.take<float>(kChunk * kLanes);
  char* p = scratch.take<char>(kSumRows * kLanes * 2);
  char* ds = scratch.take<char>(kSumRows * kLanes * 2);
  char* ds_rows = scratch.take<char>(kStep * 32 * kLanes * 2);
  const bool options = has_score_options(f);
  const VecF unit = VecF::set1(exponent_unit(f));
  const size_t sum_bytes = sizeof(float) * static_cast<size_t>(kLanes * width);

  // Rows of padding have no derivative of their own; what is there must be finite.
  memset(slope, 0, sizeof(float) * kChunk * kLanes);

  TileSession session;
  for (int64_t g = 0; g < group; ++g) {
    h.head = u.kv_head * group + g;
    describe_head(f, u.b, h, length);
    rough_deltas(a, u.b, h, length);
    const bool exact = sums_to_exponents(f, h, length);
    const Span all{0, f.length};
    const TileRows q = tile_rows(f.q, u.b, h.head, all, columns, width, q_copy);
    const TileRows dout = tile_rows(a.dout, u.b, h.head, all, columns, width, dout_copy);
    pack_head(f.q, u.b, h.head, f.length, columns, d_tiles, q_tiles);
    pack_head(a.dout, u.b, h.head, f.length, columns, d_tiles, dout_tiles);
    float* dq = dq_of_head(a, g, own_dq);
    memset(dq, 0, sizeof(float) * static_cast<size_t>(length * width));
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t key = keys.lo + block * kLanes;
      const int count = static_cast<int>(clamp(f.lengths[u.b] - key, 0, kLanes));
      float* dk_sum = dk + (group > 1 ? block : 0) * kLanes * width;
      float* dv_sum = dv + (group > 1 ? block : 0) * kLanes * width;
      if (g == 0) {
        memset(dk_sum, 0, sum_bytes);
        memset(dv_sum, 0, sum_bytes);
      }
      const Span rows = count > 0 ? rows_of_keys(f, u.b, key) : Span{0, 0};
      if (rows.lo < rows.hi) pack_keys(f, u, key, count, columns, depth, kt);
      for (int64_t t = rows.lo / 32 * 32; t < rows.hi; t += kSumRows) {
        const int64_t left = round_up(rows.hi - t, 32);
        const int steps = static_cast<int>(left < kSumRows ? left : kSumRows) / 32;
        for (int i = 0; i < steps; i += kStep) {
          const int groups = steps - i < kStep ? steps - i : kStep;
          const int64_t at = t + 32 * i;
          for (int pair = 0; pair < 2; ++pair) {
            score_rows(q, at, groups, kt.k_lanes, depth, pair, s);
            score_rows(dout, at, groups, kt.v_lanes, depth, pair, dp);
          }
          if (options) apply_options_by_rows(f, u.b, h.head, at, 32 * groups, key, s, slope);
          hide_invisible_by_rows(f, u.b, at, 32 * groups, key, key + kLanes, s);
          const int64_t done = i * kLaneTiles * kTileBytes;
          const GradTiles tiles{p + done, ds + done, ds_rows};
          if (f.softcap > 0.0f) {
            score_gradient_tiles<true, true>(h, at, groups, unit, s, dp, slope, tiles);
          } else if (exact) {
            score_gradient_tiles<true, false>(h, at, groups, unit, s, dp, slope, tiles);
          } else {
            score_gradient_tiles<false, false>(h, at, groups, unit, s, dp, slope, tiles);
          }
          for (int j = 0; j < groups; ++j) {
            for (int d = 0; d < d_tiles; d += 2) {
              add_square(ds_rows + j * 4 * kTileBytes, 2 * kTileBytes, kTileBytes,
                         kt.k_rows + d * kTileBytes, kTileBytes, d_tiles * kTileBytes, 2,
                         dq + (at + 32 * j) * width + 16 * d, width);
            }
          }
        }
        const int64_t row_tiles = t / 32 * d_tiles * kTileBytes;
        for (int d = 0; d < d_tiles; d += 2) {
          for (int v = 0; v < kLaneTiles; v += 2) {
            output_square(dout_tiles + row_tiles, d_tiles, p, steps, d, v, dv_sum);
            output_square(q_tiles + row_tiles, d_tiles, ds, steps, d, v, dk_sum);
          }
        }
      }
      if (g == group - 1) store_dkv<bf16>(a, u, key, dk_sum, dv_sum);
    }
    if (a.dq_partial == nullptr) store_dq<bf16>(a, u, h.head, dq, width);
  }
}

}  // namespace

void attention_bwd_amx(const AttentionBwdArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) bwd_unit(a, unit_at(a.fwd, i));
}

#else

void attention_bwd_amx(const AttentionBwdArgs&, int64_t, int64_t) {}

#endif

}  // namespace lmfast::LMFAST_ISA
