// Queries times int8 keys by bytes, and what both products of attention_decode_bytes.cpp need.
#pragma once

#include "../simd_transpose.h"
#include "attention_decode_unit.h"

#if defined(__AVX512VNNI__)

namespace lmfast::LMFAST_ISA {
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

constexpr int64_t kMostAcross = 2 * kBytes;

// Calls f with as many rows as there are left, at most kRows, as a constant.
template <int kRows, class F>
LMFAST_INLINE void by_most_rows(int rows, const F& f, int r = 0) {
  for (; rows - r >= kRows; r += kRows) f(r, Constant<kRows>());
  if constexpr (kRows > 1) by_most_rows<kRows - 1>(rows, f, r);
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

template <int kParts>
struct ByteKeys {
  using Key = int8_t;
  using Query = int8_t;
  static constexpr float kMostOfQuery = kParts == 3 ? 127.0f * 65536 : 127.0f * 256;

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
    if (rows == 1 && width <= kMostAcross) return dot_across(q, k, width, ahead, s);
    __m512i lanes[256 / 4];
    for (int j = 0; j < k.count; j += 16) {
      keys_to_lanes(k, j, width, ahead, lanes);
      by_most_rows<4>(rows, [&](int r, auto count) {
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
  // A single row: its numbers stay in registers, and sums go across lanes.
  static LMFAST_INLINE void dot_across(const int8_t* q, const Keys<int8_t>& k, int64_t width,
                                       int ahead, float* s) {
    if (width > kBytes) return dot_lines<2>(q, k, width, ahead, s);
    dot_lines<1>(q, k, width, ahead, s);
  }
  template <int kLines>
  static LMFAST_INLINE void dot_lines(const int8_t* q, const Keys<int8_t>& k, int64_t width,
                                      int ahead, float* s) {
    const __m512i sign = _mm512_set1_epi8(-128);
    QueryHead head;
    memcpy(&head, q, sizeof(head));
    const VecF factor = VecF::set1(head.factor);
    __m512i numbers[kParts][kLines], start[kParts];
#pragma GCC unroll 3
    for (int part = 0; part < kParts; ++part) {
      start[part] = _mm512_setzero_si512();
#pragma GCC unroll 2
      for (int i = 0; i < kLines; ++i) {
        const int8_t* at = q + sizeof(head) + part * query_bytes(width) + i * kBytes;
        numbers[part][i] = _mm512_load_si512(at);
        add_products(start[part], sign, numbers[part][i]);  // 128 times them
      }
      start[part] = _mm512_sub_epi32(_mm512_setzero_si512(), start[part]);
    }
    const __m512i none = _mm512_setzero_si512();
    for (int j = 0; j < k.count; j += kVec) {
      VecF total[kVec];
#pragma GCC unroll 4
      for (int first = 0; first < kVec; first += 4) {
        __m512i sums[4][kParts];
#pragma GCC unroll 12
        for (int i = 0; i < 4 * kParts; ++i) sums[i / kParts][i % kParts] = start[i % kParts];
#pragma GCC unroll 2
        for (int line = 0; line < kLines; ++line) {
          __m512i x[4];
          load_rows<4>(k, j + first, line * kBytes, width, ahead, x);
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) {
            const __m512i key = _mm512_xor_si512(x[i], sign);
#pragma GCC unroll 3
            for (int part = 0; part < kParts; ++part) {
              add_products(sums[i][part], key, numbers[part][line]);
            }
          }
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) total[first + i] = whole<kParts>(sums[i], none, none);
      }
      (sums_across(total) * factor).store(s + j);
    }
  }
};

}  // namespace
}  // namespace lmfast::LMFAST_ISA

#endif
