// The two products of decoding, for a few query rows and 64 keys that lie as they are stored.
//
// Scores: a row of keys times a query row is a vector of partial sums; as many of those as there
// are lanes are summed across together, which costs two shuffles a sum instead of four. Outputs
// stay in registers through the keys. Numbers narrower than fp32 are widened as they are read: two
// vectors from 2 W of them, bf16 by a shift and a mask, which leaves even ones in the first vector
// and odd ones in the second; queries and outputs are kept in the same order.
#pragma once

#include "../prefetch.h"
#include "attention_stored.h"

namespace lmfast::LMFAST_ISA {
namespace {

constexpr int kVec = VecF::kWidth, kStep = 2 * kVec;  // numbers of a row taken at once

// 2 W numbers of a row as fp32.
template <class S>
struct Wide {
  static constexpr bool kEvenOdd = false;
  using Query = float;
  VecF a, b;
  static LMFAST_INLINE Wide load(const S* p) { return {load_stored(p), load_stored(p + kVec)}; }
  static LMFAST_INLINE Wide load(const S* p, int n) {
    return {load_stored(p, n < kVec ? n : kVec),
            n > kVec ? load_stored(p + kVec, n - kVec) : VecF::zero()};
  }
};
#if defined(__AVX512F__)
template <>
struct Wide<bf16> {
  static constexpr bool kEvenOdd = true;
  using Query = float;
  VecF a, b;
  static LMFAST_INLINE Wide from(__m512i x) {
    const __m512i odd = _mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
    return {{_mm512_castsi512_ps(_mm512_slli_epi32(x, 16))}, {_mm512_castsi512_ps(odd)}};
  }
  static LMFAST_INLINE Wide load(const bf16* p) { return from(_mm512_loadu_si512(p)); }
  static LMFAST_INLINE Wide load(const bf16* p, int n) {
    const __mmask32 mask = n >= 32 ? 0xffffffffu : (1u << n) - 1u;
    return from(_mm512_maskz_loadu_epi16(mask, p));
  }
};
#elif defined(__AVX2__)
template <>
struct Wide<bf16> {
  static constexpr bool kEvenOdd = true;
  using Query = float;
  VecF a, b;
  static LMFAST_INLINE Wide from(__m256i x) {
    const __m256i odd = _mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xffff0000u)));
    return {{_mm256_castsi256_ps(_mm256_slli_epi32(x, 16))}, {_mm256_castsi256_ps(odd)}};
  }
  static LMFAST_INLINE Wide load(const bf16* p) {
    return from(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static LMFAST_INLINE Wide load(const bf16* p, int n) {
    uint16_t lanes[16] = {};
    memcpy(lanes, p, 2 * static_cast<size_t>(n));
    return from(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes)));
  }
};
#endif
template <class W>
LMFAST_INLINE VecF add_dot(VecF sum, const W& x, const float* q) {
  return fmadd(x.b, VecF::load(q + kVec), fmadd(x.a, VecF::load(q), sum));
}

// Lane i: the sum over the lanes of x[i].
#if defined(__AVX512F__)
LMFAST_INLINE VecF sums_across(VecF (&x)[kVec]) {
  __m512 y[8], z[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {  // of each 128 bits: (0, 1, 0, 1), halves of two of the sums
    const __m512 a = x[2 * i].v, b = x[2 * i + 1].v;
    y[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(y[2 * i]), b = _mm512_castps_pd(y[2 * i + 1]);
    z[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  // z[i] holds sums 4 i to 4 i + 3 of each 128 bits.
  const __m512 low =
      _mm512_add_ps(_mm512_shuffle_f32x4(z[0], z[1], 0x88), _mm512_shuffle_f32x4(z[0], z[1], 0xdd));
  const __m512 high =
      _mm512_add_ps(_mm512_shuffle_f32x4(z[2], z[3], 0x88), _mm512_shuffle_f32x4(z[2], z[3], 0xdd));
  return {
      _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd))};
}
#elif defined(__AVX2__)
LMFAST_INLINE VecF sums_across(VecF (&x)[kVec]) {
  const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(x[0].v, x[1].v), _mm256_hadd_ps(x[2].v, x[3].v));
  const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(x[4].v, x[5].v), _mm256_hadd_ps(x[6].v, x[7].v));
  return {_mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31))};
}
#else
LMFAST_INLINE VecF sums_across(VecF (&x)[kVec]) {
  float lanes[kVec];
  for (int i = 0; i < kVec; ++i) lanes[i] = sum(x[i]);
  return VecF::load(lanes);
}
#endif

