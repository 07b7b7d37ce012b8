// Decoding on int8 storage by integer products (VNNI's vpdpbusd), where the fp32 kernel
// (attention_decode.cpp) is bound by widening: 12 instructions for 64 numbers, beside the products'
// sums across lanes. Here 64 numbers take a product per part of the other factor, and keys are
// lanes, so that nothing is summed across.
//
// The other factor, a query or 64 probabilities times their scales, becomes integers of 23 bits (15
// for the probabilities of 16-bit results), in parts of 8 bits: sums of their products with int8
// are exact, and a score is as exact as one in fp32. The instruction multiplies unsigned by signed
// numbers: stored ones have 128 added, and sums start at -128 times the sum of the other factor.
#include "../amx.h"
#include "attention_decode_unit.h"

namespace lmfast::LMFAST_ISA {

#if defined(LMFAST_AMX)

namespace {

constexpr int kBlock = 64;  // numbers of a row taken at once

// Numbers of which the largest is in this range have integers of full precision.
LMFAST_INLINE bool has_integers(float largest) { return largest >= 1e-30f && largest <= 1e30f; }

LMFAST_INLINE VecF absolute(VecF x) { return {_mm512_abs_ps(x.v)}; }
LMFAST_INLINE float largest_of(const float* x, int64_t n) {
  VecF top = VecF::zero();
  for (int64_t i = 0; i < n; i += kVec) {
    // The second operand, here the new one, is returned when one is NaN.
    const VecF y = absolute(VecF::load(x + i));
    top = max(top, y);
    if (_mm512_cmp_ps_mask(y.v, y.v, _CMP_UNORD_Q) != 0) return kInfinity;
  }
  return hmax(top);
}

// What the sums of products with integers are multiplied by, and start at.
struct Start {
  float unit;
  int32_t sums[3];
};

// n numbers (a multiple of 16) as integers, part i of all of them at parts + i * stride. The last
// part is the leading one.
template <int kParts>
LMFAST_INLINE Start to_integers(const float* x, int64_t n, float largest, int8_t* parts,
                                int64_t stride) {
  // Below 127 (256^2 + 256 + 1) and 127 (256 + 1), where the leading part would be 128, by more
  // than the product with `factor` is rounded.
  constexpr float kMost = kParts == 3 ? 8355000.0f : 32600.0f;
  const bool zero = largest == 0.0f;
  const VecF factor = VecF::set1(zero ? 0.0f : kMost / largest);
  const __m512i half = _mm512_set1_epi32(128), byte = _mm512_set1_epi32(255);
  __m512i sums[3] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
  for (int64_t i = 0; i < n; i += 16) {
    __m512i rest = _mm512_cvtps_epi32((VecF::load(x + i) * factor).v);
#pragma GCC unroll 3
    for (int part = 0; part < kParts; ++part) {
      __m512i low = rest;
      if (part + 1 < kParts) {  // in [-128, 127], so that the others are nearest
        low = _mm512_sub_epi32(_mm512_and_si512(_mm512_add_epi32(rest, half), byte), half);
        rest = _mm512_srai_epi32(_mm512_sub_epi32(rest, low), 8);
      }
      sums[part] = _mm512_add_epi32(sums[part], low);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(parts + part * stride + i),
                       _mm512_cvtepi32_epi8(low));
    }
  }
  Start start{zero ? 0.0f : largest / kMost, {}};
  for (int part = 0; part < kParts; ++part) {
    start.sums[part] = -128 * _mm512_reduce_add_epi32(sums[part]);
  }
  return start;
}

// Sums of all parts as one number.
template <int kParts>
LMFAST_INLINE VecF of_parts(const __m512i* sums, float unit) {
  const __m512i low = _mm512_add_epi32(_mm512_slli_epi32(sums[1], 8), sums[0]);
  VecF x{_mm512_cvtepi32_ps(low)};
  if constexpr (kParts == 3) {
    x = fmadd(VecF{_mm512_cvtepi32_ps(sums[2])}, VecF::set1(65536.0f), x);
  }
  return x * VecF::set1(unit);
}

LMFAST_INLINE __m512i load_unsigned(const int8_t* p, int64_t n) {
  const __mmask64 mask = n >= kBlock ? ~0ull : (1ull << n) - 1ull;
  return _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, p), _mm512_set1_epi8(-128));
}
LMFAST_INLINE int32_t four_at(const int8_t* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return x;
}

