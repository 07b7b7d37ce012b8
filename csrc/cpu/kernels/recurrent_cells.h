// Shapes of the register tiles per cell.
#pragma once

#include "recurrent_tile.h"

namespace lmfast::LMFAST_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kWideVecs = 4;
#else
constexpr int kWideVecs = 2;
#endif

// Forward: one vector of units with all its gates, or several vectors where there are few gates.
// kRound of a cell with two: r and z, then n.
template <Cell kCell, int kRound = 0>
struct FwdTile {
  static constexpr bool kTwice = rounds_of(kCell) == 2;
  static constexpr int kGates = kTwice ? 2 - kRound : static_cast<int>(gates_of(kCell));
  static constexpr int kUnits =  // vectors of units
      kTwice        ? kWideVecs / 2
      : kGates == 1 ? kWideVecs
                    : 1;
  static constexpr int kVecs = kGates * kUnits;
  static constexpr int kRows = TileRows<kVecs>::value;
};

// Backward: vectors of units of the state's gradient; rows are as many.
constexpr int kBwdVecs = kWideVecs;
constexpr int kBwdRows = TileRows<kBwdVecs>::value;

}  // namespace
}  // namespace lmfast::LMFAST_ISA
