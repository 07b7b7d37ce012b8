// Rows of hidden and weight, of any dtype and order, as the bf16 tiles that
// linear_cross_entropy_amx_block.h multiplies. For kernels only.
#pragma once

#include "linear_cross_entropy_amx_block.h"

#if defined(__AMX_TILE__)

namespace lmfast::LMFAST_ISA {
namespace {

LMFAST_INLINE int lanes_of(int64_t n) { return static_cast<int>(n < 0 ? 0 : n > 16 ? 16 : n); }

// 16 rows of which `count` exist, as floats: out[16][depth], zeros elsewhere.
template <class T>
void load_hidden(const LceAmxArgs& a, int64_t first, int64_t count, float* out) {
  for (int64_t r = 0; r < kTileRows; ++r) {
    const T* h = r < count
                     ? static_cast<const T*>(a.p.hidden) + a.p.row[first + r] * a.p.hidden_stride
                     : nullptr;
    for (int64_t e = 0; e < a.depth; e += 16) {
      const int n = h == nullptr ? 0 : lanes_of(a.p.width - e);
      (n == 0 ? VecF::zero() : VecF::load(h + e, n)).store(out + r * a.depth + e);
    }
  }
}
template <class T>
void load_weight(const LceAmxArgs& a, int64_t first, int64_t count, float* out) {
  const int64_t row = a.p.weight_row_stride, column = a.p.weight_column_stride;
  const T* w = static_cast<const T*>(a.p.weight) + first * row;
  if (column == 1) {
    for (int64_t r = 0; r < kTileRows; ++r) {
      for (int64_t e = 0; e < a.depth; e += 16) {
        const int n = r < count ? lanes_of(a.p.width - e) : 0;
        (n == 0 ? VecF::zero() : VecF::load(w + r * row + e, n)).store(out + r * a.depth + e);
      }
    }
    return;
  }
  for (int64_t e = 0; e < a.depth; e += 16) {
    __m512i t[16];
#pragma GCC unroll 16
    for (int64_t i = 0; i < 16; ++i) {
      t[i] = e + i < a.p.width
                 ? _mm512_castps_si512(VecF::load(w + (e + i) * column, lanes_of(count)).v)
                 : _mm512_setzero_si512();
    }
    transpose_words(t);
#pragma GCC unroll 16
    for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(out + i * a.depth + e, t[i]);
  }
}

inline void load_hidden_rows(const LceAmxArgs& a, int64_t first, int64_t count, float* out) {
  if (a.p.hidden_dtype == DType::kF32) return load_hidden<float>(a, first, count, out);
  if (a.p.hidden_dtype == DType::kBF16) return load_hidden<bf16>(a, first, count, out);
  return load_hidden<f16>(a, first, count, out);
}
inline void load_weight_rows(const LceAmxArgs& a, int64_t first, int64_t count, float* out) {
  if (a.p.weight_dtype == DType::kF32) return load_weight<float>(a, first, count, out);
  if (a.p.weight_dtype == DType::kBF16) return load_weight<bf16>(a, first, count, out);
  return load_weight<f16>(a, first, count, out);
}

// 16 rows of floats, times factors if there are any, as packed rows.
template <int kParts>
void split_rows(const LceAmxArgs& a, const float* from, const float* factors, char* to) {
  for (int64_t r = 0; r < kTileRows; ++r) {
    const __m512 factor = _mm512_set1_ps(factors == nullptr ? 1.0f : factors[r]);
    for (int64_t e = 0; e < a.depth; e += kTileDepth) {
      __m512i parts[kParts];
      split_floats<kParts>(_mm512_mul_ps(_mm512_loadu_ps(from + r * a.depth + e), factor),
                           _mm512_mul_ps(_mm512_loadu_ps(from + r * a.depth + e + 16), factor),
                           parts);
      for (int i = 0; i < kParts; ++i) {
        _mm512_storeu_si512(to + i * a.chunk * a.row_bytes + r * a.row_bytes + 2 * e, parts[i]);
      }
    }
  }
}

// Packed rows of a chunk -> the tiles of their transpose.
template <int kParts>
void transpose_rows(const LceAmxArgs& a, int64_t count, const char* rows, char* columns) {
  const int64_t stride = a.row_bytes / 2;
  for (int64_t r = 0; r < count; r += 32) {
    for (int part = 0; part < kParts; ++part) {
      const bf16* from =
          reinterpret_cast<const bf16*>(rows + part * a.chunk * a.row_bytes) + r * stride;
      char* to = columns + (r / 32 * a.out_tiles * kParts + part) * kTileBytes;
      for (int64_t e = 0; e < a.depth; e += 32) {
        pack_columns(from + e, stride, 32, 32, to + e / 16 * kParts * kTileBytes,
                     kParts * kTileBytes);
      }
    }
  }
}

// Whether weight needs no conversion, so that packing it need not go by way of floats.
inline bool rows_of_bf16(const LceAmxArgs& a) {
  return a.p.weight_dtype == DType::kBF16 && a.p.weight_column_stride == 1;
}
inline void copy_weight_rows(const LceAmxArgs& a, int64_t first, int64_t count, char* to) {
  const bf16* w = static_cast<const bf16*>(a.p.weight) + first * a.p.weight_row_stride;
  for (int64_t r = 0; r < kTileRows; ++r, w += a.p.weight_row_stride, to += a.row_bytes) {
    for (int64_t e = 0; e < a.depth; e += kTileDepth) {
      const __m512i pairs =
          r < count ? load_pairs(w + e, static_cast<int>(a.p.width - e)) : _mm512_setzero_si512();
      _mm512_storeu_si512(to + 2 * e, pairs);
    }
  }
}

// `count` classes from `first` as a chunk: what the pass over tokens streams.
template <int kParts>
StreamChunk pack_classes(const LceAmxArgs& a, int64_t first, int64_t count, float* scratch,
                         char* to) {
  const LceAmxLayout at = lce_amx_layout(a);
  const int64_t padded = (count + 31) / 32 * 32;
  const bool as_it_is = kParts == 1 && rows_of_bf16(a);
  for (int64_t r = 0; r < padded; r += kTileRows) {
    if (as_it_is) {
      copy_weight_rows(a, first + r, count - r, to + r * a.row_bytes);
    } else {
      load_weight_rows(a, first + r, count - r, scratch);
      split_rows<kParts>(a, scratch, nullptr, to + r * a.row_bytes);
    }
  }
  if (a.want_product) transpose_rows<kParts>(a, padded, to, to + at.columns);
  float* add = reinterpret_cast<float*>(to + at.add);
  for (int64_t r = 0; r < padded; ++r) {
    const float bias = a.p.bias != nullptr && r < count ? a.p.bias[first + r] : 0.0f;
    add[r] = r < count ? bias * exponent_unit<kParts>() : kGone;
  }
  return {to, to + at.columns, add, padded};
}

// `count` tokens from `first`, with the gradient of their logits multiplied into the transpose
// where it differs between them, and a row of it for the bias gradient behind.
template <int kParts>
void pack_tokens(const LceAmxArgs& a, int64_t first, int64_t count, float* scratch, char* to) {
  const LceAmxLayout at = lce_amx_layout(a);
  const int64_t padded = (count + 31) / 32 * 32;
  float factors[kLceMaxChunk];
  for (int64_t r = 0; r < padded; ++r) {
    factors[r] = r >= count ? 0.0f : a.shared_weight != 0.0f ? 1.0f : a.weight[first + r];
  }
  const auto fill = [&](bool scaled) {
    for (int64_t r = 0; r < padded; r += kTileRows) {
      load_hidden_rows(a, first + r, count - r, scratch);
      split_rows<kParts>(a, scratch, scaled ? factors + r : nullptr, to + r * a.row_bytes);
    }
  };
  fill(true);
  transpose_rows<kParts>(a, padded, to, to + at.columns);
  if (a.shared_weight == 0.0f) fill(false);
  if (a.dbias != nullptr) {
    for (int64_t r = 0; r < padded; r += 32) {
      __m512i parts[kParts];
      split_floats<kParts>(_mm512_loadu_ps(factors + r), _mm512_loadu_ps(factors + r + 16), parts);
      char* tile = to + at.columns + ((r / 32 + 1) * a.out_tiles - 2) * kParts * kTileBytes;
      memset(tile, 0, 2 * kParts * kTileBytes);
      for (int i = 0; i < kParts; ++i) _mm512_storeu_si512(tile + i * kTileBytes, parts[i]);
    }
  }
  float* add = reinterpret_cast<float*>(to + at.add);
  for (int64_t r = 0; r < padded; ++r) {
    add[r] =
        r < count ? class_offset<kParts>() - a.center[first + r] * class_unit<kParts>() : kGone;
  }
}

// 16 rows of floats as the lanes 16 * tile .. of a group.
template <int kParts>
void pack_lanes(const LceAmxArgs& a, const float* rows, int tile, char* lanes) {
  for (int64_t e = 0; e < a.depth; e += kTileDepth) {
    __m512i parts[kParts][kTileRows];
    for (int r = 0; r < kTileRows; ++r) {
      __m512i one[kParts];
      split_floats<kParts>(_mm512_loadu_ps(rows + r * a.depth + e),
                           _mm512_loadu_ps(rows + r * a.depth + e + 16), one);
      for (int i = 0; i < kParts; ++i) parts[i][r] = one[i];
    }
    for (int i = 0; i < kParts; ++i) {
      transpose_words(parts[i]);
      char* to = lanes + ((e / kTileDepth * kParts + i) * 4 + tile) * kTileBytes;
      for (int r = 0; r < kTileRows; ++r) _mm512_storeu_si512(to + 64 * r, parts[i][r]);
    }
  }
}

}  // namespace
}  // namespace lmfast::LMFAST_ISA

#endif
