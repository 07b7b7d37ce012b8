// Decoding with int8 keys and values where AVX512-VNNI multiplies bytes without widening them;
// otherwise as attention_decode.cpp.
//
// Widened to fp32, 64 numbers take 8 instructions to convert and 4 per query row to multiply: with
// four rows to a head that is half the speed of the memory. Here queries and probabilities are
// integers of 24 bits, a row's largest being 127 * 2^16 or 2^24 - 1, cut into bytes that are
// multiplied separately: 3 instructions a row, exact, and as near to the given number as fp32 sums
// are. With bf16 and fp16 queries, whose own rounding is coarser but for small numbers of fp16, two
// bytes are enough.
//
// Keys: 16 of them become lanes by a transposition of 32-bit words, 4 shuffles for 64 numbers and
// all rows, so that no sum goes across lanes; a single row's numbers stay in registers, and its
// sums do go across, 2 shuffles a key. An instruction takes unsigned by signed bytes: keys get 128
// added, and 128 times the sum of the query is taken off. Values: bytes of four keys become
// neighbours by 2 shuffles for 64 numbers; probabilities are the unsigned side.
//
// Zen 4 (one vpdpbusd of 64 bytes a cycle), one core, in its cache. One row, heads of 64 and 128:
// 23 and 31 GB/s at 3.7 GHz, 1.4 times as fast as by transposition, 1.5 times as by widening. Four
// rows of 128: 4,650 cycles for 64 keys, 10 GB/s, of which 3,072 are vpdpbusd: even alone those
// were 20 GB/s a core, so queries of 24 bits cannot follow the memory; 1.1 times widening, of 16
// bits 1.32, eight rows 1.25 and 1.6. The rest is what does not overlap with them: shuffles, where
// 64 keys' scores turn into weights, and softmax, 100 cycles a row. Tried without gain: multiplying
// transposed keys from registers, and two vectors of keys for each number read.
//
// What integers cannot hold (NaN, infinity, scales below zero) is left to the products in fp32.
#include "attention_decode_bytes_keys.h"

namespace lmfast::LMFAST_ISA {

#if defined(__AVX512VNNI__)

namespace {

// Values of one block's keys, 64 columns from d on.
struct ValueColumns {
  const Keys<int8_t>& v;
  int64_t d, width;
  int ahead;
};

// The bytes of keys [j, j + 4) as neighbours: x[i] holds, of each 16 columns, those from 4 i on.
LMFAST_INLINE void load_fours(const ValueColumns& c, int j, __m512i (&x)[4]) {
  __m512i row[4];
  load_rows<4>(c.v, j, c.d, c.width, c.ahead, row);
  const __m512i low = _mm512_unpacklo_epi8(row[0], row[1]);
  const __m512i high = _mm512_unpackhi_epi8(row[0], row[1]);
  const __m512i next_low = _mm512_unpacklo_epi8(row[2], row[3]);
  const __m512i next_high = _mm512_unpackhi_epi8(row[2], row[3]);
  x[0] = _mm512_unpacklo_epi16(low, next_low);
  x[1] = _mm512_unpackhi_epi16(low, next_low);
  x[2] = _mm512_unpacklo_epi16(high, next_high);
  x[3] = _mm512_unpackhi_epi16(high, next_high);
}

// out[r] += factor[r] * sum over j of p[r][j] v[j] for up to 64 columns; p as kParts rows of bytes.
// The first rows bring the bytes of four keys together, as they multiply, and leave them in `fours`
// for others.
template <int kParts, int kRows, bool kFirst>
LMFAST_INLINE void add_fours(const uint8_t* p, const float* factor, const ValueColumns& c,
                             __m512i* fours, float* out, int64_t out_stride) {
  __m512i sums[kRows][4][kParts];
#pragma GCC unroll 24
  for (int i = 0; i < 4 * kRows * kParts; ++i) {
    sums[i / (4 * kParts)][i / kParts % 4][i % kParts] = _mm512_setzero_si512();
  }
  for (int j = 0; j < c.v.count; j += 4) {
    __m512i x[4];
    if constexpr (kFirst) {
      load_fours(c, j, x);
      if (fours != nullptr) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) _mm512_store_si512(fours + j + i, x[i]);
      }
    } else {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) x[i] = _mm512_load_si512(fours + j + i);
    }
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
      for (int part = 0; part < kParts; ++part) {
        const __m512i weights = four_bytes(p + (r * kParts + part) * kBytes + j);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) add_products(sums[r][i][part], weights, x[i]);
      }
    }
  }
  const __m512i none = _mm512_setzero_si512();
  const int64_t columns = c.width - c.d;
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) {
    __m512 y[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) y[i] = whole<kParts>(sums[r][i], none, none).v;
    const __m512 low = _mm512_shuffle_f32x4(y[0], y[1], 0x44);
    const __m512 high = _mm512_shuffle_f32x4(y[0], y[1], 0xee);
    const __m512 next_low = _mm512_shuffle_f32x4(y[2], y[3], 0x44);
    const __m512 next_high = _mm512_shuffle_f32x4(y[2], y[3], 0xee);
    const VecF in_order[4] = {{_mm512_shuffle_f32x4(low, next_low, 0x88)},
                              {_mm512_shuffle_f32x4(low, next_low, 0xdd)},
                              {_mm512_shuffle_f32x4(high, next_high, 0x88)},
                              {_mm512_shuffle_f32x4(high, next_high, 0xdd)}};
    const VecF by = VecF::set1(factor[r]);
    for (int i = 0; i < 4 && i * kVec < columns; ++i) {
      float* at = out + r * out_stride + i * kVec;
      fmadd(in_order[i], by, VecF::load(at)).store(at);
    }
  }
}

