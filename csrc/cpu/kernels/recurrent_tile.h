// The register tile of the recurrent products, shared by forward and backward: a few rows of the
// state (or of the gates' gradients) times one panel of packed weights.
#pragma once

#include "../simd.h"
#include "recurrent.h"

namespace lmfast::LMFAST_ISA {
namespace {

// Vectors of a panel and rows of a tile: as many accumulators as the registers hold beside the
// panel's vectors and one broadcast. Of 16 registers two rows of four vectors would be left, which
// keep neither unit busy: four vectors are taken two at a time.
template <int kVecs>
struct TileRows {
#if defined(__AVX512F__)
  static constexpr int at_once = kVecs;
  static constexpr int value = kVecs >= 4 ? 6 : 8;
#else
  static constexpr int at_once = kVecs >= 4 ? 2 : kVecs;
  static constexpr int value = kVecs == 3 ? 4 : 6;
#endif
};

// A batch of one or two rows leaves too few accumulators to hide the latency of an addition; its
// sums are kept in several parts. Depends on the batch alone, so that no result depends on how
// rows are divided over threads.
constexpr int kSmallBatch = 2;
template <int kRows, bool kSmall>
struct TileParts {
#if defined(__AVX512F__)
  static constexpr int value = !kSmall ? 1 : kRows == 1 ? 4 : 2;
#else
  static constexpr int value = kSmall && kRows == 1 ? 2 : 1;
#endif
};

// part[p][r][v] += sum over k of a[r * stride + k] * panel[k][v], k = p, p + kParts, ... Vector v
// is in strip v / kStrip of the panel, and the strips are `apart`.
template <int kRows, int kVecs, int kStrip, int kParts>
LMFAST_INLINE void multiply_block(VecF (&part)[kParts][kRows][kVecs], const float* a,
                                  int64_t stride, const float* panel, int64_t apart,
                                  int64_t depth) {
  constexpr int W = VecF::kWidth;
  int64_t k = 0;
  for (; k + kParts <= depth; k += kParts) {
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
      VecF row[kVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        row[v] = VecF::load(panel + v / kStrip * apart + (p * kStrip + v % kStrip) * W);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const VecF x = VecF::set1(a[r * stride + p]);
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) part[p][r][v] = fmadd(x, row[v], part[p][r][v]);
      }
    }
    a += kParts;
    panel += kParts * kStrip * W;
  }
  for (; kParts > 1 && k < depth; ++k) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const VecF x = VecF::set1(a[r * stride]);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        const VecF row = VecF::load(panel + v / kStrip * apart + v % kStrip * W);
        part[0][r][v] = fmadd(x, row, part[0][r][v]);
      }
    }
    ++a;
    panel += kStrip * W;
  }
}

// sum[r][at + v] = sum over k of a[r * stride + k] * panel[k][v], v < kVecs. In blocks:
// one chain of additions over H = 512 has 1.5 times the error of PyTorch's product, chains of 128
// have less than it. Without a fused multiply-add there are twice as many roundings, and shorter
// chains.
//
// ask(i), i < ask.count, asks for lines that the cells need behind the product; all are asked for
// by three quarters of the depth. A tile of the LSTM's backward has 260 of them and a core two
// dozen places for misses: all at its start held up the loads of the product itself (128 rows, 30
// steps, H = 128 on one core of Zen 4: LSTM 5.9 ms so, 4.95 spread out; its forward 7.0 and 6.05).
template <int kRows, int kVecs, int kStrip, int kParts, int kAll, class Ask>
LMFAST_INLINE void multiply_vecs(VecF (&sum)[kRows][kAll], int at, const float* a, int64_t stride,
                                 const float* panel, int64_t depth, const Ask& ask) {
#if defined(__FMA__)
  constexpr int64_t kBlock = 128;
#else
  constexpr int64_t kBlock = 16;
#endif
  constexpr int64_t kSegment = 16;
  const int64_t all = depth * 3 / 4;
  int64_t asked = 0;
  // The first ones here: with one loop for all, inside, the compiled code takes 3 % longer.
  for (; asked * all < kSegment * ask.count && asked < ask.count; ++asked) ask(asked);
  for (int64_t first = 0; first < depth; first += kBlock) {
    VecF part[kParts][kRows][kVecs];
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) part[p][r][v] = VecF::zero();
      }
    }
    const int64_t past = first + kBlock < depth ? first + kBlock : depth;
    for (int64_t k = first; k < past; k += kSegment) {
      const int64_t left = past - k;
      for (; asked * all < k * ask.count && asked < ask.count; ++asked) ask(asked);
      multiply_block<kRows, kVecs, kStrip, kParts>(
          part, a + k, stride, panel + k * kStrip * VecF::kWidth, depth * kStrip * VecF::kWidth,
          left < kSegment ? left : kSegment);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        VecF total = part[0][r][v];
#pragma GCC unroll 4
        for (int p = 1; p < kParts; ++p) total = total + part[p][r][v];
        sum[r][at + v] = first == 0 ? total : sum[r][at + v] + total;
      }
    }
  }
}

