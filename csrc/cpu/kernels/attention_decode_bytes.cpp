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
// all rows, so that no sum goes across lanes. An instruction takes unsigned by signed bytes: keys
// get 128 added, and 128 times the sum of the query is taken off. Values: bytes of four keys become
// neighbours by 2 shuffles for 64 numbers; probabilities are the unsigned side.
//
// Zen 4, one core, in its cache, against widening: four rows of 128 with queries of 16 bits 1.32
// times as fast, eight 1.6; in fp32 1.08 and 1.25; one row as fast or 1.1 times. What is left are
// the shuffles, and softmax with the cutting of probabilities, 0.1 us a row for every 64 keys.
//
// What integers cannot hold (NaN, infinity, scales below zero) is left to the products in fp32.
#include "../simd_transpose.h"
#include "attention_decode_unit.h"

namespace lmfast::LMFAST_ISA {

#if defined(__AVX512VNNI__)

namespace {

constexpr int kBytes = 64;           // of a vector
constexpr float kSmallest = 1e-30f;  // whose inverse, times 2^24, fp32 still holds

struct Four {
  int8_t bytes[4];
};
LMFAST_INLINE __m512i four_bytes(const void* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return _mm512_set1_epi32(x);
}
// sum += four unsigned bytes times four signed ones, in every lane. As asm: around the intrinsic
// GCC 12 copies every sum there and back.
LMFAST_INLINE void add_products(__m512i& sum, __m512i x, __m512i y) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y));
}
// The same signed ones in all lanes.
LMFAST_INLINE void add_products(__m512i& sum, __m512i x, const int8_t* y) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(x), "m"(*reinterpret_cast<const Four*>(y)));
}
LMFAST_INLINE __mmask64 first_bytes(int64_t n) {
  return n >= kBytes ? ~__mmask64{0} : (__mmask64{1} << n) - 1;
}
LMFAST_INLINE VecF to_float(__m512i x) { return {_mm512_cvtepi32_ps(x)}; }

// The number whose bytes' sums these are, the most significant first: two bytes' fit into 32 bits.
template <int kParts>
LMFAST_INLINE VecF whole(const __m512i (&sums)[kParts], __m512i high_offset, __m512i low_offset) {
  const __m512i high =
      _mm512_add_epi32(_mm512_add_epi32(_mm512_slli_epi32(sums[0], 8), sums[1]), high_offset);
  if constexpr (kParts == 2) return to_float(high);
  const VecF low = to_float(_mm512_add_epi32(sums[kParts - 1], low_offset));
  return fmadd(to_float(high), VecF::set1(256.0f), low);
}

// A query row: this, and behind it its numbers' bytes, kParts rows of as many as the head size,
// rounded up to 64.
struct alignas(kBytes) QueryHead {
  float factor;
  int32_t high_offset, low_offset;
};
LMFAST_INLINE int64_t query_bytes(int64_t width) { return round_up(width, kBytes); }

// Bytes [d, d + 64) of kCount rows from row j on; behind the last row that again, whose result is
// hidden and whose weight is zero.
template <int kCount>
LMFAST_INLINE void load_rows(const Keys<int8_t>& k, int j, int64_t d, int64_t width, int ahead,
                             __m512i (&x)[kCount]) {
  const int8_t* later = k.ahead(j + ahead) + d;
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) prefetch(later + i * k.stride);
  const int8_t* row = k.rows + j * k.stride + d;
  if (j + kCount <= k.count && width - d >= kBytes) {
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) x[i] = _mm512_loadu_si512(row + i * k.stride);
    return;
  }
  const __mmask64 mask = first_bytes(width - d);
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) {
    x[i] = _mm512_maskz_loadu_epi8(mask, row + (j + i < k.count ? i : k.count - 1 - j) * k.stride);
  }
}

// 16 keys from row j on, plus 128, as lanes: lanes[w] holds their bytes [4 w, 4 w + 4).
LMFAST_INLINE void keys_to_lanes(const Keys<int8_t>& k, int j, int64_t width, int ahead,
                                 __m512i* lanes) {
  const __m512i sign = _mm512_set1_epi8(-128);
  for (int64_t d = 0; d < width; d += kBytes) {
    __m512i keys[16];
    load_rows<16>(k, j, d, width, ahead, keys);
    transpose_words(keys);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      _mm512_store_si512(lanes + d / 4 + i, _mm512_xor_si512(keys[i], sign));
    }
  }
}

