// Rows that a packed matrix is multiplied with: normalised, and for integer weights as integers.
//
// Integer weights are multiplied exactly: a row becomes 16-bit integers, step max |x| / 32639, and
// all products and their sums over a group (or 256 numbers, when a column has one scale) are exact
// in 32 bits. What that rounds, half a step, is 1/130 of what rounding the row to bf16 would. With
// AVX512-VNNI the integers are two bytes, high * 256 + low, both signed, and a product of bytes
// adds four of them in one instruction; without, 16-bit products add two. Both give the same sums,
// and so the same logits.
#pragma once

#include "../simd_exp.h"
#include "engine.h"

namespace lmfast::LMFAST_ISA {
namespace {

constexpr int64_t kExactDepth = 256;  // 256 products of 255 * 32639 stay below 2^31
constexpr int kLargestWord = 32639;   // 127 * 256 + 127

LMFAST_INLINE int64_t operand_chunk(const EngineMatrix& w) {
  return w.group != 0 ? w.group : kExactDepth;
}
LMFAST_INLINE bool is_integer(const EngineMatrix& w) {
  return w.type >= static_cast<int64_t>(EngineWeights::kI8);
}

// How a product takes its rows.
enum class RowsAs { kFloats, kWords, kBytes, kPairs };

// Rows of one product. Of integers there is `words`, or `high` and `low`.
struct Operand {
  float* rows;
  int64_t stride;
  uint16_t* pairs;  // bf16, in the memory of integers
  int64_t pairs_stride;
  int16_t* words;
  int8_t *high, *low;
  int32_t* sums;  // of each chunk of a row, times 128 or 8: what the codes' offset adds
  float* steps;
  int64_t sums_stride;
};

// The memory of an operand; `rows` of another place are used where they are.
LMFAST_INLINE Operand operand_in(char* memory, int64_t rows, int64_t stride) {
  Operand o{};
  o.stride = stride;
  o.rows = reinterpret_cast<float*>(memory);
  memory += rows * stride * 4;
  o.words = reinterpret_cast<int16_t*>(memory);
  o.pairs = reinterpret_cast<uint16_t*>(memory);
  o.pairs_stride = stride + 32;  // no multiple of 4 KB: the rows of a tile lie in different sets
  memory += rows * stride * 2;
  o.high = reinterpret_cast<int8_t*>(memory);
  memory += rows * stride;
  o.low = reinterpret_cast<int8_t*>(memory);
  memory += rows * stride;
  o.sums_stride = round_up(stride, 128) / 8;
  o.sums = reinterpret_cast<int32_t*>(memory);
  memory += rows * o.sums_stride * 4;
  o.steps = reinterpret_cast<float*>(memory);
  return o;
}

// Where the rows of an operand come from.
struct Source {
  const float* rows;
  int64_t stride, width;
  const EngineNorm* norm;
  const int64_t* index;  // which of the rows; null: all
  LMFAST_INLINE const float* row(int64_t i) const {
    return rows + (index != nullptr ? index[i] : i) * stride;
  }
};

LMFAST_INLINE int lanes_left(int64_t i, int64_t n) {
  return n - i < VecF::kWidth ? static_cast<int>(n - i) : VecF::kWidth;
}

// y = x / sqrt(mean(x^2) + eps) * weight, or (x - mean) / sqrt(var + eps) * weight + bias.
inline void normalise(const EngineNorm& norm, const char* memory, const float* x, float* y,
                      int64_t n) {
  constexpr int W = VecF::kWidth;
  const bool layer = norm.kind == static_cast<int64_t>(EngineNormKind::kLayer);
  const float* weight = reinterpret_cast<const float*>(memory + norm.weight);
  float mean = 0.0f;
  if (layer) {
    VecF a = VecF::zero();
    for (int64_t i = 0; i < n; i += W) a = a + VecF::load(x + i, lanes_left(i, n));
    mean = sum(a) / static_cast<float>(n);
  }
  const VecF shift = VecF::set1(mean);
  VecF a = VecF::zero(), b = VecF::zero();
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    const VecF u = VecF::load(x + i) - shift, v = VecF::load(x + i + W) - shift;
    a = fmadd(u, u, a);
    b = fmadd(v, v, b);
  }
  for (; i < n; ++i) {
    const float d = x[i] - mean;
    float lane[W] = {d * d};
    a = a + VecF::load(lane);
  }
  const float square = sum(a + b) / static_cast<float>(n);
  const VecF scale = VecF::set1(1.0f / square_root(square + static_cast<float>(norm.eps)));
  const float* bias =
      norm.bias == kEngineNone ? nullptr : reinterpret_cast<const float*>(memory + norm.bias);
  for (i = 0; i < n; i += W) {
    const int lanes = lanes_left(i, n);
    VecF v = (VecF::load(x + i, lanes) - shift) * scale * VecF::load(weight + i, lanes);
    if (bias != nullptr) v = v + VecF::load(bias + i, lanes);
    v.store(y + i, lanes);
  }
}

// The row as integers, zeros behind its end. A row that is not finite gives NaN.
inline void to_integers(const float* x, int64_t n, const EngineMatrix& w, bool bytes, Operand& o,
                        int64_t row) {
  constexpr int W = VecF::kWidth;
  VecF largest = VecF::zero(), broken = VecF::zero();
  for (int64_t i = 0; i < n; i += W) {
    const VecF v = VecF::load(x + i, lanes_left(i, n));
    largest = max(largest, max(v, VecF::zero() - v));
    broken = broken + v * VecF::zero();
  }
  const float top = hmax(largest), nothing = sum(broken);
  const bool usable = nothing == 0.0f && top > 1e-30f;
  const float inverse = usable ? kLargestWord / top : 0.0f;
  o.steps[row] = (usable ? top / kLargestWord : 0.0f) + nothing;
  constexpr float kMagic = 12582912.0f;  // adding 1.5 * 2^23 rounds to the nearest integer
  int16_t* words = o.words + row * o.stride;
  for (int64_t i = 0; i < n; ++i) {
    const float scaled = usable ? x[i] * inverse : 0.0f;
    words[i] = static_cast<int16_t>(static_cast<int32_t>((scaled + kMagic) - kMagic));
  }
  if (w.depth > n) memset(words + n, 0, sizeof(int16_t) * static_cast<size_t>(w.depth - n));
  if (bytes) {
    int8_t *high = o.high + row * o.stride, *low = o.low + row * o.stride;
    for (int64_t i = 0; i < w.depth; ++i) {
      const int8_t rest = static_cast<int8_t>(words[i]);
      low[i] = rest;
      high[i] = static_cast<int8_t>((words[i] - rest) >> 8);
    }
  }
  const int32_t offset = w.type == static_cast<int64_t>(EngineWeights::kI8) ? 128 : 8;
  const int64_t chunk = operand_chunk(w);
  for (int64_t c = 0; c * chunk < w.depth; ++c) {
    const int64_t end = (c + 1) * chunk < w.depth ? (c + 1) * chunk : w.depth;
    int32_t total = 0;
    for (int64_t i = c * chunk; i < end; ++i) total += words[i];
    o.sums[row * o.sums_stride + c] = total * offset;
  }
}

// The row rounded to bf16, zeros behind its end.
inline void to_pairs(const float* x, int64_t n, Operand& o, int64_t row) {
  constexpr int W = VecF::kWidth;
  uint16_t* out = o.pairs + row * o.pairs_stride;
  for (int64_t i = 0; i < n; i += W) {
    const int lanes = lanes_left(i, n);
    VecF::load(x + i, lanes).store(reinterpret_cast<bf16*>(out + i), lanes);
  }
  memset(out + n, 0, sizeof(uint16_t) * static_cast<size_t>(o.pairs_stride - n));
}

// Rows [first, past) of the source as the product with w takes them.
inline void prepare(const Source& from, const char* memory, const EngineMatrix& w, RowsAs as,
                    Operand& o, int64_t first, int64_t past) {
  for (int64_t i = first; i < past; ++i) {
    const float* x = from.row(i);
    if (from.norm != nullptr) {
      float* y = o.rows + i * o.stride;
      normalise(*from.norm, memory, x, y, from.width);
      for (int64_t k = from.width; k < w.depth; ++k) y[k] = 0.0f;
      x = y;
    }
    if (as == RowsAs::kPairs) {
      to_pairs(x, from.width, o, i);
    } else if (as != RowsAs::kFloats) {
      to_integers(x, from.width, w, as == RowsAs::kBytes, o, i);
    } else if (from.norm == nullptr && from.index != nullptr) {
      memcpy(o.rows + i * o.stride, x, sizeof(float) * static_cast<size_t>(from.width));
      for (int64_t k = from.width; k < w.depth; ++k) o.rows[i * o.stride + k] = 0.0f;
    }
  }
}

// Whether the product can read the source as it is.
LMFAST_INLINE bool usable_in_place(const Source& from, RowsAs as) {
  return from.norm == nullptr && from.index == nullptr && as == RowsAs::kFloats;
}

}  // namespace
}  // namespace lmfast::LMFAST_ISA
