// Whole fp32 matrix products, C = A B^T + bias, for the layers whose loops are kernels here.
//
// Why not PyTorch's: its sums depend on the number of threads on some processors (MKL divides the
// depth), and nothing here may. So the depth is never divided over threads, and every element is
// the sum of chunks of the depth in order, each one chain of additions: shorter chains round less.
//
// B is packed once, 64 columns to a panel; a unit is some rows of A by some panels. A is read where
// it lies if its rows are contiguous (6 rows at a time, as in gemm_f32.h); if its columns are, as
// in the gradient of a weight, a chunk of it is packed first, because 6 numbers of each row of a
// matrix whose rows are a power of two apart fall into few sets of L1. With few rows (below 640)
// packing counts: a unit packs its own panels, which saves moving them between cores, or none
// where B's columns are contiguous.
//
// Floor: the FMA units, 237 GF/s on two cores of Zen 4 at 3.7 GHz; PyTorch's product has 150 to
// 200.
#include "product.h"

#include "../gemm_f32.h"
#include "../simd_transpose.h"

namespace lmfast::LMFAST_ISA {
namespace {

// Rows [first, first + rows) of the columns [k, k + depth) of A: six rows to a piece, depth in
// order.
void pack_a(const ProductArgs& a, int64_t first, int64_t rows, int64_t k, int64_t depth,
            float* out) {
  constexpr int W = VecF::kWidth;
  for (int64_t m = 0; m < rows; m += kGemmRows) {
    const int n = static_cast<int>(rows - m < kGemmRows ? rows - m : kGemmRows);
    const float* in = a.a.data + first + m + k * a.a.stride;
    for (int64_t i = 0; i < depth; ++i, in += a.a.stride, out += kGemmRows) {
      for (int j = 0; j < n; j += W) {
        const int lanes = n - j < W ? n - j : W;
        VecF::load(in + j, lanes).store(out + j, lanes);
      }
    }
  }
}

// The columns of panel p, at most kProductLanes.
int64_t columns_of(const ProductArgs& a, int64_t p) {
  const int64_t left = a.columns - p * kProductLanes;
  return left < kProductLanes ? left : kProductLanes;
}

// The depth [k, k + depth) of panel p.
void pack_panel(const ProductArgs& a, int64_t p, int64_t k, int64_t depth, float* out) {
  constexpr int W = VecF::kWidth;
  const int64_t column = p * kProductLanes;
  const int lanes = static_cast<int>(columns_of(a, p));
  if (!a.b.by_columns) {
    rows_to_lanes(a.b.data + column * a.b.stride + k, a.b.stride, lanes, static_cast<int>(depth),
                  out, kProductLanes, static_cast<int>(kProductLanes));
    return;
  }
  const float* in = a.b.data + column + k * a.b.stride;
  for (int64_t i = 0; i < depth; ++i, in += a.b.stride, out += kProductLanes) {
    int n = 0;
    for (; n + W <= lanes; n += W) VecF::load(in + n).store(out + n);
    for (; n < kProductLanes; n += W) {
      (n < lanes ? VecF::load(in + n, lanes - n) : VecF::zero()).store(out + n);
    }
  }
}

// c (rows x lanes) += the chunk's products, by panels of B `b`.
void multiply_block(const ProductArgs& a, const float* from, int64_t rows, int64_t lanes,
                    int64_t depth, const float* b, int64_t b_stride, float* c, int64_t c_stride) {
  if (!a.a.by_columns) {
    gemm_f32<false, true>(rows, lanes, depth, from, a.a.stride, b, b_stride, c, c_stride);
    return;
  }
  for (int64_t m = 0; m < rows; m += kGemmRows) {
    const int64_t n = rows - m < kGemmRows ? rows - m : kGemmRows;
    gemm_f32<true, true>(n, lanes, depth, from + m * depth, kGemmRows, b, b_stride,
                         c + m * c_stride, c_stride);
  }
}

// The first sums of c: the bias, or zeros.
void start(const ProductArgs& a, int64_t column, int64_t columns, int64_t rows, float* c,
           int64_t c_stride) {
  constexpr int W = VecF::kWidth;
  for (int64_t n = 0; n < columns; n += W) {
    const int lanes = static_cast<int>(columns - n < W ? columns - n : W);
    const VecF value = a.bias == nullptr ? VecF::zero() : VecF::load(a.bias + column + n, lanes);
    for (int64_t r = 0; r < rows; ++r) value.store(c + r * c_stride + n, lanes);
  }
}

void multiply_unit(const ProductArgs& a, int64_t unit) {
  constexpr int W = VecF::kWidth;
  const int64_t first = unit / a.groups * a.block, panel = unit % a.groups * a.group;
  const int64_t rows = a.rows - first < a.block ? a.rows - first : a.block;
  const int64_t all = (a.columns + kProductLanes - 1) / kProductLanes;
  const int64_t past = panel + a.group < all ? panel + a.group : all;
  float* packed_a = a.scratch;
  float* packed_b = packed_a + (a.a.by_columns ? a.block * a.chunk : 0);
  // Sums of a last panel with an odd number of columns: whole vectors would run into the next row.
  float* edge = packed_b + (a.packing == ProductPacking::kByUnit ? kProductLanes * a.chunk : 0);
  const int64_t ragged = a.columns % W == 0 ? all : all - 1;
  float* const c = a.c + first * a.columns;
  for (int64_t p = panel; p < past; ++p) {
    const int64_t column = p * kProductLanes;
    p == ragged ? start(a, column, columns_of(a, p), rows, edge, kProductLanes)
                : start(a, column, columns_of(a, p), rows, c + column, a.columns);
  }
  for (int64_t k = 0; k < a.depth; k += a.chunk) {
    const int64_t depth = a.depth - k < a.chunk ? a.depth - k : a.chunk;
    const float* from = a.a.data + first * a.a.stride + k;
    if (a.a.by_columns) {
      pack_a(a, first, rows, k, depth, packed_a);
      from = packed_a;
    }
    for (int64_t p = panel; p < past; ++p) {
      const int64_t column = p * kProductLanes;
      const int64_t lanes = (columns_of(a, p) + W - 1) / W * W;
      const float* b = packed_b;
      int64_t b_stride = kProductLanes;
      if (a.packing == ProductPacking::kBefore) {
        b = a.packed_b + (p * a.depth + k) * kProductLanes;
      } else if (a.packing == ProductPacking::kByUnit) {
        pack_panel(a, p, k, depth, packed_b);
      } else {
        b = a.b.data + column + k * a.b.stride;
        b_stride = a.b.stride;
      }
      p == ragged ? multiply_block(a, from, rows, lanes, depth, b, b_stride, edge, kProductLanes)
                  : multiply_block(a, from, rows, lanes, depth, b, b_stride, c + column, a.columns);
    }
  }
  if (ragged < panel || ragged >= past) return;
  const int64_t column = ragged * kProductLanes;
  for (int64_t r = 0; r < rows; ++r) {
    memcpy(c + r * a.columns + column, edge + r * kProductLanes, 4 * (a.columns - column));
  }
}

}  // namespace

void product_pack(const ProductArgs& a, int64_t begin, int64_t end) {
  for (int64_t p = begin; p < end; ++p) {
    pack_panel(a, p, 0, a.depth, a.packed_b + p * a.depth * kProductLanes);
  }
}

void product_multiply(const ProductArgs& a, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) multiply_unit(a, unit);
}

}  // namespace lmfast::LMFAST_ISA
