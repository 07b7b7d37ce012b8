// A linear layer whose matrix is int8 with a scale per row, or 4 bits with a scale per group of a
// row, read where and as it is stored.
//
// Floor: few rows read the codes once, a quarter or an eighth of fp32's bytes. Codes are widened in
// registers and multiplied as floats: a step of 16 codes costs a widening, a conversion and an fma
// per row of x, about 2 cycles for 16 bytes, which keeps ahead of memory. Of 4-bit codes a
// permutation of 16 floats, the group's scale times -8..7, makes finished weights: masking,
// subtracting, converting and scaling cost nothing per number. Even and odd numbers of a byte's
// halves meet rows of x whose even and odd numbers were laid apart once.
// Many rows are arithmetic; what widening costs is shared by as many rows as there are registers
// for, and the codes of 16 columns stay in the nearest cache meanwhile.
// Neither the number of threads nor that of rows changes a bit of a sum.
#include "quantised_linear.h"

#include "../lane_sums.h"
#include "../prefetch.h"
#include "linear_finish.h"
#include "quantised_codes.h"

namespace lmfast::LMFAST_ISA {
namespace {

constexpr int kUnit = static_cast<int>(kQuantisedColumns);
// Rows of x whose sums are kept at a time, and scales of a row.
constexpr int kRowBlock = 32, kScaleBlock = 64;
// Columns at once for few rows, and for more: so many rows.
#if defined(__AVX512F__)
constexpr int kStreams = 8, kStreamRows = 2, kShared = 4, kByteRows = 6, kNibbleRows = 4;
#elif defined(__AVX2__)
constexpr int kStreams = 8, kStreamRows = 1, kShared = 4, kByteRows = 2, kNibbleRows = 2;
#else
constexpr int kStreams = 4, kStreamRows = 1, kShared = 4, kByteRows = 2, kNibbleRows = 2;
#endif

// Where a tile reads: rows of codes, their scales, rows of x.
struct Place {
  const uint8_t* codes;
  int64_t stride;
  const char* scales;
  const float* x;
  int64_t x_stride;
  int64_t ahead;  // what is fetched, in bytes behind what is read
};

// sums[r][c] for kColumns rows of codes and kRows rows of x: int8, without scales.
template <int kRows, int kColumns>
inline __attribute__((noinline)) void byte_tile(const QuantisedLinearArgs& a, const Place& at,
                                                float* sums) {
  VecF sum[kColumns][kRows];
#pragma GCC unroll 8
  for (int c = 0; c < kColumns; ++c) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sum[c][r] = VecF::zero();
  }
  int64_t k = 0;
  for (; k + W <= a.depth; k += W) {
    VecF x[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) x[r] = VecF::load(at.x + r * at.x_stride + k);
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
      const uint8_t* p = at.codes + c * at.stride + k;
      if (k % 64 == 0) prefetch(p + at.ahead);
      const VecF w = Signed::load(p);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[c][r] = fmadd(x[r], w, sum[c][r]);
    }
  }
  if (k < a.depth) {
    const int n = static_cast<int>(a.depth - k);
    VecF x[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) x[r] = VecF::load(at.x + r * at.x_stride + k, n);
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
      const VecF w = Signed::load(at.codes + c * at.stride + k, n);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[c][r] = fmadd(x[r], w, sum[c][r]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) sum_lanes<kColumns>(&sum[0][r], kRows, sums + r * kUnit);
}

// Widens `count` scales of kColumns rows, from a row's number `first` on.
template <int kColumns>
LMFAST_INLINE void widen_scales(const QuantisedLinearArgs& a, const char* scales, int64_t first,
                                int count, float (*out)[kScaleBlock]) {
  const auto widen = [&](auto* from) {
    for (int c = 0; c < kColumns; ++c) {
      const auto* row = from + c * a.scales_stride + first;
      for (int g = 0; g < count; g += W) {
        if (g + W <= count) {
          VecF::load(row + g).store(out[c] + g);
        } else {
          VecF::load(row + g, count - g).store(out[c] + g, count - g);
        }
      }
    }
  };
  switch (a.scale_type) {
    case DType::kBF16:
      return widen(reinterpret_cast<const bf16*>(scales));
    case DType::kF16:
      return widen(reinterpret_cast<const f16*>(scales));
    default:
      return widen(reinterpret_cast<const float*>(scales));
  }
}

// The same for 4 bits, with the scales of groups.
template <int kRows, int kColumns>
inline __attribute__((noinline)) void nibble_tile(const QuantisedLinearArgs& a, const Place& at,
                                                  float* sums) {
  const int64_t half = a.depth / 2, groups = a.depth / a.group;
  const int bytes = static_cast<int>(a.group / 2);
  float scales[kColumns][kScaleBlock];
  VecF sum[kColumns][kRows];
#pragma GCC unroll 8
  for (int c = 0; c < kColumns; ++c) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sum[c][r] = VecF::zero();
  }
  for (int64_t g = 0; g < groups; ++g) {
    const int in_block = static_cast<int>(g % kScaleBlock);
    if (in_block == 0) {
      const int count = static_cast<int>(groups - g < kScaleBlock ? groups - g : kScaleBlock);
      widen_scales<kColumns>(a, at.scales, g, count, scales);
    }
    const float* even = at.x + g * bytes;
    const float* odd = even + half;
    const uint8_t* codes = at.codes + g * bytes;
    int k = 0;
    for (; k + W <= bytes; k += W) {
      VecF e[kRows], o[kRows];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        e[r] = VecF::load(even + r * at.x_stride + k);
        o[r] = VecF::load(odd + r * at.x_stride + k);
      }
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) {
        const uint8_t* p = codes + c * at.stride + k;
        if (k % 64 == 0) prefetch(p + at.ahead);
        const Numbers numbers(scales[c][in_block]);
        const Pair pair = Pair::load(p);
        const VecF low = numbers.low(pair), high = numbers.high(pair);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          sum[c][r] = fmadd(o[r], high, fmadd(e[r], low, sum[c][r]));
        }
      }
    }
    if (k < bytes) {
      const int n = bytes - k;
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) {
        const Numbers numbers(scales[c][in_block]);
        const Pair pair = Pair::load(codes + c * at.stride + k, n);
        const VecF low = numbers.low(pair), high = numbers.high(pair);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const VecF e = VecF::load(even + r * at.x_stride + k, n);
          const VecF o = VecF::load(odd + r * at.x_stride + k, n);
          sum[c][r] = fmadd(o, high, fmadd(e, low, sum[c][r]));
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) sum_lanes<kColumns>(&sum[0][r], kRows, sums + r * kUnit);
}

