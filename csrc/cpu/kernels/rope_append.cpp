// Rotates new queries in place, and stores new keys, rotated, and values in the cache: one pass.
//
// Floor: memory traffic, one read of q, k and v and one write of q and of the two rows per token in
// the cache. While decoding that is a few KB per layer, so what counts is that it is one call: the
// rotation and two copies by themselves are three, each with the cost of a dispatch.
//
// Keys are rounded once, from fp32 to the storage type; int8 storage gets one scale per vector,
// the largest magnitude over 127, from the fp32 values. The vector is gathered in fp32 on the stack
// for that, because the scale must be known before the first element is written.
#include "rope_append.h"

#include "rope_rows.h"

namespace lmfast::LMFAST_ISA {
namespace {

template <class T, class U>
LMFAST_INLINE void convert(const T* x, U* y, int64_t n) {
  constexpr int W = VecF::kWidth;
  int64_t i = 0;
  for (; i + W <= n; i += W) VecF::load(x + i).store(y + i);
  if (i < n) VecF::load(x + i, static_cast<int>(n - i)).store(y + i, static_cast<int>(n - i));
}
LMFAST_INLINE void convert(const double* x, double* y, int64_t n) {
  memcpy(y, x, sizeof(double) * static_cast<size_t>(n));
}

LMFAST_INLINE int64_t position_of(const RopeAppendArgs& a, int64_t token) {
  if (a.positions != nullptr) return a.positions[token];
  const int64_t b = token / a.length, t = token % a.length;
  return (a.starts != nullptr ? a.starts[b] : a.offset) + t;
}

// y = rotation of x, U the same as T or a type with less; the rest of the head passes through.
template <class T, class U>
LMFAST_INLINE void rotate(const RopeAppendArgs& a, int64_t token, const T* x, U* y) {
  const int64_t half = a.rotary / 2, row = position_of(a, token) * half;
  if constexpr (sizeof(T) == sizeof(double)) {
    if (a.fp64_tables) {
      rotate_double(x, y, static_cast<const double*>(a.cos) + row,
                    static_cast<const double*>(a.sin) + row, half, a.interleaved, 1.0);
    } else {
      rotate_double(x, y, static_cast<const float*>(a.cos) + row,
                    static_cast<const float*>(a.sin) + row, half, a.interleaved, 1.0);
    }
  } else {
    const float* c = static_cast<const float*>(a.cos) + row;
    const float* s = static_cast<const float*>(a.sin) + row;
    if (a.interleaved) {
      rotate_interleaved(x, y, c, s, half, VecF::set1(1.0f));
    } else {
      rotate_half(x, y, c, s, half, VecF::set1(1.0f));
    }
  }
  if (static_cast<const void*>(x) != static_cast<const void*>(y)) {
    convert(x + a.rotary, y + a.rotary, a.head_dim - a.rotary);
  }
}

// codes = round(x * 127 / max |x|), and the scale max |x| / 127 that undoes it; zeros below 1e-30,
// whose inverse could overflow. A vector with NaN or infinity gets the scale NaN, so that all of it
// reads as NaN.
LMFAST_INLINE float quantise(const float* x, int8_t* codes, int64_t n) {
  constexpr int W = VecF::kWidth;
  VecF largest = VecF::zero(), broken = VecF::zero();
  for (int64_t i = 0; i < n; i += W) {
    const VecF v = VecF::load(x + i, n - i < W ? static_cast<int>(n - i) : W);
    largest = max(largest, max(v, VecF::zero() - v));
    broken = broken + v * VecF::zero();
  }
  const float top = hmax(largest), nothing = sum(broken);
  const bool empty = top < 1e-30f;
  const float inverse = empty ? 0.0f : 127.0f / top;
  // Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, in any vector the compiler
  // picks.
  constexpr float kMagic = 12582912.0f;
  for (int64_t i = 0; i < n; ++i) {
    const float scaled = nothing == 0.0f ? x[i] * inverse : 0.0f;
    codes[i] = static_cast<int8_t>(static_cast<int32_t>((scaled + kMagic) - kMagic));
  }
  return (empty ? 0.0f : top / 127.0f) + nothing;
}

// Stores token `token` of head `h` of `tokens` in `slot`, rotated or as it is.
template <class T, class S, bool kQuantised>
LMFAST_INLINE void store(const RopeAppendArgs& a, const NewTokens& tokens,
                         const CacheStorage& storage, int64_t token, int64_t h, int64_t slot,
                         bool rotated) {
  const int64_t b = token / a.length, t = token % a.length;
  const int64_t* si = tokens.stride;
  const T* x = static_cast<const T*>(tokens.data) + b * si[0] + h * si[1] + t * si[2];
  const int64_t row = slot / a.columns, column = slot % a.columns;
  const int64_t* so = storage.stride;
  const int64_t at = row * so[0] + h * so[1] + column * so[2];
  if constexpr (kQuantised) {
    float vector[kMaxAppendHeadDim];
    if (rotated) {
      rotate(a, token, x, vector);
    } else {
      convert(x, vector, a.head_dim);
    }
    const int64_t* ss = storage.scale_stride;
    storage.scales[row * ss[0] + h * ss[1] + column * ss[2]] =
        quantise(vector, static_cast<int8_t*>(storage.data) + at, a.head_dim);
  } else if (rotated) {
    rotate(a, token, x, static_cast<S*>(storage.data) + at);
  } else {
    convert(x, static_cast<S*>(storage.data) + at, a.head_dim);
  }
}

template <class T, class S, bool kQuantised>
void append_typed(const RopeAppendArgs& a, int64_t begin, int64_t end) {
  int64_t i = begin;
  for (; i < end && i < a.q_vectors; ++i) {
    const int64_t token = i / a.q.heads, h = i % a.q.heads;
    const int64_t b = token / a.length, t = token % a.length;
    const int64_t* s = a.q.stride;
    T* x = static_cast<T*>(const_cast<void*>(a.q.data)) + b * s[0] + h * s[1] + t * s[2];
    rotate(a, token, x, x);
  }
  for (; i < end; ++i) {
    const int64_t vector = i - a.q_vectors;
    const int64_t n = vector / (2 * a.k.heads), h = vector / 2 % a.k.heads;
    const int64_t token = a.tokens != nullptr ? a.tokens[n] : n;
    if (vector % 2 == 0) {
      store<T, S, kQuantised>(a, a.k, a.keys, token, h, a.slots[n], a.rotated);
    } else {
      store<T, S, kQuantised>(a, a.v, a.values, token, h, a.slots[n], false);
    }
  }
}

template <class T>
void append_from(const RopeAppendArgs& a, int64_t begin, int64_t end) {
  if (a.quantised) {
    append_typed<T, float, true>(a, begin, end);
  } else if (a.storage == DType::kF32) {
    append_typed<T, float, false>(a, begin, end);
  } else if (a.storage == DType::kBF16) {
    append_typed<T, bf16, false>(a, begin, end);
  } else {
    append_typed<T, f16, false>(a, begin, end);
  }
}

}  // namespace

void rope_append(const RopeAppendArgs& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::kF64:
      return append_typed<double, double, false>(a, begin, end);
    case DType::kF32:
      return append_from<float>(a, begin, end);
    case DType::kBF16:
      return append_from<bf16>(a, begin, end);
    case DType::kF16:
      return append_from<f16>(a, begin, end);
  }
}

}  // namespace lmfast::LMFAST_ISA
