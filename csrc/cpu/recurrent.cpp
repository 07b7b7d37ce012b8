// lmfast::recurrent_forward and recurrent_backward on the CPU: the loops over time of elman_rnn,
// lstm and gru. Checks, packing, division over threads, registration.
#include <tuple>

#include "recurrent_layer.h"

namespace lmfast {
namespace {

// Both directions of a layer: one to a thread where that keeps the threads busy, without any
// barrier; else one after the other, each by all threads.
template <class Run>
void run_both(Run& first, Run& second) {
  const RecurrentShape& s = first.a.shape;
  if (s.steps > 0 && one_direction_to_a_thread(s)) {
    torch::stable::parallel_for(0, 2, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) (i == 0 ? first : second).run_alone();
    });
    return;
  }
  first.run();
  second.run();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> recurrent_forward(Tensor projected, Tensor w_hh,
                                                                     Given hidden_bias, Given h0,
                                                                     Given c0, Given batch_sizes,
                                                                     int64_t batch, int64_t cell,
                                                                     bool reverse, bool keep) {
  Forward f(projected, w_hh, hidden_bias, h0, c0, batch_sizes, batch, cell, reverse, keep);
  f.set_products(projected);
  f.run();
  f.finish();
  return {f.y, f.h_n, f.c_n, f.gates, f.cells};
}

std::tuple<Tensor, Tensor> recurrent_backward(Given dy, Given dh_n, Given dc_n, Tensor y,
                                              Tensor gates, Tensor cells, Tensor w_hh, Given h0,
                                              Given c0, Given batch_sizes, int64_t batch,
                                              int64_t cell, bool reverse) {
  Backward b(dy, dh_n, dc_n, y, gates, cells, w_hh, h0, c0, batch_sizes, batch, cell, reverse);
  b.run();
  return {b.dgates, b.carry};
}

// Lists hold the forward direction, then the reverse one.
Tensors recurrent_forward_both(Tensors projected, Tensors w_hh, Tensors hidden_bias, Tensors h0,
                               Tensors c0, Given batch_sizes, int64_t batch, int64_t cell,
                               bool keep) {
  check_lists(2, {{&projected, "projected"}, {&w_hh, "w_hh"}},
              {{&hidden_bias, "hidden_bias"}, {&h0, "h0"}, {&c0, "c0"}});
  const auto make = [&](size_t i) {
    return Forward(projected[i], w_hh[i], at(hidden_bias, i), at(h0, i), at(c0, i), batch_sizes,
                   batch, cell, i == 1, keep);
  };
  Forward first = make(0), second = make(1);
  first.set_products(projected[0]);
  second.set_products(projected[1]);
  run_both(first, second);
  first.finish();
  second.finish();
  return {first.y,  first.h_n,  first.c_n,  first.gates,  first.cells,
          second.y, second.h_n, second.c_n, second.gates, second.cells};
}

Tensors recurrent_backward_both(Tensors dy, Tensors dh_n, Tensors dc_n, Tensors y, Tensors gates,
                                Tensors cells, Tensors w_hh, Tensors h0, Tensors c0,
                                Given batch_sizes, int64_t batch, int64_t cell) {
  check_lists(2, {{&y, "y"}, {&gates, "gates"}, {&cells, "cells"}, {&w_hh, "w_hh"}},
              {{&dy, "dy"}, {&dh_n, "dh_n"}, {&dc_n, "dc_n"}, {&h0, "h0"}, {&c0, "c0"}});
  const auto make = [&](size_t i) {
    return Backward(at(dy, i), at(dh_n, i), at(dc_n, i), y[i], gates[i], cells[i], w_hh[i],
                    at(h0, i), at(c0, i), batch_sizes, batch, cell, i == 1);
  };
  Backward first = make(0), second = make(1);
  run_both(first, second);
  return {first.dgates, first.carry, second.dgates, second.carry};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmfast, CPU, m) {
  m.impl("recurrent_forward", TORCH_BOX(&recurrent_forward));
  m.impl("recurrent_backward", TORCH_BOX(&recurrent_backward));
  m.impl("recurrent_forward_both", TORCH_BOX(&recurrent_forward_both));
  m.impl("recurrent_backward_both", TORCH_BOX(&recurrent_backward_both));
}

}  // namespace lmfast