// Bytes of 64 columns from d on with those of four keys as neighbours: fours[4 q + i] holds keys
// [4 q, 4 q + 4) and, of each 16 columns, those from 4 i on.
LMFAST_INLINE void values_to_fours(const Keys<int8_t>& v, int64_t d, int64_t width, int ahead,
                                   __m512i* fours) {
  for (int j = 0; j < v.count; j += 4) {
    __m512i x[4];
    load_rows<4>(v, j, d, width, ahead, x);
    const __m512i a = _mm512_unpacklo_epi8(x[0], x[1]), b = _mm512_unpackhi_epi8(x[0], x[1]);
    const __m512i c = _mm512_unpacklo_epi8(x[2], x[3]), e = _mm512_unpackhi_epi8(x[2], x[3]);
    _mm512_store_si512(fours + j, _mm512_unpacklo_epi16(a, c));
    _mm512_store_si512(fours + j + 1, _mm512_unpackhi_epi16(a, c));
    _mm512_store_si512(fours + j + 2, _mm512_unpacklo_epi16(b, e));
    _mm512_store_si512(fours + j + 3, _mm512_unpackhi_epi16(b, e));
  }
}

// out[r] += factor[r] * sum over j of p[r][j] v[j] for up to 64 columns; p as kParts rows of bytes.
template <int kParts, int kRows>
LMFAST_INLINE void add_fours(const uint8_t* p, const float* factor, const __m512i* fours, int count,
                             int64_t columns, float* out, int64_t out_stride) {
  __m512 y[kRows][4];
#pragma GCC unroll 2
  for (int half = 0; half < 4; half += 2) {
    __m512i sums[kRows][2][kParts];
#pragma GCC unroll 16
    for (int i = 0; i < 2 * kRows * kParts; ++i) {
      sums[i / (2 * kParts)][i / kParts % 2][i % kParts] = _mm512_setzero_si512();
    }
    for (int j = 0; j < count; j += 4) {
      const __m512i first = _mm512_load_si512(fours + j + half);
      const __m512i second = _mm512_load_si512(fours + j + half + 1);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
        for (int part = 0; part < kParts; ++part) {
          const __m512i weights = four_bytes(p + (r * kParts + part) * kBytes + j);
          add_products(sums[r][0][part], weights, first);
          add_products(sums[r][1][part], weights, second);
        }
      }
    }
    const __m512i none = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      y[r][half] = whole<kParts>(sums[r][0], none, none).v;
      y[r][half + 1] = whole<kParts>(sums[r][1], none, none).v;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const __m512 a = _mm512_shuffle_f32x4(y[r][0], y[r][1], 0x44);
    const __m512 b = _mm512_shuffle_f32x4(y[r][0], y[r][1], 0xee);
    const __m512 c = _mm512_shuffle_f32x4(y[r][2], y[r][3], 0x44);
    const __m512 e = _mm512_shuffle_f32x4(y[r][2], y[r][3], 0xee);
    const VecF in_order[4] = {{_mm512_shuffle_f32x4(a, c, 0x88)},
                              {_mm512_shuffle_f32x4(a, c, 0xdd)},
                              {_mm512_shuffle_f32x4(b, e, 0x88)},
                              {_mm512_shuffle_f32x4(b, e, 0xdd)}};
    const VecF by = VecF::set1(factor[r]);
    for (int i = 0; i < 4 && i * kVec < columns; ++i) {
      float* at = out + r * out_stride + i * kVec;
      fmadd(in_order[i], by, VecF::load(at)).store(at);
    }
  }
}

template <int kParts>
struct ByteProducts {
  using Key = int8_t;
  using Query = int8_t;
  static constexpr float kMostOfQuery = kParts == 3 ? 127.0f * 65536 : 127.0f * 256;
  static constexpr int32_t kMostOfWeight = kParts == 3 ? 0xffffff : 0xffff;

  static LMFAST_INLINE int64_t query_stride(int64_t width) {
    return static_cast<int64_t>(sizeof(QueryHead)) + kParts * query_bytes(width);
  }