// out[r] += sum over j of p[r][j] v[j] for 64 columns, `n` of them, from d on; p as parts of 64
// bytes, kParts to a row.
template <int kRows, int kParts>
LMFAST_INLINE void add_block(const int8_t* p, const Start* start, const Keys<int8_t>& v, int64_t d,
                             int64_t n, int ahead, float* out, int64_t out_stride) {
  __m512i sum[kRows][4][kParts];
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 3
      for (int part = 0; part < kParts; ++part) {
        sum[r][i][part] = _mm512_set1_epi32(start[r].sums[part]);
      }
    }
  }
  for (int j = 0; j < v.count; j += 4) {
    __m512i x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      // Behind the last row the factors are zeros.
      const int at = j + i < v.count ? j + i : v.count - 1;
      prefetch(v.ahead(j + i + ahead) + d);
      x[i] = load_unsigned(v.rows + at * v.stride + d, n);
    }
    // Four keys of a column next to each other.
    const __m512i a = _mm512_unpacklo_epi8(x[0], x[1]), b = _mm512_unpacklo_epi8(x[2], x[3]);
    const __m512i c = _mm512_unpackhi_epi8(x[0], x[1]), e = _mm512_unpackhi_epi8(x[2], x[3]);
    const __m512i columns[4] = {_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b),
                                _mm512_unpacklo_epi16(c, e), _mm512_unpackhi_epi16(c, e)};
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
      for (int part = 0; part < kParts; ++part) {
        const __m512i four = _mm512_set1_epi32(four_at(p + (r * kParts + part) * kLanes + j));
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          sum[r][i][part] = _mm512_dpbusd_epi32(sum[r][i][part], columns[i], four);
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) {
    __m512 y[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) y[i] = of_parts<kParts>(sum[r][i], start[r].unit).v;
    // y[i] has columns 4 i to 4 i + 3 of every 16.
    const __m512 a = _mm512_shuffle_f32x4(y[0], y[1], 0x44);
    const __m512 b = _mm512_shuffle_f32x4(y[2], y[3], 0x44);
    const __m512 c = _mm512_shuffle_f32x4(y[0], y[1], 0xee);
    const __m512 e = _mm512_shuffle_f32x4(y[2], y[3], 0xee);
    const VecF in_order[4] = {{_mm512_shuffle_f32x4(a, b, 0x88)},
                              {_mm512_shuffle_f32x4(a, b, 0xdd)},
                              {_mm512_shuffle_f32x4(c, e, 0x88)},
                              {_mm512_shuffle_f32x4(c, e, 0xdd)}};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      if (16 * i >= n) break;
      float* at = out + r * out_stride + d + 16 * i;
      (VecF::load(at) + in_order[i]).store(at);
    }
  }
}

template <int kValueParts>
struct IntegerProducts {
  using Key = int8_t;
  using Query = float;
  static constexpr int kRowsAtOnce = 4;

  // In the place of `padded` floats: three parts of `padded` bytes, and how sums start.
  static LMFAST_INLINE void of_query(float* q, int64_t padded) {
    float row[256];
    memcpy(row, q, sizeof(float) * static_cast<size_t>(padded));
    int8_t* parts = reinterpret_cast<int8_t*>(q);
    const Start start = to_integers<3>(row, padded, largest_of(row, padded), parts, padded);
    memcpy(parts + 3 * padded, &start, sizeof(start));
  }
  static LMFAST_INLINE void in_order(float*, int64_t) {}

