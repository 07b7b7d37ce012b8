// A linear layer for a few rows, as when a model generates: y = x W^T + b, at most 32 rows, W read
// where the model keeps it.
//
// Floor: reading W once. With rows of W contiguous a sum runs along lanes; 8 rows of W at a time
// are 8 streams, and 4 x 6 sums (rows of W x rows of x) share every load when there are more rows.
// What comes next is fetched into the second level (prefetch.h): bf16, one row, 18-25 -> 25-39 GB/s
// on two cores of Zen 4, fp32, 8 rows, 19-21 -> 28.
// With columns of W contiguous (GPT-2 keeps its matrices so) a lane is a column. Eight steps of the
// depth are read from end to end, each weight loaded and widened once for all rows of x, whose sums
// lie in L1: one row took 22 GB/s by tiles of 64 columns and takes 25-38 so, 8 rows 12-16 and 22-28
// (fp32), 9-14 and 10-22 (bf16). Neither the number of threads nor that of rows changes a bit.
#include "linear_few_rows.h"

#include "../lane_sums.h"
#include "../prefetch.h"
#include "linear_finish.h"

namespace lmfast::LMFAST_ISA {
namespace {

constexpr int W = VecF::kWidth;
constexpr int kUnit = static_cast<int>(kFewRowsColumns);
constexpr int kMost = static_cast<int>(kFewRows);
#if defined(__AVX512F__)
constexpr int kRowsAtOnce = 6;
#else
constexpr int kRowsAtOnce = 3;
#endif
// Columns at once for few rows of x (1 or 2) and for more.
constexpr int kStreams = 8, kShared = 4;
// Sums of columns that stay in L1, of all rows together.
constexpr int kSums = 4096;

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
  const T* bias = a.bias == nullptr ? nullptr : static_cast<const T*>(a.bias) + column;
  T* out = static_cast<T*>(a.out) + row * a.columns + column;
  finish_row(out, sums, bias, a.relu, columns, [](VecF y, int, int) { return y; });
}

// Adds kDepth rows of the depth, each read from end to end, to the sums of all rows of x: the
// weights are loaded and widened once for all of them.
template <class T, int kDepth>
LMFAST_INLINE void add_depth(const LinearFewRowsArgs& a, int64_t k, int64_t column, int columns,
                             float* sums, int64_t span) {
  const T* weight = static_cast<const T*>(a.weight) + k * a.stride + column;
  const int64_t ahead = kDepth * a.stride;
  for (int c = 0; c < columns; c += W) {
    const int n = columns - c < W ? columns - c : W;
    VecF b[kDepth];
#pragma GCC unroll 8
    for (int i = 0; i < kDepth; ++i) {
      const T* w = weight + i * a.stride + c;
      if (c % (64 / static_cast<int>(sizeof(T))) == 0) prefetch(w + ahead);
      b[i] = n == W ? VecF::load(w) : VecF::load(w, n);
    }
    const float* x = a.x + k;
    float* sum = sums + c;
    for (int64_t r = 0; r < a.rows; ++r, x += a.x_stride, sum += span) {
      VecF s = VecF::set1(x[0]) * b[0];
#pragma GCC unroll 8
      for (int i = 1; i < kDepth; ++i) s = fmadd(VecF::set1(x[i]), b[i], s);
      (s + VecF::load(sum)).store(sum);
    }
  }
}

template <class T>
void by_columns(const LinearFewRowsArgs& a, int64_t column, int64_t past) {
  const int64_t units = kSums / kUnit / a.rows;
  const int64_t span = units * kUnit;
  float sums[kSums];
  for (; column < past; column += span) {
    const int columns = static_cast<int>(past - column < span ? past - column : span);
    memset(sums, 0, sizeof(float) * static_cast<size_t>(a.rows * span));
    int64_t k = 0;
    for (; k + 8 <= a.depth; k += 8) add_depth<T, 8>(a, k, column, columns, sums, span);
    for (; k < a.depth; ++k) add_depth<T, 1>(a, k, column, columns, sums, span);
    for (int64_t r = 0; r < a.rows; ++r) finish<T>(a, sums + r * span, r, column, columns);
  }
}

template <class T>
void run(const LinearFewRowsArgs& a, int64_t begin, int64_t end) {
  const int64_t first = begin * kUnit, past = end * kUnit < a.columns ? end * kUnit : a.columns;
  if (a.rows == 0) return;
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

}  // namespace lmfast::LMFAST_ISA