  // False if the row is not made of finite numbers, or of nothing but tiny ones.
  static LMFAST_INLINE bool largest_of_query(const AttentionArgs& a, int64_t b, Row row, float* x,
                                             float* largest) {
    const int64_t bytes = query_bytes(a.head_dim);
    memset(x, 0, sizeof(float) * static_cast<size_t>(bytes));
    to_float_query(a, b, row, x);
    __m512i top = _mm512_setzero_si512();  // as integers floats are in order, NaN above infinity
    for (int64_t d = 0; d < bytes; d += kVec) {
      const __m512i bits = _mm512_castps_si512(VecF::load(x + d).v);
      top = _mm512_max_epi32(top, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
    }
    const int32_t most = _mm512_reduce_max_epi32(top);
    memcpy(largest, &most, sizeof(most));
    return most == 0 || (most < 0x7f800000 && *largest >= kSmallest);
  }

  static LMFAST_INLINE void load_query(const AttentionArgs& a, int64_t b, Row row, int64_t,
                                       int8_t* q) {
    alignas(64) float x[256];
    float largest;
    largest_of_query(a, b, row, x, &largest);
    const VecF scale = VecF::set1(largest > 0.0f ? kMostOfQuery / largest : 0.0f);
    const int64_t bytes = query_bytes(a.head_dim);
    int8_t* to = q + sizeof(QueryHead);
    __m512i high = _mm512_setzero_si512(), low = high;
    for (int64_t d = 0; d < bytes; d += kVec) {
      __m512i rest = _mm512_cvtps_epi32((VecF::load(x + d) * scale).v);
#pragma GCC unroll 3
      for (int part = kParts - 1; part >= 0; --part) {
        const __m128i byte = _mm512_cvtepi32_epi8(rest);
        _mm_store_si128(reinterpret_cast<__m128i*>(to + part * bytes + d), byte);
        if (part == 1) high = _mm512_add_epi32(high, rest);
        const __m512i value = _mm512_cvtepi8_epi32(byte);
        if (part == 2) low = _mm512_add_epi32(low, value);
        rest = _mm512_srai_epi32(_mm512_sub_epi32(rest, value), 8);
      }
    }
    const QueryHead head{largest / kMostOfQuery, -128 * _mm512_reduce_add_epi32(high),
                         -128 * _mm512_reduce_add_epi32(low)};
    memcpy(q, &head, sizeof(head));
  }

  static LMFAST_INLINE void dot(int rows, const int8_t* q, int64_t q_stride, const Keys<int8_t>& k,
                                int64_t width, float* s) {
    const int ahead = rows_ahead<int8_t>(width);
    __m512i lanes[256 / 4];
    for (int j = 0; j < k.count; j += 16) {
      keys_to_lanes(k, j, width, ahead, lanes);
      by_rows<4>(rows, [&](int r, auto count) {
        dot_lanes<decltype(count)::value>(q + r * q_stride, q_stride, lanes, width,
                                          s + r * kLanes + j);
      });
    }
  }
  template <int kRows>
  static LMFAST_INLINE void dot_lanes(const int8_t* q, int64_t q_stride, const __m512i* lanes,
                                      int64_t width, float* s) {
    const int64_t bytes = query_bytes(width);
    const int words = static_cast<int>((width + 3) / 4);
    __m512i sums[kRows][kParts];
#pragma GCC unroll 12
    for (int i = 0; i < kRows * kParts; ++i) {
      sums[i / kParts][i % kParts] = _mm512_setzero_si512();
    }
    const int8_t* at = q + sizeof(QueryHead);
    for (int w = 0; w < words; ++w, at += 4) {
      const __m512i key = _mm512_load_si512(lanes + w);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
        for (int part = 0; part < kParts; ++part) {
          add_products(sums[r][part], key, at + r * q_stride + part * bytes);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      QueryHead head;
      memcpy(&head, q + r * q_stride, sizeof(head));
      const VecF x = whole<kParts>(sums[r], _mm512_set1_epi32(head.high_offset),
                                   _mm512_set1_epi32(head.low_offset));
      (x * VecF::set1(head.factor)).store(s + r * kLanes);
    }
  }

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
    constexpr int kTogether = kParts == 2 ? 4 : 2;  // rows whose sums fit into registers
    alignas(64) uint8_t bytes[kDecodeRows * kParts * kBytes];
    float factor[kDecodeRows];
    for (int r = 0; r < rows; ++r) {
      if (!weights_as_bytes(p + r * kLanes, bytes + r * kParts * kBytes, factor + r)) {
        return FloatProducts<int8_t>::add(rows, p, v, width, out, out_stride);
      }
    }
    const int ahead = rows_ahead<int8_t>(width);
    __m512i fours[kLanes];
    for (int64_t d = 0; d < width; d += kBytes) {
      values_to_fours(v, d, width, ahead, fours);
      by_rows<kTogether>(rows, [&](int r, auto count) {
        add_fours<kParts, decltype(count)::value>(bytes + r * kParts * kBytes, factor + r, fours,
                                                  v.count, width - d, out + r * out_stride + d,
                                                  out_stride);
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