// All of `rows` rows of x, as many at a time as there are registers for.
template <bool kNibbles, int kColumns, int kRows>
LMFAST_INLINE void tile_rows(const QuantisedLinearArgs& a, int64_t rows, Place at, float* sums) {
  for (; rows >= kRows; rows -= kRows) {
    if constexpr (kNibbles) {
      nibble_tile<kRows, kColumns>(a, at, sums);
    } else {
      byte_tile<kRows, kColumns>(a, at, sums);
    }
    at.x += kRows * at.x_stride;
    sums += kRows * kUnit;
  }
  if constexpr (kRows > 1) {
    if (rows > 0) tile_rows<kNibbles, kColumns, kRows - 1>(a, rows, at, sums);
  }
}

template <bool kNibbles>
void multiply(const QuantisedLinearArgs& a, const float* x, int64_t rows, int64_t column,
              int columns, float* sums) {
  constexpr int kAtOnce = kNibbles ? kNibbleRows : kByteRows;
  // Long rows are their own next lines; after short ones comes the next group of rows.
  constexpr int64_t kPage = 4096, kAhead = 1024;
  const int64_t size = a.scale_type == DType::kF32 ? 4 : 2;
  const bool few = rows <= kStreamRows;
  const int at_once = few ? kStreams : kShared;
  Place at{nullptr, a.stride, nullptr, x, a.x_stride, a.stride > kPage ? kAhead : 0};
  if (a.stride <= kPage) at.ahead = at_once * a.stride;
  const auto place = [&](int c) {
    at.codes = static_cast<const uint8_t*>(a.codes) + (column + c) * a.stride;
    at.scales = static_cast<const char*>(a.scales) + (column + c) * a.scales_stride * size;
  };
  int c = 0;
  for (; c + at_once <= columns; c += at_once) {
    place(c);
    if (few) {
      tile_rows<kNibbles, kStreams, kStreamRows>(a, rows, at, sums + c);
    } else {
      tile_rows<kNibbles, kShared, kAtOnce>(a, rows, at, sums + c);
    }
  }
  at.ahead = 0;
  for (; c < columns; ++c) {
    place(c);
    tile_rows<kNibbles, 1, kAtOnce>(a, rows, at, sums + c);
  }
}

template <class T, class S>
LMFAST_INLINE void finish(const QuantisedLinearArgs& a, const float* sums, int64_t row,
                          int64_t column, int columns) {
  const T* bias = a.bias == nullptr ? nullptr : static_cast<const T*>(a.bias) + column;
  T* out = static_cast<T*>(a.out) + row * a.columns + column;
  const S* scales = static_cast<const S*>(a.scales) + column;
  finish_row(out, sums, bias, false, columns,
             [&](VecF y, int c, int n) { return a.nibbles ? y : y * VecF::load(scales + c, n); });
}

template <class T, class S>
void run(const QuantisedLinearArgs& a, int64_t begin, int64_t end) {
  const int64_t past = end * kUnit < a.columns ? end * kUnit : a.columns;
  float sums[kRowBlock * kUnit];
  for (int64_t column = begin * kUnit; column < past; column += kUnit) {
    const int columns = past - column < kUnit ? static_cast<int>(past - column) : kUnit;
    for (int64_t row = 0; row < a.rows; row += kRowBlock) {
      const int64_t rows = a.rows - row < kRowBlock ? a.rows - row : kRowBlock;
      const float* x = a.x + row * a.x_stride;
      if (a.nibbles) {
        multiply<true>(a, x, rows, column, columns, sums);
      } else {
        multiply<false>(a, x, rows, column, columns, sums);
      }
      for (int64_t r = 0; r < rows; ++r) {
        finish<T, S>(a, sums + r * kUnit, row + r, column, columns);
      }
    }
  }
}

template <class T>
void run_of(const QuantisedLinearArgs& a, int64_t begin, int64_t end) {
  switch (a.scale_type) {
    case DType::kBF16:
      return run<T, bf16>(a, begin, end);
    case DType::kF16:
      return run<T, f16>(a, begin, end);
    default:
      return run<T, float>(a, begin, end);
  }
}

}  // namespace

void quantised_linear(const QuantisedLinearArgs& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::kBF16:
      return run_of<bf16>(a, begin, end);
    case DType::kF16:
      return run_of<f16>(a, begin, end);
    default:
      return run_of<float>(a, begin, end);
  }
}

}  // namespace lmfast::LMFAST_ISA
