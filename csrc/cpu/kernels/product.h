// Arguments of whole fp32 matrix products: C = A B^T + bias. No torch header.
#pragma once

#include "../dispatch.h"

namespace lmfast {

// A matrix of which the rows or, with by_columns, the columns are contiguous.
struct ProductOperand {
  const float* data;
  int64_t stride;  // floats between rows, or between columns
  bool by_columns;
};

// Who packs B: product_pack all of it, every unit what it needs, or nobody (its columns are
// contiguous, and whole vectors).
enum class ProductPacking : int { kBefore, kByUnit, kNone };

struct ProductArgs {
  int64_t rows, columns, depth;  // C (rows, columns), A (rows, depth), B (columns, depth)
  ProductOperand a, b;
  const float* bias;  // (columns); null: none
  float* c;           // contiguous
  ProductPacking packing;
  float* packed_b;  // all panels of B, zeros behind the last column: chunk by chunk of the depth
  int64_t chunk;    // products are summed in chunks of the depth of at most this many
  // A unit is a block of rows by `group` panels; the units of a row of blocks lie together. The
  // blocks are as even as tiles of kProductRows rows allow, and none has more than `block` rows.
  int64_t blocks, block, group, groups;
  float* scratch;  // product_scratch_floats
};

// Columns of a panel of B, and rows of a tile, at every level.
inline constexpr int64_t kProductLanes = 64, kProductRows = 6;

// First row of a block, or the number of rows for the one past the last.
inline int64_t product_first_row(const ProductArgs& a, int64_t block) {
  const int64_t tiles = (a.rows + kProductRows - 1) / kProductRows;
  return block == a.blocks ? a.rows : block * tiles / a.blocks * kProductRows;
}

// Divides the rows into that many blocks, or as many as there are tiles.
inline void divide_product_rows(ProductArgs& a, int64_t blocks) {
  const int64_t tiles = (a.rows + kProductRows - 1) / kProductRows;
  a.blocks = blocks < tiles ? blocks : tiles;
  a.block = (tiles + a.blocks - 1) / a.blocks * kProductRows;
}

// Of a unit's packed rows of A, and a line behind them that stores may run over into.
inline int64_t product_packed_a_floats(const ProductArgs& a) {
  return (a.block * a.chunk + 31) / 16 * 16;
}

inline int64_t product_scratch_floats(const ProductArgs& a) {
  const int64_t of_a = product_packed_a_floats(a);
  const int64_t of_b = a.packing == ProductPacking::kByUnit ? kProductLanes * a.chunk : 0;
  return of_a + of_b + (a.block + 1) * kProductLanes;
}

// What this level's kernels are best at: reading contiguous columns of B where they lie.
struct ProductTraits {
  bool* reads_columns;
};

LMFAST_DECLARE_KERNEL(product_traits, ProductTraits)  // range: unused
LMFAST_DECLARE_KERNEL(product_pack, ProductArgs)      // range: panels of B, for kBefore
LMFAST_DECLARE_KERNEL(product_multiply, ProductArgs)  // range: units

}  // namespace lmfast
