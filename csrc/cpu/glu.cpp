// lmfast::swiglu, geglu and their backward on the CPU: checks, threads, registration.
#include "kernels/glu.h"

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/tensor.h"

namespace lmfast {
namespace {

using torch::stable::new_empty;
using torch::stable::parallel_for;

// gate and up of one shape; without up, the first half of every row of gate is the gate and the
// second half the up.
struct Inputs {
  DType dtype;
  int64_t width;
  std::vector<int64_t> sizes;  // of the result
  const Tensor* up_layout;     // whose strides up has
  const void* gate;
  const void* up;
};

int64_t bytes_of(DType dtype) { return dtype == DType::kF64 ? 8 : dtype == DType::kF32 ? 4 : 2; }

Inputs check_inputs(const Tensor& gate, const std::optional<Tensor>& up) {
  check_rows(gate, "gate");
  const int64_t last = gate.dim() - 1;
  Inputs in{};
  in.dtype = dtype_of(gate, "gate");
  in.gate = gate.const_data_ptr();
  in.sizes.assign(gate.sizes().begin(), gate.sizes().end());
  if (up.has_value()) {
    check_rows(*up, "up");
    check_same_shape(gate, *up, "gate", "up");
    LMFAST_CHECK(dtype_of(*up, "up") == in.dtype, "up must have gate's dtype");
    in.up_layout = &*up;
    in.up = up->const_data_ptr();
  } else {
    LMFAST_CHECK(gate.size(last) % 2 == 0, "gate without up must have an even last dimension, got ",
                 gate.size(last));
    in.sizes[static_cast<size_t>(last)] /= 2;
    in.up_layout = &gate;
    in.up = static_cast<const char*>(in.gate) +
            in.sizes[static_cast<size_t>(last)] * bytes_of(in.dtype);
  }
  in.width = in.sizes[static_cast<size_t>(last)];
  return in;
}

// Rows that follow one another in every operand become one row; then rows are cut into blocks.
GluSplit split_rows(RowLayout* rows, int64_t width, int operands) {
  bool joined = rows->ndim == 1;
  for (int i = 0; joined && i < operands; ++i) joined = rows->stride[i][0] == width;
  if (joined) {
    width *= rows->count;
    rows->count = 1;
    rows->ndim = 0;
  }
  constexpr int64_t kBlock = 2048;
  return {width, kBlock, (width + kBlock - 1) / kBlock};
}

template <class Args, class Kernel>
void run(const Args& a, const Kernel& kernel) {
  parallel_for(0, a.rows.count * a.split.blocks_per_row,
               grain_size(std::min(a.split.width, a.split.block)),
               [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

Tensor forward(const Tensor& gate, const std::optional<Tensor>& up, GluActivation activation) {
  const Inputs in = check_inputs(gate, up);
  Tensor y = new_empty(gate, in.sizes);
  GluFwdArgs a{};
  a.dtype = in.dtype;
  a.activation = activation;
  a.rows = row_layout({&y, &gate, in.up_layout});
  a.split = split_rows(&a.rows, in.width, 3);
  a.gate = in.gate;
  a.up = in.up;
  a.y = y.mutable_data_ptr();
  run(a, glu_fwd_kernel());
  return y;
}

std::tuple<Tensor, Tensor> backward(const Tensor& dy, const Tensor& gate,
                                    const std::optional<Tensor>& up, GluActivation activation) {
  const Inputs in = check_inputs(gate, up);
  check_rows(dy, "dy");
  LMFAST_CHECK(dtype_of(dy, "dy") == in.dtype, "dy must have gate's dtype");
  bool same = dy.dim() == gate.dim();
  for (int64_t d = 0; same && d < dy.dim(); ++d) {
    same = dy.size(d) == in.sizes[static_cast<size_t>(d)];
  }
  LMFAST_CHECK(same, "dy must have the result's shape");
  // Without up the gradients are the halves of one tensor, as the inputs are.
  Tensor dgate = new_empty(gate, gate.sizes());
  Tensor dup = up.has_value() ? new_empty(gate, in.sizes) : new_empty(gate, {0});
  GluBwdArgs a{};
  a.dtype = in.dtype;
  a.activation = activation;
  a.rows = row_layout({&dgate, &gate, in.up_layout, &dy});
  a.split = split_rows(&a.rows, in.width, 4);
  a.gate = in.gate;
  a.up = in.up;
  a.dy = dy.const_data_ptr();
  a.dgate = dgate.mutable_data_ptr();
  a.dup = up.has_value() ? dup.mutable_data_ptr()
                         : static_cast<char*>(a.dgate) + in.width * bytes_of(in.dtype);
  run(a, glu_bwd_kernel());
  return {dgate, dup};
}

GluActivation gelu(bool tanh) { return tanh ? GluActivation::kGeluTanh : GluActivation::kGeluErf; }

Tensor swiglu(const Tensor& gate, const std::optional<Tensor>& up) {
  return forward(gate, up, GluActivation::kSilu);
}
Tensor geglu(const Tensor& gate, const std::optional<Tensor>& up, bool tanh) {
  return forward(gate, up, gelu(tanh));
}
std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& dy, const Tensor& gate,
                                           const std::optional<Tensor>& up) {
  return backward(dy, gate, up, GluActivation::kSilu);
}
std::tuple<Tensor, Tensor> geglu_backward(const Tensor& dy, const Tensor& gate,
                                          const std::optional<Tensor>& up, bool tanh) {
  return backward(dy, gate, up, gelu(tanh));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmfast, CPU, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("geglu", TORCH_BOX(&geglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
  m.impl("geglu_backward", TORCH_BOX(&geglu_backward));
}

}  // namespace lmfast
