// The recurrent layers' kernels for clusters: blocks side by side, shared memory of each other.
#include "recurrent_layer.h"
// After the shim, which replaces what CUDA's keywords mean.
#include "csrc/cuda/kernels/recurrent_cluster.cuh"

namespace lmfast::gpu {
namespace {

using cuda_on_host::launch_together;

// `blocks` of a cluster, of `units` each: they may have units to spare, and blocks.
struct Cut {
  unsigned blocks;
  int units;
};

template <typename T, int FR, int FD, int BR, int BD>
void check(const Case& c, Cut forward, Cut backward) {
  Operands<T> layer(c);
  RecurrentShape s = layer.shape();
  s.group_rows = (c.batch + int(c.groups) - 1) / int(c.groups);
  s.at_once = 8;
  const int vector = sizeof(T) == 2 ? 8 : 4, gates = layer.layer.gates;
  const int padded = (c.hidden + vector - 1) / vector * vector;
  s.gate_stride = padded;
  const auto shared = [&](int rows) {
    const size_t copies = size_t(2) * s.group_rows * s.row_stride * sizeof(T);
    s.partial_size = recurrent_partial_size(c.warps, rows, s.at_once);
    return s.partial_size * sizeof(float) + copies;
  };
  s.row_stride = padded + vector;
  s.units = forward.units;
  size_t bytes = shared(FR);
  launch_together(recurrent_cluster_fwd_kernel<T, FR, FD>, {forward.blocks, c.groups},
                  {c.warps * 32}, bytes, layer.forward(s));
  layer.check_forward();
  s.row_stride = gates * padded + vector;
  s.units = backward.units;
  bytes = shared(BR);
  launch_together(recurrent_cluster_bwd_kernel<T, BR, BD>, {backward.blocks, c.groups},
                  {c.warps * 32}, bytes, layer.backward(s));
  layer.check_backward();
}

// The plan covers every unit and row, within a Hopper's limits, and is there for the usual sizes.
void check_plans() {
  for (const bool half : {true, false}) {
    for (const Cell cell : {Cell::kTanh, Cell::kGru, Cell::kLstm}) {
      for (int hidden = 8; hidden < 1300; hidden += 24) {
        for (const int batch : {1, 9, 64, 300, 5000}) {
          for (const bool backward : {false, true}) {
            const RecurrentPlan plan =
                recurrent_cluster_plan(cell, backward, hidden, batch, half, 132,
                                       kRecurrentMaxCluster, kRecurrentMaxShared);
            const int gates = recurrent_gates(cell), most = half && gates == 1 ? 1024 : 512;
            const std::string what = "plan " + std::to_string(hidden);
            if (!plan.fits) {
              if (half && batch <= 64) expect(float(hidden > most), 1.0, 0.0, what + " fits");
              continue;
            }
            const int vector = half ? 8 : 4, depth = backward ? gates * hidden : hidden;
            expect(float(plan.units * plan.unit_blocks >= hidden), 1.0, 0.0, what + " units");
            expect(float(plan.units % vector == 0), 1.0, 0.0, what + " vectors");
            expect(float(plan.row_stride % vector == 0), 1.0, 0.0, what + " rows");
            expect(float(plan.row_stride >= depth), 1.0, 0.0, what + " width");
            if (half) expect(float(plan.row_stride % 64), 32.0, 0.0, what + " banks");
            expect(float(plan.warps * 32 * plan.depth >= depth), 1.0, 0.0, what + " depth");
            expect(float(plan.groups * plan.group_rows >= batch), 1.0, 0.0, what + " batch");
            expect(float((plan.groups - 1) * plan.group_rows < batch), 1.0, 0.0, what + " idle");
            const int partial = recurrent_partial_size(plan.warps, plan.tile_rows, plan.at_once);
            const int copies = 2 * plan.group_rows * plan.row_stride * (half ? 2 : 4);
            expect(float(plan.shared_bytes), partial * 4 + copies, 0.0, what + " shared");
            expect(float(plan.shared_bytes <= kRecurrentMaxShared), 1.0, 0.0, what + " memory");
          }
        }
      }
    }
  }
}

// A GPU of 132 multiprocessors whose parts hold 7 clusters of 16, not the 8 of the quotient: the
// rows in turn are those of the clusters that run at once.
void check_room() {
  const int parts[] = {18, 16, 18, 16, 18, 16, 16, 14};
  const auto room = [&](const RecurrentPlan& plan) {
    int clusters = 0;
    for (const int size : parts) clusters += size / plan.unit_blocks;
    return clusters;
  };
  const auto plan_of = [](int hidden, int batch, auto with) {
    return recurrent_cluster_plan_with_room(Cell::kLstm, false, hidden, batch, true, 132,
                                            kRecurrentMaxShared, with);
  };
  for (int hidden = 8; hidden < 520; hidden += 8) {
    for (const int batch : {1, 64, 128, 250, 300, 448}) {
      const RecurrentPlan plan = plan_of(hidden, batch, room);
      if (!plan.fits) continue;
      const int there = room(plan), turns = (plan.groups + there - 1) / there;
      expect(float(plan.rows_in_turn >= turns * plan.group_rows), 1.0, 0.0, "rows in turn");
    }
  }
  const RecurrentPlan plan = plan_of(512, 448, room);
  expect(float(plan.unit_blocks), 16.0, 0.0, "blocks");
  expect(float(plan.groups), 7.0, 0.0, "a group per cluster there is");
  const auto none = [](const RecurrentPlan&) { return 0; };
  expect(float(plan_of(64, 8, none).fits), 0.0, 0.0, "no room");
  const auto small = [&](const RecurrentPlan& p) { return p.unit_blocks > 2 ? 0 : room(p); };
  expect(float(plan_of(64, 8, small).unit_blocks), 2.0, 0.0, "smaller clusters");
}

void check_all(bool quick) {
  // cell, batch, hidden, rows of each step, reverse, states, warps, groups
  check<bf16, 64, 4, 32, 8>({Cell::kLstm, 3, 16, {3, 2, 1}, false, true, 1, 1}, {2, 8}, {2, 8});
  check<float, 32, 4, 32, 4>({Cell::kGru, 11, 7, {11, 11, 5}, true, true, 1, 2}, {2, 4}, {2, 4});
  if (quick) return;
  check<f16, 128, 2, 32, 8>({Cell::kGru, 10, 24, {10, 10, 9, 4}, false, true, 2, 2}, {4, 8},
                            {2, 24});
  check<bf16, 128, 2, 32, 8>({Cell::kLstm, 9, 40, {9, 9, 9}, true, false, 2, 1}, {2, 32}, {2, 32});
  check<float, 32, 4, 32, 4>({Cell::kLstm, 5, 19, {5, 3, 3, 1}, true, true, 2, 1}, {4, 8}, {1, 32});
  check<f16, 64, 4, 64, 4>({Cell::kTanh, 4, 56, {4, 4, 2}, false, true, 1, 1}, {2, 32}, {4, 16});
  check<bf16, 64, 4, 64, 4>({Cell::kRelu, 9, 24, {9}, true, false, 1, 2}, {1, 64}, {4, 8});
}

}  // namespace
}  // namespace lmfast::gpu

// With an argument: a few cases, for the slow ThreadSanitizer.
int main(int argc, char**) {
  using namespace lmfast::gpu;
  check_all(argc > 1);
  if (argc == 1) {
    check_plans();
    check_room();
  }
  std::puts("recurrent kernels in clusters agree with double precision");
}
