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

// Values of two keys, as pairs in the order of the unpacking instructions.
struct PairedValues {
  using Key = bf16;
  using Weight = int32_t;  // two of bf16
  static constexpr int kAtOnce = 2;
  __m512i low, high;
  static LMFAST_INLINE PairedValues load(const bf16* p, int64_t stride, bool two, int n) {
    const __m512i x = load_pairs(p, n);
    const __m512i y = two ? load_pairs(p + stride, n) : _mm512_setzero_si512();
    return {_mm512_unpacklo_epi16(x, y), _mm512_unpackhi_epi16(x, y)};
  }
  static LMFAST_INLINE __m512i weight(const Weight* p) { return _mm512_set1_epi32(*p); }
  LMFAST_INLINE void add_to(__m512i weight, VecF& a, VecF& b) const {
    a = dot_pairs(low, weight, a);
    b = dot_pairs(high, weight, b);
  }
};

struct PairProducts {
  using Key = bf16;
  using Query = bf16;
  static constexpr int kRowsAtOnce = 8;
  static LMFAST_INLINE int64_t query_stride(int64_t width) { return round_up(width, 32); }
  static LMFAST_INLINE void dot(int rows, const bf16* q, int64_t q_stride, const Keys<bf16>& k,
                                int64_t width, float* s) {
    by_rows<kRowsAtOnce>(rows, [&](int r, auto count) {
      constexpr int kRows = decltype(count)::value;
      dot_keys<Pairs32, kRows>(q + r * q_stride, q_stride, k, width, s + r * kLanes);
    });
  }
  static LMFAST_INLINE void add(int rows, const float* p, const Keys<bf16>& v, int64_t width,
                                float* out, int64_t out_stride) {
    by_rows<kRowsAtOnce>(rows, [&](int r, auto count) {
      constexpr int kRows = decltype(count)::value;
      alignas(64) int32_t pairs[kRows * kLanes / 2];
      for (int i = 0; i < kRows * kLanes; i += 32) {
        _mm512_store_si512(pairs + i / 2, load_pairs(p + r * kLanes + i));
      }
      add_values<PairedValues, kRows>(pairs, v, width, out + r * out_stride, out_stride);
    });
  }
  static LMFAST_INLINE void load_query(const AttentionArgs& a, int64_t b, Row row, int64_t padded,
                                       bf16* q) {
    memset(q, 0, sizeof(bf16) * static_cast<size_t>(padded));
    memcpy(q, row_of<bf16>(a.q, b, row.head, row.t),
           sizeof(bf16) * static_cast<size_t>(a.head_dim));
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