// Some rows of one head in one row of storage, and what to ask for meanwhile: row `at` of them is
// as far ahead as it is worth.
template <class S>
struct Keys {
  const S* rows;
  int64_t stride;
  int count;
  const S* next;  // the rows after these
  LMFAST_INLINE const S* ahead(int row) const {
    return row < count ? rows + row * stride : next + (row - count) * stride;
  }
};

// Rows that are as far ahead as it is worth: 16 KB (8 KB cost 3 to 5 %, 2 KB up to 20), 4 KB into
// the first level; at most those that follow.
template <class S>
LMFAST_INLINE int rows_ahead(int64_t width) {
#if defined(__AMX_TILE__)
  constexpr int64_t kBytes = 4096;
#else
  constexpr int64_t kBytes = 16384;
#endif
  const int64_t bytes = (width > 0 ? width : 1) * static_cast<int64_t>(sizeof(S));
  return static_cast<int>(clamp(round_up(kBytes / bytes, 16), 16, kLanes));
}

// Asks for 2 KB of what comes next, the r-th of them, while nothing is read: between the two
// products of 64 keys memory would be idle for a tenth of the time. Zen 4, 16 heads of 64 in fp32
// and 32 / 8 heads of 128 in bf16: 38 -> 41 and 35 -> 39 GB/s; 1 KB gives half of that.
template <class S>
LMFAST_INLINE void fetch_next(const Keys<S>& v, int64_t width, int r) {
#if !defined(__AMX_TILE__)
  const int64_t bytes = width * static_cast<int64_t>(sizeof(S));
  const int rows = static_cast<int>(clamp(2048 / (bytes > 0 ? bytes : 1), 1, kLanes));
  for (int j = r * rows; j < (r + 1) * rows && j < kLanes; ++j) {
    const char* line = reinterpret_cast<const char*>(v.next + j * v.stride);
    for (int64_t at = 0; at < bytes; at += 64) prefetch(line + at);
  }
#endif
}

// Calls f with the number of rows as a constant, for all of them in turn.
template <int kRows, class F>
LMFAST_INLINE void by_rows(int rows, const F& f, int r = 0) {
  for (; r + kRows <= rows; r += kRows) f(r, Constant<kRows>());
  if constexpr (kRows > 1) by_rows<kRows / 2>(rows, f, r);
}

// Scores of kRows query rows (`padded` apart) against all keys: s[r][j].
template <class V, int kRows, class S>
LMFAST_INLINE void dot_keys(const typename V::Query* q, int64_t padded, const Keys<S>& k,
                            int64_t width, float* s) {
  constexpr int kKeys = kVec / kRows, kBlock = kKeys < 4 ? kKeys : 4;
  const int64_t whole = width / kStep * kStep;
  const int rest = static_cast<int>(width - whole), ahead = rows_ahead<S>(width);
  for (int j = 0; j < k.count; j += kKeys) {
    const S* later = k.ahead(j + ahead);
    VecF total[kVec];
#pragma GCC unroll 16
    for (VecF& x : total) x = VecF::zero();
#pragma GCC unroll 4
    for (int first = 0; first < kKeys; first += kBlock) {
      const S* row[kBlock];
#pragma GCC unroll 4
      for (int i = 0; i < kBlock; ++i) {
        const int at = j + first + i;
        row[i] = k.rows + (at < k.count ? at : k.count - 1) * k.stride;
      }
      for (int64_t d = 0; d < whole; d += kStep) {
#pragma GCC unroll 4
        for (int i = 0; i < kBlock; ++i) {
          const V x = V::load(row[i] + d);
          prefetch(later + (first + i) * k.stride + d);
          if constexpr (sizeof(S) * kStep > 64) prefetch(later + (first + i) * k.stride + d + kVec);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            VecF& sum = total[r * kKeys + first + i];
            sum = add_dot(sum, x, q + r * padded + d);
          }
        }
      }
      if (rest > 0) {
#pragma GCC unroll 4
        for (int i = 0; i < kBlock; ++i) {
          const V x = V::load(row[i] + whole, rest);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            VecF& sum = total[r * kKeys + first + i];
            sum = add_dot(sum, x, q + r * padded + whole);
          }
        }
      }
    }
    alignas(64) float sums[kVec];
    sums_across(total).store(sums);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) memcpy(s + r * kLanes + j, sums + r * kKeys, 4 * kKeys);
  }
}

