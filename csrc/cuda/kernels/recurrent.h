// Arguments of the recurrent layers' persistent kernels, and how the launcher cuts the work.
#pragma once

#include <cstdint>

namespace lmfast::gpu {

enum class RecurrentCell : int { kTanh = 0, kRelu = 1, kLstm = 2, kGru = 3 };

inline int recurrent_gates(RecurrentCell cell) {
  return cell == RecurrentCell::kLstm ? 4 : cell == RecurrentCell::kGru ? 3 : 1;
}
// Vectors of H per row that the forward keeps for the backward, and gradients per row.
inline int recurrent_kept(RecurrentCell cell) { return recurrent_gates(cell) == 1 ? 0 : 4; }
inline int recurrent_gradients(RecurrentCell cell) { return recurrent_gates(cell) == 1 ? 1 : 4; }

// What both directions of time have in common. All matrices are of one type T, contiguous but for
// the weights; states between steps are fp32.
struct RecurrentShape {
  RecurrentCell cell;
  bool reverse;
  int batch, steps, hidden;
  const int64_t* sizes;    // (steps,) rows of each step, never growing; null: batch
  const int64_t* offsets;  // (steps,) first row of each step; null: step * batch
  const void* w;           // (gates * hidden, hidden)
  int64_t w_stride[2];
  unsigned* arrived;  // (groups of the batch,), zero at the start
  int units;          // hidden units of a block
  int unit_blocks;    // blocks that share a group of the batch
  int group_rows;     // rows of the batch of a group
  int at_once;        // of which so many are worked on together, a multiple of 8
};

struct RecurrentFwd {
  RecurrentShape s;
  const void* projected;    // (rows, gates * hidden)
  const void* hidden_bias;  // GRU: (hidden,) or null
  const void* h0;           // (batch, hidden) or null
  const void* c0;
  void* y;      // (rows, hidden)
  void* gates;  // (rows, kept * hidden) or null: nothing is kept
  void* cells;  // LSTM: (rows, hidden) or null
  float* h;     // (batch, hidden), between steps
  float* c;
  void* h_n;  // (batch, hidden)
  void* c_n;
};

struct RecurrentBwd {
  RecurrentShape s;
  const void* dy;  // (rows, hidden) or null
  const void* dh_n;
  const void* dc_n;
  const void* y;
  const void* gates;
  const void* cells;
  const void* h0;
  const void* c0;
  void* dgates;      // (rows, gradients * hidden)
  float* carry;      // (batch, hidden): LSTM dc, GRU what passes the products; null for the others
  void* carry_last;  // the same in T, after the first step
};

// How a layer lies on the chip. `fits` is false where the weights do not.
struct RecurrentPlan {
  bool fits;
  int tile_rows;  // rows of the matrix a block holds, padded: a template argument
  int depth;      // elements of the depth a thread holds: a template argument
  int warps, units, unit_blocks, groups, group_rows, at_once;
  int shared_bytes;
};

// The tiles that are compiled: rows x depth. 16 bits: rows in sixteens, depth in chunks of 32 per
// warp. fp32: depth in elements per thread. The last of either are 128 registers of weights, which
// is what 256 threads leave room for (512 threads with 64 each spilled 250 bytes).
struct RecurrentTile {
  int rows, depth;
};
constexpr RecurrentTile kHalfTiles[] = {{16, 4}, {32, 4}, {16, 16}};
constexpr RecurrentTile kFloatTiles[] = {{16, 4}, {32, 4}, {8, 16}};
constexpr int kRecurrentMaxWarps = 8;
constexpr int kRecurrentMaxShared = 200 * 1024;

// rows_per_unit: gates forward, 1 backward. depth: hidden forward, gates * hidden backward.
inline RecurrentPlan recurrent_plan(int rows_per_unit, int depth, int hidden, int batch, bool half,
                                    int multiprocessors, int max_shared) {
  RecurrentPlan best{};
  for (const RecurrentTile& tile : half ? kHalfTiles : kFloatTiles) {
    RecurrentPlan plan{};
    plan.tile_rows = tile.rows;
    plan.depth = tile.depth;
    plan.units = tile.rows / rows_per_unit;
    if (plan.units < 1) continue;
    plan.unit_blocks = (hidden + plan.units - 1) / plan.units;
    plan.warps = 1;
    while (plan.warps < kRecurrentMaxWarps && plan.warps * 32 * tile.depth < depth) plan.warps *= 2;
    if (plan.warps * 32 * tile.depth < depth || plan.unit_blocks > multiprocessors) continue;
    const int wanted = batch > 8 ? (batch + 7) / 8 : 1;
    const int possible = multiprocessors / plan.unit_blocks;
    const int groups = wanted < possible ? wanted : possible;
    plan.group_rows = batch > 8 ? ((batch + groups - 1) / groups + 7) / 8 * 8 : 8;
    plan.groups = batch > 8 ? (batch + plan.group_rows - 1) / plan.group_rows : 1;
    plan.at_once = plan.group_rows < 64 ? plan.group_rows : 64;
    plan.shared_bytes = plan.warps * tile.rows * (plan.at_once + 1) * 4;
    if (plan.shared_bytes > max_shared) continue;
    plan.fits = true;
    // A block reads all of h for its rows of the batch in each step: the fewer the better.
    if (!best.fits || plan.group_rows < best.group_rows) best = plan;
  }
  return best;
}

}  // namespace lmfast::gpu
