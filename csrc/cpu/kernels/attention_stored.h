// Keys and values where they are stored: through a table or not, in any type, int8 with its scales.
#pragma once

#include "attention_block.h"

namespace lmfast::LMFAST_ISA {
namespace {

template <class S>
LMFAST_INLINE VecF load_stored(const S* p) {
  return VecF::load(p);
}
template <class S>
LMFAST_INLINE VecF load_stored(const S* p, int n) {
  return VecF::load(p, n);
}
#if defined(__AVX512F__)
template <>
LMFAST_INLINE VecF load_stored(const int8_t* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x))};
}
template <>
LMFAST_INLINE VecF load_stored(const int8_t* p, int n) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(VecF::mask(n), p)))};
}
#else
template <>
LMFAST_INLINE VecF load_stored(const int8_t* p) {
#if defined(__AVX2__)
  const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x))};
#else
  return {v4f{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]),
              static_cast<float>(p[3])}};
#endif
}
template <>
LMFAST_INLINE VecF load_stored(const int8_t* p, int n) {
  int8_t lanes[VecF::kWidth] = {};
  memcpy(lanes, p, static_cast<size_t>(n < VecF::kWidth ? n : VecF::kWidth));
  return load_stored(lanes);
}
#endif

// A type as a value, to pass it to a generic lambda.
template <class T>
struct Type {
  using type = T;
};
template <class T>
constexpr bool is_bf16() {
  return false;
}
template <>
constexpr bool is_bf16<bf16>() {
  return true;
}
template <class F>
LMFAST_INLINE void by_stored_type(Stored type, const F& f) {
  switch (type) {
    case Stored::kF32:
      return f(Type<float>());
    case Stored::kBF16:
      return f(Type<bf16>());
    case Stored::kF16:
      return f(Type<f16>());
    case Stored::kI8:
      return f(Type<int8_t>());
  }
}

// The row of storage that holds this key of batch row b.
LMFAST_INLINE int64_t storage_row(const AttentionStorage& s, int64_t b, int64_t key) {
  return s.table == nullptr ? b : s.table[b * s.table_row + key / kAttentionTableBlock];
}
// The end of the keys that lie in the same row of storage as `key`, at most `end`.
LMFAST_INLINE int64_t same_row_until(const AttentionStorage& s, int64_t key, int64_t end) {
  if (s.table == nullptr) return end;
  const int64_t block = (key / kAttentionTableBlock + 1) * kAttentionTableBlock;
  return block < end ? block : end;
}

// One of the two: keys or values.
struct StoredTensor {
  const AttentionTensor& x;
  const float* scales;  // or null
  const int64_t* scale_stride;
};
LMFAST_INLINE StoredTensor stored_keys(const AttentionArgs& a) {
  return {a.k, a.stored.key_scales, a.stored.key_scale_stride};
}
LMFAST_INLINE StoredTensor stored_values(const AttentionArgs& a) {
  return {a.v, a.stored.value_scales, a.stored.value_scale_stride};
}
LMFAST_INLINE const float* scales_at(const StoredTensor& t, int64_t row, int64_t head,
                                     int64_t key) {
  return t.scales + row * t.scale_stride[0] + head * t.scale_stride[1] + key;
}

// Rows [rows.lo, rows.hi) of one head as fp32 or bf16, `stride` apart.
template <class Out>
inline __attribute__((noinline)) void copy_stored(const AttentionArgs& a, const StoredTensor& t,
                                                  int64_t b, int64_t head, Span rows, Out* out,
                                                  int64_t stride) {
  constexpr int W = VecF::kWidth;
  const int64_t width = a.head_dim, whole = width / W * W;
  const int rest = static_cast<int>(width - whole);
  by_stored_type(a.stored.type, [&](auto type) {
    using S = typename decltype(type)::type;
    int64_t end = 0;
    for (int64_t key = rows.lo; key < rows.hi; key = end) {
      end = same_row_until(a.stored, key, rows.hi);
      const int64_t at = storage_row(a.stored, b, key);
      const S* in = row_of<S>(t.x, at, head, key);
      const float* scales = t.scales != nullptr ? scales_at(t, at, head, key) : nullptr;
      for (int64_t j = 0; j < end - key; ++j, in += t.x.row, out += stride) {
        const VecF scale = VecF::set1(scales != nullptr ? scales[j] : 1.0f);
        for (int64_t d = 0; d < whole; d += W) (load_stored(in + d) * scale).store(out + d);
        if (rest > 0) (load_stored(in + whole, rest) * scale).store(out + whole, rest);
      }
    }
  });
}

}  // namespace
}  // namespace lmfast::LMFAST_ISA