// Values one key at a time, and their weights.
template <class S>
struct SingleValues {
  using Key = S;
  using Weight = float;
  static constexpr int kAtOnce = 1;
  Wide<S> x;
  static LMFAST_INLINE SingleValues load(const S* p, int64_t, bool, int n) {
    return {n < kStep ? Wide<S>::load(p, n) : Wide<S>::load(p)};
  }
  static LMFAST_INLINE VecF weight(const Weight* p) { return VecF::set1(*p); }
  LMFAST_INLINE void add_to(VecF weight, VecF& a, VecF& b) const {
    a = fmadd(weight, x.a, a);
    b = fmadd(weight, x.b, b);
  }
};

// out[r] += sum over j of p[r][j] v[j], for kSteps steps of columns; `rest` of the last one.
// M: how values are taken, kAtOnce of them together, with one weight.
template <class M, int kRows, int kSteps>
LMFAST_INLINE void add_columns(const typename M::Weight* p, const Keys<typename M::Key>& v,
                               int64_t d, int rest, int ahead, float* out, int64_t out_stride) {
  using S = typename M::Key;
  VecF a[kRows][kSteps], b[kRows][kSteps];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kSteps; ++i) a[r][i] = b[r][i] = VecF::zero();
  }
  const S* row = v.rows + d;
  for (int j = 0; j < v.count; j += M::kAtOnce, row += M::kAtOnce * v.stride) {
    const S* later[M::kAtOnce];
    for (int i = 0; i < M::kAtOnce; ++i) later[i] = v.ahead(j + i + ahead) + d;
    const bool all = j + M::kAtOnce <= v.count;
    M x[kSteps];
#pragma GCC unroll 4
    for (int i = 0; i < kSteps; ++i) {
      for (const S* next : later) {
        prefetch(next + i * kStep);
        if constexpr (sizeof(S) * kStep > 64) prefetch(next + i * kStep + kVec);
      }
      x[i] = M::load(row + i * kStep, v.stride, all, kSteps == 1 ? rest : kStep);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const auto weight = M::weight(p + (r * kLanes + j) / M::kAtOnce);
#pragma GCC unroll 4
      for (int i = 0; i < kSteps; ++i) x[i].add_to(weight, a[r][i], b[r][i]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kSteps; ++i) {
      float* at = out + r * out_stride + d + i * kStep;
      (VecF::load(at) + a[r][i]).store(at);
      (VecF::load(at + kVec) + b[r][i]).store(at + kVec);
    }
  }
}
// All columns; outputs take up to 16 registers (8 where there are 16).
template <class M, int kRows>
LMFAST_INLINE void add_values(const typename M::Weight* p, const Keys<typename M::Key>& v,
                              int64_t width, float* out, int64_t out_stride) {
  constexpr int kMost = (kVec >= 16 ? 8 : 4) / kRows;
  constexpr int kSteps = kMost < 1 ? 1 : (kMost > 4 ? 4 : kMost);
  const int ahead = rows_ahead<typename M::Key>(width);
  int64_t d = 0;
  for (; d + kSteps * kStep <= width; d += kSteps * kStep) {
    add_columns<M, kRows, kSteps>(p, v, d, kStep, ahead, out, out_stride);
  }
  if constexpr (kSteps > 2) {
    if (d + 2 * kStep <= width) {
      add_columns<M, kRows, 2>(p, v, d, kStep, ahead, out, out_stride);
      d += 2 * kStep;
    }
  }
  for (; d < width; d += kStep) {
    const int rest = static_cast<int>(width - d < kStep ? width - d : kStep);
    add_columns<M, kRows, 1>(p, v, d, rest, ahead, out, out_stride);
  }
}

