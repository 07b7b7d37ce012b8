// Whole fp32 matrix products, C = A B^T + bias, for the layers whose loops are kernels here.
//
// Why not PyTorch's: its sums depend on the number of threads on some processors (MKL divides the
// depth), and nothing here may. So the depth is never divided over threads, and every element is
// the sum of chunks of the depth in order, each one chain of additions: shorter chains round less.
//
// B is packed once, 64 columns to a panel; a unit is some rows of A by some panels. A is read where
// it lies if its rows are contiguous (6 rows at a time, as in gemm_f32.h); if its columns are, as
// in the gradient of a weight, and far apart, a chunk of it is packed first, because 6 numbers of
// each row of a matrix whose rows are a power of two apart fall into few sets of L1. (Up to 128
// columns they are read where they lie: 128 by 128 of depth 3840 1.24 -> 1.17 ms on one core.) With
// few rows (below 640) packing counts: a unit packs its own panels, which saves moving them between
// cores, or none where B's columns are contiguous. All that holds for AVX-512; with narrower tiles
// A is always packed, and contiguous columns of B too.
//
// Floor: the FMA units, 237 GF/s on two cores of Zen 4 at 3.7 GHz; PyTorch's product has 150 to
// 200. With AVX2 on one core of Zen 3 at 2.9 GHz it is 93 GF/s, a tile out of L1 reaches 89, and
// 2240 rows by 2048 columns of depth 512: 41 with panels of 64 columns, 76 in strips, 81 with A
// packed; PyTorch's 71 to 78. Gained nothing: sums over pieces of the depth, so that each operand
// is read once; on AVX-512, panels of B packed where its columns are contiguous; the roles of A and
// B exchanged and the result transposed.
#include "product.h"

#include "../gemm_f32.h"
#include "../simd_transpose.h"

namespace lmfast::LMFAST_ISA {
namespace {

static_assert(kProductRows == kGemmRows);

// Columns of a strip, which is as wide as a tile: a panel is one strip or several, and the depth of
// a strip lies together. Strips of 16 columns a panel's width apart fell into a quarter of L1's
// sets.
constexpr int64_t kStrip = kGemmVecs * VecF::kWidth;
static_assert(kProductLanes % kStrip == 0);

template <bool kValue>
struct Constant {
  static constexpr bool value = kValue;
};

// Whether a unit packs its rows of A. Narrow strips read A more often, and six short rows are six
// streams that no prefetcher follows. Else if its columns are contiguous, and so far apart that 6
// numbers of each fall into few sets of L1; up to 512 bytes apart they are read where they lie.
bool packs_a(const ProductArgs& a) {
  return kStrip < kProductLanes || (a.a.by_columns && a.a.stride > 128);
}

// out[k][r] = in[r][k], kGemmRows numbers to each k. A store may run over into the next ones.
void pack_rows(const float* in, int64_t stride, int rows, int64_t depth, float* out) {
  constexpr int W = VecF::kWidth;
  int64_t k = 0;
  for (; W >= kGemmRows && k + W <= depth; k += W) {
    VecF w[W];
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r) w[r] = r < rows ? VecF::load(in + r * stride + k) : VecF::zero();
    transpose(w);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) w[i].store(out + (k + i) * kGemmRows);
  }
  for (; k < depth; ++k) {
    for (int r = 0; r < rows; ++r) out[k * kGemmRows + r] = in[r * stride + k];
  }
}

// Rows [first, first + rows) of the columns [k, k + depth) of A: six rows to a piece, depth in
// order. One column after the other: piece by piece a column's numbers, a power of two apart, throw
// each other out of L1 (48 rows, depth 128: 0.6 us so, 2.7 by pieces, the product 13).
void pack_a(const ProductArgs& a, int64_t first, int64_t rows, int64_t k, int64_t depth,
            float* out) {
  if (!a.a.by_columns) {
    const float* in = a.a.data + first * a.a.stride + k;
    for (int64_t m = 0; m < rows; m += kGemmRows) {
      const int64_t n = rows - m < kGemmRows ? rows - m : kGemmRows;
      pack_rows(in + m * a.a.stride, a.a.stride, static_cast<int>(n), depth, out + m * depth);
    }
    return;
  }
  const float* in = a.a.data + first + k * a.a.stride;
  const int64_t whole = rows / kGemmRows, rest = rows % kGemmRows;
  for (int64_t i = 0; i < depth; ++i, in += a.a.stride, out += kGemmRows) {
    for (int64_t m = 0; m < whole; ++m) {
      memcpy(out + m * depth * kGemmRows, in + m * kGemmRows, 4 * kGemmRows);
    }
    float* last = out + whole * depth * kGemmRows;
    for (int64_t r = 0; r < rest; ++r) last[r] = in[whole * kGemmRows + r];
  }
}

