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
  int row_stride;     // clusters: elements from one row in shared memory to the next
  int gate_stride;    // clusters: from one gate's gradients to the next
  int partial_size;   // clusters: floats of the products' parts, in front of the rows
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
  int row_stride, gate_stride, partial_size;  // clusters
  int rows_in_turn;  // clusters: rows of the batch that follow each other in a step
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
// Of clusters: all of a layer in at most 16 blocks, so 128 registers of weights in each. Forward of
// gated cells and of Elman's, backward likewise; fp32 has one shape.
constexpr RecurrentTile kHalfClusterForward[] = {{128, 2}, {64, 4}};
constexpr RecurrentTile kHalfClusterBackward[] = {{32, 8}, {64, 4}};
constexpr RecurrentTile kFloatCluster[] = {{32, 4}};
constexpr int kRecurrentMaxWarps = 8;
constexpr int kRecurrentMaxShared = 200 * 1024;
// Blocks of a cluster; above 8 a kernel must ask for it.
constexpr int kRecurrentMaxCluster = 16;
// With more rows in turn the exchange within a cluster, 15 copies of the state, takes as long as
// the one through L2: 60 KB a block and step for 64 rows of 32 units.
constexpr int kRecurrentMostRowsInTurn = 64;

inline int recurrent_warps(int per_warp, int depth) {
  int warps = 1;
  while (warps < kRecurrentMaxWarps && warps * per_warp < depth) warps *= 2;
  return warps;
}

// Floats of the parts of products that warps leave, a multiple of 16 bytes.
inline int recurrent_partial_size(int warps, int tile_rows, int at_once) {
  return (warps * tile_rows * (at_once + 1) + 3) / 4 * 4;
}

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
    plan.warps = recurrent_warps(32 * tile.depth, depth);
    if (plan.warps * 32 * tile.depth < depth || plan.unit_blocks > multiprocessors) continue;
    const int wanted = batch > 8 ? (batch + 7) / 8 : 1;
    const int possible = multiprocessors / plan.unit_blocks;
    const int groups = wanted < possible ? wanted : possible;
    plan.group_rows = batch > 8 ? ((batch + groups - 1) / groups + 7) / 8 * 8 : 8;
    plan.groups = batch > 8 ? (batch + plan.group_rows - 1) / plan.group_rows : 1;
    plan.at_once = plan.group_rows < 64 ? plan.group_rows : 64;
    plan.shared_bytes = recurrent_partial_size(plan.warps, tile.rows, plan.at_once) * 4;
    if (plan.shared_bytes > max_shared) continue;
    plan.fits = true;
    // A block reads all of h for its rows of the batch in each step: the fewer the better.
    if (!best.fits || plan.group_rows < best.group_rows) best = plan;
  }
  return best;
}

// The same for clusters, of up to `max_cluster` blocks.
inline RecurrentPlan recurrent_cluster_plan(RecurrentCell cell, bool backward, int hidden,
                                            int batch, bool half, int multiprocessors,
                                            int max_cluster, int max_shared) {
  const int gates = recurrent_gates(cell), vector = half ? 8 : 4, size = half ? 2 : 4;
  const int gate_stride = (hidden + vector - 1) / vector * vector;
  const int depth = backward ? (gates - 1) * gate_stride + hidden : hidden;
  const int width = backward ? gates * gate_stride : gate_stride;
  const RecurrentTile* tiles =
      half ? backward ? kHalfClusterBackward : kHalfClusterForward : kFloatCluster;
  RecurrentPlan best{};
  for (int i = 0; i < (half ? 2 : 1); ++i) {
    RecurrentPlan plan{};
    plan.tile_rows = tiles[i].rows;
    plan.depth = tiles[i].depth;
    plan.units = plan.tile_rows / (backward ? 1 : gates) / vector * vector;
    plan.gate_stride = gate_stride;
    // 16 bits: 64 bytes more than a multiple of 128.
    plan.row_stride = half ? (width + 31) / 64 * 64 + 32 : width;
    plan.unit_blocks = 1;
    while (plan.unit_blocks * plan.units < hidden) plan.unit_blocks *= 2;
    plan.warps = recurrent_warps(32 * plan.depth, depth);
    if (plan.warps * 32 * plan.depth < depth || plan.unit_blocks > max_cluster) continue;
    plan.at_once = 8;
    plan.partial_size = recurrent_partial_size(plan.warps, plan.tile_rows, plan.at_once);
    const int partial = plan.partial_size * 4;
    const int row = 2 * plan.row_stride * size, most = (max_shared - partial) / row / 8 * 8;
    const int together = multiprocessors / plan.unit_blocks;
    if (most < 8 || together < 1) continue;
    const int wanted = ((batch + together - 1) / together + 7) / 8 * 8;
    plan.group_rows = wanted < most ? (wanted > 8 ? wanted : 8) : most;
    plan.groups = batch > plan.group_rows ? (batch + plan.group_rows - 1) / plan.group_rows : 1;
    plan.rows_in_turn = (plan.groups + together - 1) / together * plan.group_rows;
    plan.shared_bytes = partial + plan.group_rows * row;
    plan.fits = plan.rows_in_turn <= kRecurrentMostRowsInTurn;
    if (plan.fits && (!best.fits || plan.rows_in_turn < best.rows_in_turn)) best = plan;
  }
  return best;
}

// The plan of `recurrent_cluster_plan` for a device that runs room(plan) clusters of it at once.
// Where these are fewer than its multiprocessors would make, which lie in parts of uneven size, it
// plans again for those there are; where there is none, with smaller clusters.
template <typename Room>
RecurrentPlan recurrent_cluster_plan_with_room(RecurrentCell cell, bool backward, int hidden,
                                               int batch, bool half, int multiprocessors,
                                               int max_shared, Room room) {
  for (int most = kRecurrentMaxCluster; most > 0; most /= 2) {
    int usable = multiprocessors;
    for (;;) {
      const RecurrentPlan plan =
          recurrent_cluster_plan(cell, backward, hidden, batch, half, usable, most, max_shared);
      if (!plan.fits) return {};
      const int expected = usable / plan.unit_blocks, there = room(plan);
      if (there >= expected || there >= plan.groups) return plan;
      if (there < 1) break;
      usable = there * plan.unit_blocks;
    }
  }
  return {};
}

}  // namespace lmfast::gpu