// Numbers in the order of V's two vectors, and back; `padded` is a multiple of 2 W.
LMFAST_INLINE void to_even_odd(float* x, int64_t padded) {
  for (int64_t d = 0; d < padded; d += kStep) {
    float in[kStep];
    memcpy(in, x + d, sizeof(in));
    for (int i = 0; i < kVec; ++i) {
      x[d + i] = in[2 * i];
      x[d + kVec + i] = in[2 * i + 1];
    }
  }
}
LMFAST_INLINE void from_even_odd(float* x, int64_t padded) {
  for (int64_t d = 0; d < padded; d += kStep) {
    float in[kStep];
    memcpy(in, x + d, sizeof(in));
    for (int i = 0; i < kVec; ++i) {
      x[d + 2 * i] = in[i];
      x[d + 2 * i + 1] = in[kVec + i];
    }
  }
}

LMFAST_INLINE void to_float_query(const AttentionArgs& a, int64_t b, Row row, float* q) {
  LMFAST_DISPATCH_DTYPE(a.dtype, scalar_t, {
    if constexpr (sizeof(scalar_t) <= sizeof(float)) {
      to_float_row(row_of<scalar_t>(a.q, b, row.head, row.t), a.head_dim, q);
    }
  })
}

// Products in fp32, of numbers widened as they are read.
template <class S>
struct FloatProducts {
  using Key = S;
  using Query = float;
  static constexpr int kRowsAtOnce = kVec >= 16 ? 8 : (kVec >= 8 ? 4 : 2);
  static LMFAST_INLINE int64_t query_stride(int64_t width) { return round_up(width, 32); }
  // s[r][j]: the products of `rows` query rows with all keys.
  static LMFAST_INLINE void dot(int rows, const float* q, int64_t q_stride, const Keys<S>& k,
                                int64_t width, float* s) {
    by_rows<kRowsAtOnce>(rows, [&](int r, auto count) {
      constexpr int kRows = decltype(count)::value;
      dot_keys<Wide<S>, kRows>(q + r * q_stride, q_stride, k, width, s + r * kLanes);
    });
  }
  // out[r] += the sum of p[r][j] v[j] over all j.
  static LMFAST_INLINE void add(int rows, const float* p, const Keys<S>& v, int64_t width,
                                float* out, int64_t out_stride) {
    by_rows<kRowsAtOnce>(rows, [&](int r, auto count) {
      add_values<SingleValues<S>, decltype(count)::value>(p + r * kLanes, v, width,
                                                          out + r * out_stride, out_stride);
    });
  }
  // A query row as fp32, in the order of the vectors of a key; zeros behind.
  static LMFAST_INLINE void load_query(const AttentionArgs& a, int64_t b, Row row, int64_t padded,
                                       float* q) {
    memset(q, 0, sizeof(float) * static_cast<size_t>(padded));
    to_float_query(a, b, row, q);
    if constexpr (Wide<S>::kEvenOdd) to_even_odd(q, padded);
  }
  static LMFAST_INLINE void in_order(float* out, int64_t padded) {
    if constexpr (Wide<S>::kEvenOdd) from_even_odd(out, padded);
  }
};

}  // namespace
}  // namespace lmfast::LMFAST_ISA
