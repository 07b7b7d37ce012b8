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

// Forward: one vector of units with all its gates, or several vectors where there is one gate.
template <Cell kCell>
struct FwdTile {
  static constexpr int kGates = static_cast<int>(gates_of(kCell));
  static constexpr int kUnits = kGates == 1 ? kWideVecs : 1;  // vectors of units
  static constexpr int kVecs = kGates * kUnits;
  static constexpr int kRows = TileRows<kVecs>::value;
};

// Backward: vectors of units of the state's gradient; rows are as many.
constexpr int kBwdVecs = kWideVecs;
constexpr int kBwdRows = TileRows<kBwdVecs>::value;

}  // namespace
}  // namespace lmfast::LMFAST_ISA
