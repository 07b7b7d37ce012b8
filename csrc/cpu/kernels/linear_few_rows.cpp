// A linear layer for a few rows, as when a model generates: y = x W^T + b, at most 32 rows, W read
// where the model keeps it.
//
// Floor: reading W once. With rows of W contiguous a sum runs along lanes; 8 rows of W at a time
// are 8 streams, and 4 x 6 sums (rows of W x rows of x) share every load when there are more rows.
// With columns of W contiguous (GPT-2 keeps its matrices so) a lane is a column: 64 at a time for
// several rows; one row alone walks eight steps of the depth from end to end, its sums in L1, which
// took it from 22 to 40 GB/s. The number of threads changes no bit of a sum; with rows of W
// contiguous, the number of rows neither.
#include "linear_few_rows.h"

#include "../lane_sums.h"
#include "../prefetch.h"

namespace lmfast::LMFAST_ISA {
namespace {

constexpr int W = VecF::kWidth;
constexpr int kUnit = static_cast<int>(kFewRowsColumns);
constexpr int kMost = static_cast<int>(kFewRows);
#if defined(__AVX512F__)
constexpr int kRowsAtOnce = 6, kVecs = 4;
#else
constexpr int kRowsAtOnce = 3, kVecs = 4;
#endif
// Columns at once for few rows of x (1 or 2) and for more.
constexpr int kStreams = 8, kShared = 4;
// Columns of one row of x whose sums are kept.
constexpr int kSpan = 2048;

// sums[r][c] for kColumns rows of the weight and kRows rows of x.
template <class T, int kRows, int kColumns>
inline __attribute__((noinline)) void dot_tile(const T* w, int64_t stride, const float* x,
                                               int64_t x_stride, int64_t depth, int64_t ahead,
                                               float* sums) {
  VecF sum[kColumns][kRows];
#pragma GCC unroll 8
  for (int c = 0; c < kColumns; ++c) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sum[c][r] = VecF::zero();
  }
  int64_t k = 0;
  for (; k + W <= depth; k += W) {
    VecF a[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) a[r] = VecF::load(x + r * x_stride + k);
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
      const T* at = w + c * stride + k;
      prefetch(at + ahead);
      const VecF b = VecF::load(at);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[c][r] = fmadd(a[r], b, sum[c][r]);
    }
  }
  if (k < depth) {
    const int n = static_cast<int>(depth - k);
    VecF a[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) a[r] = VecF::load(x + r * x_stride + k, n);
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
      const VecF b = VecF::load(w + c * stride + k, n);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[c][r] = fmadd(a[r], b, sum[c][r]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    sum_lanes<kColumns>(&sum[0][r], kRows, sums + r * kUnit);
  }
}

// All rows of x, as many at a time as there are registers for.
template <class T, int kColumns, int kRows>
LMFAST_INLINE void dot_rows(int64_t rows, const T* w, int64_t stride, const float* x,
                            int64_t x_stride, int64_t depth, int64_t ahead, float* sums) {
  for (; rows >= kRows; rows -= kRows) {
    dot_tile<T, kRows, kColumns>(w, stride, x, x_stride, depth, ahead, sums);
    x += kRows * x_stride;
    sums += kRows * kUnit;
  }
  if constexpr (kRows > 1) {
    if (rows > 0)
      dot_rows<T, kColumns, kRows - 1>(rows, w, stride, x, x_stride, depth, ahead, sums);
  }
}

template <class T>
void by_rows(const LinearFewRowsArgs& a, const T* weight, int64_t column, int columns,
             float* sums) {
  constexpr int64_t kPage = 4096 / sizeof(T), kAhead = 1024 / sizeof(T);
  const int at_once = a.rows <= 2 ? kStreams : kShared;
  int c = 0;
  for (; c + at_once <= columns; c += at_once) {
    // Long rows are their own next lines; after short ones comes the next group of rows.
    const int64_t ahead = a.stride > kPage ? kAhead : at_once * a.stride;
    const T* w = weight + (column + c) * a.stride;
    if (a.rows <= 2) {
      dot_rows<T, kStreams, 2>(a.rows, w, a.stride, a.x, a.x_stride, a.depth, ahead, sums + c);
    } else {
      dot_rows<T, kShared, kRowsAtOnce>(a.rows, w, a.stride, a.x, a.x_stride, a.depth, ahead,
                                        sums + c);
    }
  }
  for (; c < columns; ++c) {
    const T* w = weight + (column + c) * a.stride;
    dot_rows<T, 1, kRowsAtOnce>(a.rows, w, a.stride, a.x, a.x_stride, a.depth, 0, sums + c);
  }
}

template <class T>
LMFAST_INLINE void finish(const LinearFewRowsArgs& a, const float* sums, int64_t row,
                          int64_t column, int columns) {
  T* out = static_cast<T*>(a.out) + row * a.columns + column;
  for (int v = 0; v < columns; v += W) {
    const int n = columns - v < W ? columns - v : W;
    VecF y = VecF::load(sums + v, n);
    if (a.bias != nullptr) y = y + VecF::load(static_cast<const T*>(a.bias) + column + v, n);
    // The second operand comes out when one is NaN.
    if (a.relu) y = max(VecF::zero(), y);
    if (n == W) {
      y.store(out + v);
    } else {
      y.store(out + v, n);
    }
  }
}

// kRows rows and kVecs_ vectors of columns; the depth in blocks, so that chains of additions stay
// short. `lanes` of the last vector are there.
template <class T, int kRows, int kVecs_>
inline __attribute__((noinline)) void column_tile(const LinearFewRowsArgs& a, int64_t row,
                                                  int64_t column, int lanes) {
  constexpr int64_t kBlock = 64;
  float sums[kRows][kVecs_ * W];
  const float* x = a.x + row * a.x_stride;
  const T* weight = static_cast<const T*>(a.weight) + column;
  for (int64_t k0 = 0; k0 < a.depth || k0 == 0; k0 += kBlock) {
    const int64_t past = a.depth - k0 < kBlock ? a.depth : k0 + kBlock;
    VecF sum[kRows][kVecs_];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < kVecs_; ++v) sum[r][v] = VecF::zero();
    }
    for (int64_t k = k0; k < past; ++k) {
      const T* w = weight + k * a.stride;
      VecF b[kVecs_];
#pragma GCC unroll 16
      for (int v = 0; v < kVecs_; ++v) {
        b[v] = v + 1 < kVecs_ || lanes == W ? VecF::load(w + v * W) : VecF::load(w + v * W, lanes);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const VecF s = VecF::set1(x[r * a.x_stride + k]);
#pragma GCC unroll 16
        for (int v = 0; v < kVecs_; ++v) sum[r][v] = fmadd(s, b[v], sum[r][v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < kVecs_; ++v) {
        float* p = sums[r] + v * W;
        if (k0 > 0) sum[r][v] = sum[r][v] + VecF::load(p);
        sum[r][v].store(p);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    finish<T>(a, sums[r], row + r, column, (kVecs_ - 1) * W + lanes);
  }
}

template <class T, int kVecs_, int kRows>
LMFAST_INLINE void column_rows(const LinearFewRowsArgs& a, int64_t row, int64_t column, int lanes) {
  for (; row + kRows <= a.rows; row += kRows) {
    column_tile<T, kRows, kVecs_>(a, row, column, lanes);
  }
  if constexpr (kRows > 1) {
    if (row < a.rows) column_rows<T, kVecs_, kRows - 1>(a, row, column, lanes);
  }
}

// One row of x: eight rows of the depth at a time, each read from end to end; the sums lie in L1.
template <class T, int kDepth>
LMFAST_INLINE void add_rows(const T* w, int64_t stride, const float* x, float* sums, int columns) {
  VecF s[kDepth];
#pragma GCC unroll 8
  for (int i = 0; i < kDepth; ++i) s[i] = VecF::set1(x[i]);
  int c = 0;
  for (; c + W <= columns; c += W) {
    VecF sum = s[0] * VecF::load(w + c);
#pragma GCC unroll 8
    for (int i = 1; i < kDepth; ++i) sum = fmadd(s[i], VecF::load(w + i * stride + c), sum);
    (sum + VecF::load(sums + c)).store(sums + c);
  }
  if (c < columns) {
    const int n = columns - c;
    VecF sum = VecF::load(sums + c, n);
#pragma GCC unroll 8
    for (int i = 0; i < kDepth; ++i) sum = fmadd(s[i], VecF::load(w + i * stride + c, n), sum);
    sum.store(sums + c, n);
  }
}

template <class T>
void one_by_columns(const LinearFewRowsArgs& a, int64_t column, int columns) {
  float sums[kSpan] = {};
  const T* w = static_cast<const T*>(a.weight) + column;
  int64_t k = 0;
  for (; k + 8 <= a.depth; k += 8) {
    add_rows<T, 8>(w + k * a.stride, a.stride, a.x + k, sums, columns);
  }
  for (; k < a.depth; ++k) add_rows<T, 1>(w + k * a.stride, a.stride, a.x + k, sums, columns);
  finish<T>(a, sums, 0, column, columns);
}

template <class T>
void by_columns(const LinearFewRowsArgs& a, int64_t column, int64_t past) {
  if (a.rows == 1) {
    for (; column < past; column += kSpan) {
      one_by_columns<T>(a, column, past - column < kSpan ? static_cast<int>(past - column) : kSpan);
    }
    return;
  }
  for (; column + kVecs * W <= past; column += kVecs * W) {
    column_rows<T, kVecs, kRowsAtOnce>(a, 0, column, W);
  }
  for (; column < past; column += W) {
    const int lanes = past - column < W ? static_cast<int>(past - column) : W;
    column_rows<T, 1, kRowsAtOnce>(a, 0, column, lanes);
  }
}

template <class T>
void run(const LinearFewRowsArgs& a, int64_t begin, int64_t end) {
  const int64_t first = begin * kUnit, past = end * kUnit < a.columns ? end * kUnit : a.columns;
  if (a.by_columns) {
    by_columns<T>(a, first, past);
    return;
  }
  float sums[kMost * kUnit];
  for (int64_t column = first; column < past; column += kUnit) {
    const int columns = past - column < kUnit ? static_cast<int>(past - column) : kUnit;
    by_rows<T>(a, static_cast<const T*>(a.weight), column, columns, sums);
    for (int64_t r = 0; r < a.rows; ++r) finish<T>(a, sums + r * kUnit, r, column, columns);
  }
}

template <class T>
void widen(const WidenArgs& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const T* x = static_cast<const T*>(a.x) + r * a.stride;
    float* out = a.out + r * a.width;
    int64_t i = 0;
    for (; i + W <= a.width; i += W) VecF::load(x + i).store(out + i);
    if (i < a.width) {
      const int n = static_cast<int>(a.width - i);
      VecF::load(x + i, n).store(out + i, n);
    }
  }
}

}  // namespace

void linear_few_rows(const LinearFewRowsArgs& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::kBF16:
      return run<bf16>(a, begin, end);
    case DType::kF16:
      return run<f16>(a, begin, end);
    default:
      return run<float>(a, begin, end);
  }
}

void linear_few_rows_widen(const WidenArgs& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::kBF16:
      return widen<bf16>(a, begin, end);
    case DType::kF16:
      return widen<f16>(a, begin, end);
    default:
      return widen<float>(a, begin, end);
  }
}

}  // namespace lmfast::LMFAST_ISA
