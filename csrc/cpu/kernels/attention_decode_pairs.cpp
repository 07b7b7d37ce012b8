// Decoding with queries, keys and values in bf16, where vdpbf16ps multiplies pairs of them without
// widening; otherwise as attention_decode.cpp.
//
// Of four rows of queries per key/value head the fp32 kernel is bound by arithmetic, 40
// instructions for the 32 columns of two keys: here 18. Keys are pairs as they lie. Values become
// pairs of two keys by two shuffles for all rows; probabilities are rounded to bf16, which is what
// blocks on tiles (attention_fwd_amx.cpp) and PyTorch do, their sum is not. Zen 4: 32 / 8 heads of
// 128 x 8192 keys 1.04 ms instead of 1.24; 12 / 4 heads of 64 x 1024, batch 8, 0.26 instead of
// 0.29.
#include "../amx.h"
#include "attention_decode_unit.h"

namespace lmfast::LMFAST_ISA {

#if defined(LMFAST_AMX)

namespace {

LMFAST_INLINE VecF dot_pairs(__m512i x, __m512i y, VecF sum) {
  return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(y))};
}

// 32 numbers of a key or query.
struct Pairs32 {
  using Query = bf16;
  __m512i x;
  static LMFAST_INLINE Pairs32 load(const bf16* p) { return {load_pairs(p)}; }
  static LMFAST_INLINE Pairs32 load(const bf16* p, int n) { return {load_pairs(p, n)}; }
};
LMFAST_INLINE VecF add_dot(VecF sum, const Pairs32& x, const bf16* q) {
  return dot_pairs(x.x, load_pairs(q), sum);
}

// out[r] += sum over j of p[r][j] v[j] for kSteps steps of 32 columns, `rest` of the last one; p as
// pairs of two keys. Each step's two vectors are in the order of the unpacking instructions.
template <int kRows, int kSteps>
LMFAST_INLINE void add_pair_columns(const int32_t* p, const Keys<bf16>& v, int64_t d, int rest,
                                    int ahead, float* out, int64_t out_stride) {
  VecF a[kRows][kSteps], b[kRows][kSteps];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kSteps; ++i) a[r][i] = b[r][i] = VecF::zero();
  }
  const bf16* row = v.rows + d;
  for (int j = 0; j < v.count; j += 2, row += 2 * v.stride) {
    const bf16 *later = v.ahead(j + ahead) + d, *after = v.ahead(j + 1 + ahead) + d;
    const bool two = j + 1 < v.count;
    __m512i low[kSteps], high[kSteps];
#pragma GCC unroll 4
    for (int i = 0; i < kSteps; ++i) {
      prefetch(later + i * kStep);
      prefetch(after + i * kStep);
      const int n = kSteps == 1 ? rest : kStep;
      const __m512i x = load_pairs(row + i * kStep, n);
      const __m512i y = two ? load_pairs(row + v.stride + i * kStep, n) : _mm512_setzero_si512();
      low[i] = _mm512_unpacklo_epi16(x, y);
      high[i] = _mm512_unpackhi_epi16(x, y);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512i weight = _mm512_set1_epi32(p[r * kLanes / 2 + j / 2]);
#pragma GCC unroll 4
      for (int i = 0; i < kSteps; ++i) {
        a[r][i] = dot_pairs(low[i], weight, a[r][i]);
        b[r][i] = dot_pairs(high[i], weight, b[r][i]);
      }
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

struct PairProducts {
  using Key = bf16;
  using Query = bf16;
  static constexpr int kRowsAtOnce = 8;
  template <int kRows>
  static LMFAST_INLINE void dot(const bf16* q, int64_t padded, const Keys<bf16>& k, int64_t width,
                                float* s) {
    dot_keys<Pairs32, kRows>(q, padded, k, width, s);
  }
  template <int kRows>
  static LMFAST_INLINE void add(const float* p, const Keys<bf16>& v, int64_t width, float* out,
                                int64_t out_stride) {
    constexpr int kMost = 8 / kRows, kSteps = kMost > 4 ? 4 : kMost;
    alignas(64) int32_t pairs[kRows * kLanes / 2];
    for (int i = 0; i < kRows * kLanes; i += 32) {
      _mm512_store_si512(pairs + i / 2, load_pairs(p + i));
    }
    const int ahead = rows_ahead<bf16>(width);
    int64_t d = 0;
    for (; d + kSteps * kStep <= width; d += kSteps * kStep) {
      add_pair_columns<kRows, kSteps>(pairs, v, d, kStep, ahead, out, out_stride);
    }
    if constexpr (kSteps > 2) {
      if (d + 2 * kStep <= width) {
        add_pair_columns<kRows, 2>(pairs, v, d, kStep, ahead, out, out_stride);
        d += 2 * kStep;
      }
    }
    for (; d < width; d += kStep) {
      const int rest = static_cast<int>(width - d < kStep ? width - d : kStep);
      add_pair_columns<kRows, 1>(pairs, v, d, rest, ahead, out, out_stride);
    }
  }
  // Of every 8 columns the unpacked vectors have 4 each.
  static LMFAST_INLINE void in_order(float* out, int64_t padded) {
    for (int64_t d = 0; d < padded; d += kStep) {
      float in[kStep];
      memcpy(in, out + d, sizeof(in));
      for (int i = 0; i < kVec; i += 4) {
        memcpy(out + d + 2 * i, in + i, 4 * sizeof(float));
        memcpy(out + d + 2 * i + 4, in + kVec + i, 4 * sizeof(float));
      }
    }
  }
};

}  // namespace

void attention_decode_pairs(const AttentionArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) decode_unit<PairProducts>(a, i);
}

#else

void attention_decode_pairs(const AttentionArgs&, int64_t, int64_t) {}

#endif

}  // namespace lmfast::LMFAST_ISA