template <int kParts>
struct ByteProducts : ByteKeys<kParts> {
  static constexpr int32_t kMostOfWeight = kParts == 3 ? 0xffffff : 0xffff;

  // The weights as integers; false if one is negative, infinite, NaN, or all are tiny.
  static LMFAST_INLINE bool weights_as_bytes(const float* p, uint8_t* bytes, float* factor) {
    VecF most = VecF::zero();
    const VecF zero = VecF::zero(), infinity = VecF::set1(kInfinity);
    for (int j = 0; j < kLanes; j += kVec) {
      const VecF x = VecF::load(p + j);
      if ((_mm512_cmp_ps_mask(x.v, zero.v, _CMP_GE_OQ) &
           _mm512_cmp_ps_mask(x.v, infinity.v, _CMP_LT_OQ)) != 0xffff) {
        return false;
      }
      most = max(most, x);
    }
    const float largest = hmax(most);
    if (largest > 0.0f && largest < kSmallest) return false;
    const VecF scale = VecF::set1(largest > 0.0f ? kMostOfWeight / largest : 0.0f);
    *factor = largest / kMostOfWeight;
    for (int j = 0; j < kLanes; j += kVec) {
      const __m512i x = _mm512_min_epi32(_mm512_cvtps_epi32((VecF::load(p + j) * scale).v),
                                         _mm512_set1_epi32(kMostOfWeight));
#pragma GCC unroll 3
      for (int part = 0; part < kParts; ++part) {
        const __m128i byte = _mm512_cvtepi32_epi8(_mm512_srli_epi32(x, 8 * (kParts - 1 - part)));
        _mm_store_si128(reinterpret_cast<__m128i*>(bytes + part * kBytes + j), byte);
      }
    }
    return true;
  }

  static LMFAST_INLINE void add(int rows, const float* p, const Keys<int8_t>& v, int64_t width,
                                float* out, int64_t out_stride) {
    constexpr int kTogether = 2;  // rows whose sums fit into registers
    alignas(64) uint8_t bytes[kDecodeRows * kParts * kBytes];
    float factor[kDecodeRows];
    for (int r = 0; r < rows; ++r) {
      if (!weights_as_bytes(p + r * kLanes, bytes + r * kParts * kBytes, factor + r)) {
        return FloatProducts<int8_t>::add(rows, p, v, width, out, out_stride);
      }
    }
    __m512i fours[kLanes];
    ValueColumns columns{v, 0, width, rows_ahead<int8_t>(width)};
    for (; columns.d < width; columns.d += kBytes) {
      by_rows<kTogether>(rows, [&](int r, auto count) {
        constexpr int kRows = decltype(count)::value;
        const uint8_t* weights = bytes + r * kParts * kBytes;
        float* to = out + r * out_stride + columns.d;
        if (r > 0) {
          add_fours<kParts, kRows, false>(weights, factor + r, columns, fours, to, out_stride);
        } else {
          add_fours<kParts, kRows, true>(weights, factor, columns, rows > kRows ? fours : nullptr,
                                         to, out_stride);
        }
      });
    }
  }

  static LMFAST_INLINE void in_order(float*, int64_t) {}
};

template <int kParts>
LMFAST_INLINE void decode_bytes(const AttentionArgs& a, int64_t unit) {
  const int64_t pair = unit / a.splits;
  const Unit u{pair / a.kv_heads, pair % a.kv_heads, 0, unit % a.splits};
  alignas(64) float x[256];
  float largest;
  for (int64_t r = 0; r < attention_rows(a); ++r) {
    if (!ByteProducts<kParts>::largest_of_query(a, u.b, row_at(a, u, r), x, &largest)) {
      return attention_decode(a, unit, unit + 1);
    }
  }
  decode_unit<ByteProducts<kParts>>(a, unit);
}

}  // namespace

void attention_decode_bytes(const AttentionArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (a.dtype == DType::kF32) {
      decode_bytes<3>(a, i);
    } else {
      decode_bytes<2>(a, i);
    }
  }
}

#else

void attention_decode_bytes(const AttentionArgs& a, int64_t begin, int64_t end) {
  attention_decode(a, begin, end);
}

#endif

}  // namespace lmfast::LMFAST_ISA