  template <int kRows>
  static LMFAST_INLINE void dot(const float* q, int64_t padded, const Keys<int8_t>& k,
                                int64_t width, float* s) {
    const int8_t* parts = reinterpret_cast<const int8_t*>(q);
    const int ahead = rows_ahead<int8_t>(width);
    Start start[kRows];
    for (int r = 0; r < kRows; ++r) {
      memcpy(&start[r], parts + (4 * r + 3) * padded, sizeof(Start));
    }
    for (int j = 0; j < k.count; j += 16) {
      __m512i sum[kRows][3];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
        for (int part = 0; part < 3; ++part) {
          sum[r][part] = _mm512_set1_epi32(start[r].sums[part]);
        }
      }
      for (int64_t d = 0; d < width; d += kBlock) {
        __m512i x[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          const int at = j + i < k.count ? j + i : k.count - 1;
          prefetch(k.ahead(j + i + ahead) + d);
          x[i] = load_unsigned(k.rows + at * k.stride + d, width - d);
        }
        transpose_words(x);
        const int words = static_cast<int>(padded - d < kBlock ? padded - d : kBlock) / 4;
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          if (i >= words) break;
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
            for (int part = 0; part < 3; ++part) {
              const __m512i four =
                  _mm512_set1_epi32(four_at(parts + (4 * r + part) * padded + d + 4 * i));
              sum[r][part] = _mm512_dpbusd_epi32(sum[r][part], x[i], four);
            }
          }
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        of_parts<3>(sum[r], start[r].unit).store(s + r * kLanes + j);
      }
    }
  }

  template <int kRows>
  static LMFAST_INLINE void add(const float* p, const Keys<int8_t>& v, int64_t width, float* out,
                                int64_t out_stride) {
    constexpr int kPair = kRows > 1 ? 2 : 1;
    alignas(64) int8_t parts[kPair * kValueParts * kLanes];
    Start start[kPair];
    const int ahead = rows_ahead<int8_t>(width);
    for (int r = 0; r < kRows; r += kPair) {
      float most[kPair];
      bool whole = true;
      for (int i = 0; i < kPair; ++i) {
        most[i] = largest_of(p + (r + i) * kLanes, kLanes);
        whole = whole && (most[i] == 0.0f || has_integers(most[i]));
      }
      float* to = out + r * out_stride;
      if (!whole) {
        FloatProducts<int8_t>::add<kPair>(p + r * kLanes, v, width, to, out_stride);
        continue;
      }
      for (int i = 0; i < kPair; ++i) {
        start[i] = to_integers<kValueParts>(p + (r + i) * kLanes, kLanes, most[i],
                                            parts + i * kValueParts * kLanes, kLanes);
      }
      for (int64_t d = 0; d < width; d += kBlock) {
        add_block<kPair, kValueParts>(parts, start, v, d, width - d, ahead, to, out_stride);
      }
    }
  }
};

// Whether all queries of a unit have integers.
bool have_integers(const AttentionArgs& a, int64_t unit) {
  const int64_t pair = unit / a.splits;
  const Unit u{pair / a.kv_heads, pair % a.kv_heads, 0, unit % a.splits};
  const int64_t padded = round_up(a.head_dim, 32);
  float q[256];
  for (int64_t r = 0; r < attention_rows(a); ++r) {
    load_query<FloatProducts<int8_t>>(a, u.b, row_at(a, u, r), padded, q);
    const float most = largest_of(q, padded);
    if (most != 0.0f && !has_integers(most)) return false;
  }
  return true;
}

}  // namespace

void attention_decode_int8(const AttentionArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (!have_integers(a, i)) {
      decode_unit<FloatProducts<int8_t>>(a, i);
    } else if (a.dtype == DType::kF32) {
      decode_unit<IntegerProducts<3>>(a, i);
    } else {
      decode_unit<IntegerProducts<2>>(a, i);
    }
  }
}

#else

void attention_decode_int8(const AttentionArgs&, int64_t, int64_t) {}

#endif

}  // namespace lmfast::LMFAST_ISA
