// Recurrent weights in the order the products read them, zeros behind the last unit.
//
// Forward: panel, strip of vectors, k, unit vector, gate, lane. All gates of a unit meet in one
// register tile, which applies them before anything is stored. Backward: panel, k over the gates'
// gradients, lane. Copied once per call and read once per step.
#include "../simd_transpose.h"
#include "recurrent_cells.h"
#include "recurrent_tile.h"

namespace lmfast::LMFAST_ISA {
namespace {

// out[k * step + lane] = W_hh[row + lane][k]; transposed in registers where rows lie together: by
// single numbers it took longer than ten steps of the loop that it is for.
void pack_lanes(const RecurrentPackArgs& a, int64_t row, int lanes, float* out, int64_t step) {
  constexpr int W = VecF::kWidth;
  const float* in = a.w + row * a.row_stride;
  if (a.column_stride == 1) {
    rows_to_lanes(in, a.row_stride, lanes, static_cast<int>(a.hidden), out, step, W);
  } else if (a.row_stride == 1) {
    for (int64_t k = 0; k < a.hidden; ++k) {
      VecF::load(in + k * a.column_stride, lanes).store(out + k * step);
    }
  } else {
    for (int64_t k = 0; k < a.hidden; ++k) {
      for (int lane = 0; lane < W; ++lane) {
        out[k * step + lane] = lane < lanes ? in[lane * a.row_stride + k * a.column_stride] : 0.0f;
      }
    }
  }
}

template <Cell kCell, int kRound = 0>
void pack_fwd(const RecurrentPackArgs& a, int64_t begin, int64_t end) {
  using S = FwdTile<kCell, kRound>;
  constexpr int W = VecF::kWidth, kStrip = TileRows<S::kVecs>::at_once;
  for (int64_t p = begin; p < end; ++p) {
    float* panel = a.packed + (p * gates_of(kCell) + 2 * kRound) * S::kUnits * W * a.hidden;
    for (int v = 0; v < S::kVecs; ++v) {
      const int64_t unit = (p * S::kUnits + v / S::kGates) * W;
      const int64_t row = (2 * kRound + v % S::kGates) * a.hidden + unit;
      float* out = panel + (v / kStrip * a.hidden * kStrip + v % kStrip) * W;
      pack_lanes(a, row, lanes_at(unit, a.hidden), out, kStrip * W);
    }
  }
}

}  // namespace

void recurrent_panels(const RecurrentPanelsArgs& a, int64_t, int64_t) {
  a.out->bwd = kBwdVecs * VecF::kWidth;
  switch (a.cell) {
    case Cell::kTanh:
    case Cell::kRelu:
      a.out->fwd = FwdTile<Cell::kTanh>::kUnits * VecF::kWidth;
      break;
    case Cell::kLstm:
      a.out->fwd = FwdTile<Cell::kLstm>::kUnits * VecF::kWidth;
      break;
    case Cell::kGru:
      a.out->fwd = FwdTile<Cell::kGru>::kUnits * VecF::kWidth;
      break;
    case Cell::kGruTextbook:
      a.out->fwd = FwdTile<Cell::kGruTextbook>::kUnits * VecF::kWidth;
      break;
  }
}

void recurrent_pack_fwd(const RecurrentPackArgs& a, int64_t begin, int64_t end) {
  switch (a.cell) {
    case Cell::kTanh:
    case Cell::kRelu:
      return pack_fwd<Cell::kTanh>(a, begin, end);
    case Cell::kLstm:
      return pack_fwd<Cell::kLstm>(a, begin, end);
    case Cell::kGru:
      return pack_fwd<Cell::kGru>(a, begin, end);
    case Cell::kGruTextbook:
      pack_fwd<Cell::kGruTextbook, 0>(a, begin, end);
      return pack_fwd<Cell::kGruTextbook, 1>(a, begin, end);
  }
}

void recurrent_pack_bwd(const RecurrentPackArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t kLanes = kBwdVecs * VecF::kWidth;
  const int64_t depth = gates_of(a.cell) * a.hidden;
  for (int64_t p = begin; p < end; ++p) {
    const int64_t unit = p * kLanes;
    const int64_t lanes = least(kLanes, a.hidden - unit);
    for (int64_t k = 0; k < depth; ++k) {
      const float* in = a.w + weight_row(a.cell, k, a.hidden) * a.row_stride;
      float* out = a.packed + (p * depth + k) * kLanes;
      for (int64_t lane = 0; lane < lanes; ++lane) out[lane] = in[(unit + lane) * a.column_stride];
      for (int64_t lane = lanes; lane < kLanes; ++lane) out[lane] = 0.0f;
    }
  }
}

}  // namespace lmfast::LMFAST_ISA