// The columns of panel p, at most kProductLanes.
int64_t columns_of(const ProductArgs& a, int64_t p) {
  const int64_t left = a.columns - p * kProductLanes;
  return left < kProductLanes ? left : kProductLanes;
}

// The depth [k, k + depth) of panel p, strip by strip.
void pack_panel(const ProductArgs& a, int64_t p, int64_t k, int64_t depth, float* out) {
  constexpr int W = VecF::kWidth;
  const int64_t past = p * kProductLanes + columns_of(a, p);
  for (int64_t s = 0; s < kProductLanes; s += kStrip, out += depth * kStrip) {
    const int64_t column = p * kProductLanes + s;
    const int lanes = static_cast<int>(past <= column           ? 0
                                       : past - column < kStrip ? past - column
                                                                : kStrip);
    if (!a.b.by_columns) {
      rows_to_lanes(a.b.data + column * a.b.stride + k, a.b.stride, lanes, static_cast<int>(depth),
                    out, kStrip, static_cast<int>(kStrip));
      continue;
    }
    const float* in = a.b.data + column + k * a.b.stride;
    float* to = out;
    for (int64_t i = 0; i < depth; ++i, in += a.b.stride, to += kStrip) {
      int n = 0;
      for (; n + W <= lanes; n += W) VecF::load(in + n).store(to + n);
      for (; n < kStrip; n += W) {
        (n < lanes ? VecF::load(in + n, lanes - n) : VecF::zero()).store(to + n);
      }
    }
  }
}

// Where the numbers of an operand are that a unit reads next, and how many rows of them to ask for
// during each tile, so that they arrive while it multiplies.
struct Next {
  const float* data;
  int64_t stride, rows, width, each;

  void ask(int64_t count) {
    for (int64_t i = 0; i < count && rows > 0; ++i, --rows, data += stride) {
      for (int64_t n = 0; n < width; n += 16) __builtin_prefetch(data + n, 0, 2);
      __builtin_prefetch(data + width - 1, 0, 2);
    }
  }
};

// What a tile asks for: its rows of c, and its part of what is next, by three quarters of the
// depth.
class TileAsk {
 public:
  static constexpr bool kAsks = true;

  TileAsk(int64_t depth, Next (&next)[2]) : next_(next) {
    const int64_t segments = depth < 2 * kGemmSegment ? 1 : depth * 3 / (4 * kGemmSegment);
    for (int i = 0; i < 2; ++i) share_[i] = (next[i].each + segments - 1) / segments;
  }

  template <class Place>
  LMFAST_INLINE void operator()(const Place& place) const {
    place.ask_for_c();
    const int64_t segment = place.k / kGemmSegment;
    for (int i = 0; i < 2; ++i) {
      if (segment * share_[i] < next_[i].each) next_[i].ask(share_[i]);
    }
  }

 private:
  Next* next_;
  int64_t share_[2];
};

// A chunk of a panel: a strip's rows are `stride` apart, the strips `step`.
struct Panel {
  const float* data;
  int64_t stride, step;
};

// c (rows x lanes) = the chunk's products and what is `added`, a row for all of c or c itself.
void multiply_strip(const ProductArgs& a, const float* from, int64_t rows, int64_t lanes,
                    int64_t depth, const float* b, int64_t b_stride, float* c, int64_t c_stride,
                    const float* added, int64_t added_stride, const TileAsk& ask) {
  const bool packs = packs_a(a);
  const int64_t stride = packs ? kGemmRows : a.a.stride;
  for (int64_t m = 0; m < rows; m += kGemmRows) {
    const int64_t n = rows - m < kGemmRows ? rows - m : kGemmRows;
    const auto tile = [&](auto columns, auto adds) {
      gemm_f32<decltype(columns)::value, decltype(adds)::value>(
          n, lanes, depth, from, stride, b, b_stride, c, c_stride, added, added_stride, ask);
    };
    using Yes = Constant<true>;
    using No = Constant<false>;
    if (packs || a.a.by_columns) {
      added != nullptr ? tile(Yes{}, Yes{}) : tile(Yes{}, No{});
    } else {
      added != nullptr ? tile(No{}, Yes{}) : tile(No{}, No{});
    }
    from += kGemmRows * (packs ? depth : a.a.by_columns ? 1 : a.a.stride);
    c += kGemmRows * c_stride;
    if (added != nullptr) added += kGemmRows * added_stride;
  }
}

void multiply_panel(const ProductArgs& a, const float* from, int64_t rows, int64_t lanes,
                    int64_t depth, const Panel& b, float* c, int64_t c_stride, const float* added,
                    int64_t added_stride, Next (&next)[2]) {
  const TileAsk ask(depth, next);
  const float* strip = b.data;
  for (int64_t s = 0; s < lanes; s += kStrip, strip += b.step) {
    multiply_strip(a, from, rows, lanes - s < kStrip ? lanes - s : kStrip, depth, strip, b.stride,
                   c + s, c_stride, added == nullptr ? nullptr : added + s, added_stride, ask);
  }
}

