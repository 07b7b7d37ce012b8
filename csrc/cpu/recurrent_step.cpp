// lmfast::recurrent_step on the CPU: one time step of a stack of layers, in one call. A step of a
// stream is 2 to 20 us of work, as much as two calls of an operator cost.
#include "kernels/recurrent_step.h"

#include <tuple>
#include <vector>

#include "recurrent_tensors.h"

namespace lmfast {
namespace {

// Multiply-adds of a layer that are worth a second thread: below it a fork costs more (4 us).
constexpr int64_t kMinSplitWork = 1 << 18;

// Matrices with neighbours along neither dimension and biases with gaps are copied into their
// place.
RecurrentStepWeights weights_of(Tensor& w, Tensor* bias, const char* name, bool right, int64_t rows,
                                int64_t columns) {
  RecurrentStepWeights found{};
  LMFAST_CHECK(w.is_cpu() && dtype_of(w, name) == DType::kF32 && w.dim() == 2 &&
                   w.size(right ? 1 : 0) == rows && w.size(right ? 0 : 1) == columns,
               name, " must be a float32 CPU matrix of gates * hidden by the width of its operand");
  if (w.stride(0) != 1 && w.stride(1) != 1) w = torch::stable::contiguous(w);
  const int64_t row = w.stride(right ? 1 : 0), column = w.stride(right ? 0 : 1);
  found.w = static_cast<const float*>(w.const_data_ptr());
  found.by_columns = column != 1;
  found.stride = found.by_columns ? column : row;
  if (bias != nullptr) {
    if (!bias->is_contiguous()) *bias = torch::stable::contiguous(*bias);
    found.bias = floats(*bias, "bias", {rows});
  }
  return found;
}

void run(const RecurrentStepArgs& a, int64_t units) {
  const int64_t blocks = (a.hidden + units - 1) / units;
  const int64_t work = a.batch * gates_of(a.cell) * a.hidden * (a.width + a.hidden);
  const auto kernel = recurrent_step_kernel();
  if (work < kMinSplitWork) return kernel(a, 0, blocks);
  torch::stable::parallel_for(0, blocks, 1,
                              [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

// x (..., D), B rows in all. weights: for each layer w_ih and w_hh, (G*H, ...) or with `right`
// (..., G*H), and none, one or two biases.
std::tuple<Tensor, Tensor, Tensor> recurrent_step(Tensor x, std::optional<Tensor> h0,
                                                  std::optional<Tensor> c0,
                                                  std::vector<Tensor> weights, int64_t layers,
                                                  int64_t cell, bool right) {
  LMFAST_CHECK(cell >= 0 && cell <= static_cast<int64_t>(Cell::kGruTextbook), "unknown cell ",
               cell);
  LMFAST_CHECK(layers >= 1 && x.dim() >= 1 && weights.size() % layers == 0, "layers out of range");
  const int64_t each = weights.size() / layers;
  LMFAST_CHECK(each >= 2 && each <= 4, "two to four weights to a layer, got ", each);
  RecurrentStepArgs a{};
  a.cell = static_cast<Cell>(cell);
  const bool lstm = a.cell == Cell::kLstm;
  const int64_t width = x.size(x.dim() - 1), gates = gates_of(a.cell);
  a.batch = width == 0 ? 0 : x.numel() / width;
  a.hidden = weights[1].size(right ? 0 : 1);
  LMFAST_CHECK(x.is_cpu() && dtype_of(x, "x") == DType::kF32 && x.is_contiguous() && a.hidden > 0,
               "x must be a contiguous float32 CPU tensor");
  const int64_t size = a.batch * a.hidden;
  const float* h = floats(h0, "h0", {layers, a.batch, a.hidden});
  const float* c = floats(c0, "c0", {layers, a.batch, a.hidden});

  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = a.hidden;
  Tensor y = empty_floats(shape), h_n = empty_floats({layers, a.batch, a.hidden});
  Tensor c_n = lstm ? empty_floats({layers, a.batch, a.hidden}) : empty_floats({0});
  ScratchMemory between = a.cell == Cell::kGruTextbook ? allocate_scratch(8 * size)
                                                       : ScratchMemory(nullptr, &std::free);
  a.between = static_cast<float*>(between.get());
  RecurrentPanels units{};
  recurrent_step_units_kernel()({a.cell, &units}, 0, 1);

  a.x = static_cast<const float*>(x.const_data_ptr());
  a.width = width;
  for (int64_t layer = 0; layer < layers; ++layer) {
    Tensor* w = weights.data() + layer * each;
    a.input =
        weights_of(w[0], each > 2 ? &w[2] : nullptr, "w_ih", right, gates * a.hidden, a.width);
    a.state =
        weights_of(w[1], each > 3 ? &w[3] : nullptr, "w_hh", right, gates * a.hidden, a.hidden);
    a.h = h == nullptr ? nullptr : h + layer * size;
    a.c = c == nullptr ? nullptr : c + layer * size;
    a.h_out = writable(h_n) + layer * size;
    if (lstm) a.c_out = writable(c_n) + layer * size;
    for (int pass = 0; pass < (a.between != nullptr ? 2 : 1); ++pass) {
      a.second = pass == 1;
      run(a, units.fwd);
    }
    a.x = a.h_out;
    a.width = a.hidden;
  }
  std::memcpy(writable(y), a.h_out, 4 * size);
  return {y, h_n, c_n};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmfast, CPU, m) { m.impl("recurrent_step", TORCH_BOX(&recurrent_step)); }

}  // namespace lmfast
