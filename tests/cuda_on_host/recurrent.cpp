// The CUDA kernels of the recurrent layers against double precision, blocks side by side.
#include "recurrent_layer.h"
// After the shim, which replaces what CUDA's keywords mean.
#include "csrc/cuda/kernels/recurrent.cuh"

namespace lmfast::gpu {
namespace {

using cuda_on_host::launch_together;

template <typename T, int R, int D>
void check(const Case& c) {
  Operands<T> layer(c);
  std::vector<unsigned> arrived(c.groups, 0);
  RecurrentShape s = layer.shape();
  s.arrived = arrived.data();
  s.group_rows = (c.batch + int(c.groups) - 1) / int(c.groups);
  s.at_once = 8;
  const size_t shared = recurrent_partial_size(c.warps, R, s.at_once) * sizeof(float);
  s.units = R / layer.layer.gates;
  s.unit_blocks = (c.hidden + s.units - 1) / s.units;
  launch_together(recurrent_fwd_kernel<T, R, D>, {unsigned(s.unit_blocks), c.groups},
                  {c.warps * 32}, shared, layer.forward(s));
  layer.check_forward();
  s.units = R;
  s.unit_blocks = (c.hidden + R - 1) / R;
  std::fill(arrived.begin(), arrived.end(), 0);
  launch_together(recurrent_bwd_kernel<T, R, D>, {unsigned(s.unit_blocks), c.groups},
                  {c.warps * 32}, shared, layer.backward(s));
  layer.check_backward();
}

// The plan covers every unit and row, within its limits.
void check_plans() {
  for (const bool half : {true, false}) {
    for (const int gates : {1, 3, 4}) {
      for (int hidden = 1; hidden < 1300; hidden = hidden * 5 / 4 + 1) {
        for (const int batch : {1, 7, 64, 300, 5000}) {
          for (const bool backward : {false, true}) {
            const int depth = backward ? gates * hidden : hidden;
            const RecurrentPlan plan = recurrent_plan(backward ? 1 : gates, depth, hidden, batch,
                                                      half, 132, kRecurrentMaxShared);
            const std::string what = "plan " + std::to_string(hidden);
            if (!plan.fits) {
              expect(float(hidden > 256), 1.0, 0.0, what + " should fit");
              continue;
            }
            expect(float(plan.units * plan.unit_blocks >= hidden), 1.0, 0.0, what + " units");
            expect(float(plan.warps * 32 * plan.depth >= depth), 1.0, 0.0, what + " depth");
            expect(float(plan.groups * plan.group_rows >= batch), 1.0, 0.0, what + " rows");
            expect(float((plan.groups - 1) * plan.group_rows < batch), 1.0, 0.0, what + " idle");
            expect(float(plan.unit_blocks * plan.groups <= 132), 1.0, 0.0, what + " blocks");
            expect(float(plan.at_once % 8 == 0 && plan.warps <= 8), 1.0, 0.0, what + " shape");
          }
        }
      }
    }
  }
}

void check_all(bool quick) {
  check<bf16, 16, 4>({Cell::kLstm, 3, 8, {3, 2, 1}, false, true, 1, 1});
  check<float, 16, 4>({Cell::kGru, 11, 7, {11, 11, 5}, true, true, 1, 2});
  if (quick) return;
  check<f16, 16, 4>({Cell::kGru, 10, 24, {10, 10, 9, 4}, false, true, 2, 2});
  check<bf16, 32, 4>({Cell::kLstm, 9, 40, {9, 9, 9}, true, false, 2, 1});
  check<float, 32, 4>({Cell::kLstm, 5, 19, {5, 3, 3, 1}, false, true, 2, 1});
  check<float, 8, 16>({Cell::kTanh, 9, 33, {9, 9, 9}, false, true, 1, 2});
  check<f16, 16, 16>({Cell::kRelu, 4, 24, {4, 4}, true, false, 1, 1});
  check<float, 16, 4>({Cell::kLstm, 2, 5, {2}, false, false, 1, 1});
}

}  // namespace
}  // namespace lmfast::gpu

// With an argument: a few cases, for the slow ThreadSanitizer.
int main(int argc, char**) {
  using namespace lmfast::gpu;
  check_all(argc > 1);
  if (argc == 1) check_plans();
  std::puts("recurrent kernels agree with double precision");
}