void multiply_unit(const ProductArgs& a, int64_t unit) {
  constexpr int W = VecF::kWidth;
  const int64_t number = unit / a.groups, panel = unit % a.groups * a.group;
  const int64_t first = product_first_row(a, number);
  const int64_t rows = product_first_row(a, number + 1) - first;
  const int64_t all = (a.columns + kProductLanes - 1) / kProductLanes;
  const int64_t past = panel + a.group < all ? panel + a.group : all;
  float* packed_a = a.scratch;
  float* packed_b = packed_a + product_packed_a_floats(a);
  // Sums of a last panel with an odd number of columns, whose whole vectors would run into the next
  // row of C, and its bias behind them.
  float* edge = packed_b + (a.packing == ProductPacking::kByUnit ? kProductLanes * a.chunk : 0);
  float* edge_bias = edge + a.block * kProductLanes;
  const int64_t ragged = a.columns % W == 0 ? all : all - 1;
  if (ragged < past && a.bias != nullptr) {
    memset(edge_bias, 0, 4 * kProductLanes);
    memcpy(edge_bias, a.bias + ragged * kProductLanes, 4 * columns_of(a, ragged));
  }
  const int64_t tiles =
      (rows + kGemmRows - 1) / kGemmRows * (past - panel) * (kProductLanes / kStrip);
  int64_t k = 0;
  do {
    const int64_t depth = a.depth - k < a.chunk ? a.depth - k : a.chunk;
    const float* from =
        a.a.data + (a.a.by_columns ? first + k * a.a.stride : first * a.a.stride + k);
    if (packs_a(a)) {
      pack_a(a, first, rows, k, depth, packed_a);
      from = packed_a;
    }
    const int64_t later = k + depth, left = a.depth - later;
    const auto next_of = [&](const ProductOperand& m, int64_t at, int64_t width) {
      return Next{m.data + at + later * m.stride, m.stride, left < a.chunk ? left : a.chunk, width,
                  (a.chunk + tiles - 1) / tiles};
    };
    Next next[2] = {};
    if (a.a.by_columns) next[0] = next_of(a.a, first, rows);
    if (a.packing == ProductPacking::kNone) {
      const int64_t column = panel * kProductLanes, end = past * kProductLanes;
      next[1] = next_of(a.b, column, (end < a.columns ? end : a.columns) - column);
    }
    for (int64_t p = panel; p < past; ++p) {
      const int64_t column = p * kProductLanes;
      const int64_t lanes = (columns_of(a, p) + W - 1) / W * W;
      Panel b{packed_b, kStrip, depth * kStrip};
      if (a.packing == ProductPacking::kBefore) {
        b.data = a.packed_b + (p * a.depth + k) * kProductLanes;
      } else if (a.packing == ProductPacking::kByUnit) {
        pack_panel(a, p, k, depth, packed_b);
      } else {
        b = {a.b.data + column + k * a.b.stride, a.b.stride, kStrip};
      }
      float* c = p == ragged ? edge : a.c + first * a.columns + column;
      const int64_t c_stride = p == ragged ? kProductLanes : a.columns;
      const float* bias = a.bias == nullptr ? nullptr : p == ragged ? edge_bias : a.bias + column;
      multiply_panel(a, from, rows, lanes, depth, b, c, c_stride, k == 0 ? bias : c,
                     k == 0 ? 0 : c_stride, next);
    }
    k += a.chunk;
  } while (k < a.depth);
  if (ragged < panel || ragged >= past) return;
  const int64_t column = ragged * kProductLanes;
  for (int64_t r = 0; r < rows; ++r) {
    memcpy(a.c + (first + r) * a.columns + column, edge + r * kProductLanes,
           4 * (a.columns - column));
  }
}

}  // namespace

void product_traits(const ProductTraits& a, int64_t, int64_t) {
  // Lines of a strip a power of two apart throw each other out of L1, which whole rows of a panel
  // make up for; narrow strips are packed (two cores of Zen 3, AVX2, 512 by 512 of depth 2240 100
  // -> 137 GF/s).
  *a.reads_columns = kStrip == kProductLanes;
}

void product_pack(const ProductArgs& a, int64_t begin, int64_t end) {
  for (int64_t p = begin; p < end; ++p) {
    for (int64_t k = 0; k < a.depth; k += a.chunk) {
      const int64_t depth = a.depth - k < a.chunk ? a.depth - k : a.chunk;
      pack_panel(a, p, k, depth, a.packed_b + (p * a.depth + k) * kProductLanes);
    }
  }
}

void product_multiply(const ProductArgs& a, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) multiply_unit(a, unit);
}

}  // namespace lmfast::LMFAST_ISA