struct AskNone {
  static constexpr int64_t count = 0;
  LMFAST_INLINE void operator()(int64_t) const {}
};

// sum = a panel, of as many vectors at once as the registers hold; one or two rows need all of
// them to hide the latency of an addition.
template <int kRows, int kVecs, bool kSmall, class Ask>
LMFAST_INLINE void multiply(VecF (&sum)[kRows][kVecs], const float* a, int64_t stride,
                            const float* panel, int64_t depth, const Ask& ask) {
  constexpr int kParts = TileParts<kRows, kSmall>::value;
  constexpr int kStrip = TileRows<kVecs>::at_once, kAtOnce = kSmall ? kVecs : kStrip;
  multiply_vecs<kRows, kAtOnce, kStrip, kParts>(sum, 0, a, stride, panel, depth, ask);
  if constexpr (kAtOnce < kVecs) {
    panel += kStrip * depth * VecF::kWidth;
    multiply_vecs<kRows, kVecs - kAtOnce, kStrip, kParts>(sum, kAtOnce, a, stride, panel, depth,
                                                          AskNone{});
  }
}

// Lanes of the vector at `unit` that hold units.
LMFAST_INLINE int lanes_at(int64_t unit, int64_t hidden) {
  const int64_t left = hidden - unit;
  return static_cast<int>(left < 0 ? 0 : left < VecF::kWidth ? left : VecF::kWidth);
}

LMFAST_INLINE VecF load_or_zero(const float* p, int64_t at, int lanes) {
  return p == nullptr ? VecF::zero() : VecF::load(p + at, lanes);
}

// The units of a vector: all of them, or the first `count`.
template <bool kFull>
struct Lanes {
  int count;

  LMFAST_INLINE VecF load(const float* p) const {
    return kFull ? VecF::load(p) : VecF::load(p, count);
  }
  LMFAST_INLINE VecF load_or_zero(const float* p, int64_t at) const {
    return p == nullptr ? VecF::zero() : load(p + at);
  }
  LMFAST_INLINE void store(VecF x, float* p) const { kFull ? x.store(p) : x.store(p, count); }
};

// Asks for kPieces lines that lie `step` floats apart, to be read or written behind the product.
// The processor's own prefetchers do not follow a tile from row to row.
template <int kPieces, bool kWrite = false>
LMFAST_INLINE void ask_for(const float* p, int64_t step) {
#pragma GCC unroll 4
  for (int i = 0; i < kPieces; ++i) __builtin_prefetch(p + i * step, kWrite ? 1 : 0);
}

// Calls run(first, rows) over [begin, end) in pieces of at most kMost rows, as even as they get:
// a last tile of one row would run at a quarter of the speed.
template <int kMost, class Run>
LMFAST_INLINE void for_each_tile(int64_t begin, int64_t end, const Run& run) {
  const int64_t rows = end - begin;
  if (rows <= 0) return;
  const int64_t tiles = (rows + kMost - 1) / kMost;
  const int64_t low = rows / tiles, higher = rows % tiles;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t take = low + (i < higher ? 1 : 0);
    run(begin, static_cast<int>(take));
    begin += take;
  }
}

LMFAST_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
LMFAST_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Rows of step t, none for a step outside the sequence.
LMFAST_INLINE int64_t rows_of(const RecurrentShape& s, int64_t t) {
  return t < 0 || t >= s.steps ? 0 : s.sizes[t];
}

// Asks for what another core wrote at step t, if it is little: each of its lines takes a tenth of
// a microsecond to come over, and the product would wait for one after the other.
LMFAST_INLINE void ask_for_rows(const float* data, const RecurrentShape& s, int64_t t,
                                int64_t width) {
  constexpr int64_t kMost = 4096;
  const int64_t size = rows_of(s, t) * width;
  if (size == 0 || size > kMost) return;
  const float* p = data + s.offsets[t] * width;
  for (int64_t i = 0; i < size; i += 16) __builtin_prefetch(p + i);
}

// The weight row that meets column k of the gates' gradients.
LMFAST_INLINE int64_t weight_row(Cell cell, int64_t k, int64_t hidden) {
  if (cell != Cell::kGru) return k;
  return k < hidden ? 2 * hidden + k : k - hidden;  // (n, r, z) there, (r, z, n) in the weights
}

}  // namespace
}  // namespace lmfast::LMFAST_ISA
