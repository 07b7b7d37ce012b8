// lmfast::linear_recurrence and its backward on the CPU: checks, threads, registration.
#include "kernels/linear_recurrence.h"

#include <optional>
#include <tuple>

#include "../common/tensor.h"

namespace lmfast {
namespace {

using torch::stable::new_empty;
using torch::stable::parallel_for;

void check_sequence(const Tensor& t, const char* name, const Tensor& like) {
  check_same_shape(t, like, name, "a");
  LMFAST_CHECK(t.is_cpu() && t.is_contiguous() && t.scalar_type() == like.scalar_type(), name,
               " must be a contiguous CPU tensor of a's dtype");
}

LinearRecurrenceArgs arguments(const Tensor& a, const std::optional<Tensor>& state) {
  LinearRecurrenceArgs args{};
  LMFAST_CHECK(a.dim() == 3, "a must be (B, T, H)");
  check_sequence(a, "a", a);
  args.dtype = dtype_of(a, "a");
  LMFAST_CHECK(args.dtype == DType::kF32 || args.dtype == DType::kF64,
               "a must be float32 or float64");
  args.steps = a.size(1);
  args.width = a.size(2);
  args.a = a.const_data_ptr();
  if (state.has_value()) {
    LMFAST_CHECK(state->is_cpu() && state->is_contiguous() && state->dim() == 2 &&
                     state->scalar_type() == a.scalar_type() && state->size(0) == a.size(0) &&
                     state->size(1) == a.size(2),
                 "state must be a contiguous CPU tensor (B, H) of a's dtype");
    args.state = state->const_data_ptr();
  }
  return args;
}

void run(linear_recurrence_fwd_fn kernel, const LinearRecurrenceArgs& args, int64_t rows) {
  const int64_t blocks = (args.width + kScanWidth - 1) / kScanWidth;
  parallel_for(0, rows * blocks, grain_size(args.steps * kScanWidth),
               [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

Tensor linear_recurrence(const Tensor& a, const Tensor& b, const std::optional<Tensor>& state) {
  LinearRecurrenceArgs args = arguments(a, state);
  check_sequence(b, "b", a);
  args.b = b.const_data_ptr();
  Tensor y = new_empty(a, {a.size(0), a.size(1), a.size(2)});
  args.y = y.mutable_data_ptr();
  run(linear_recurrence_fwd_kernel(), args, a.size(0));
  return y;
}

std::tuple<Tensor, Tensor, Tensor> linear_recurrence_backward(const Tensor& dy, const Tensor& a,
                                                              const Tensor& y,
                                                              const std::optional<Tensor>& state) {
  LinearRecurrenceArgs args = arguments(a, state);
  check_sequence(dy, "dy", a);
  check_sequence(y, "y", a);
  args.dy = dy.const_data_ptr();
  args.states = y.const_data_ptr();
  Tensor da = new_empty(a, {a.size(0), a.size(1), a.size(2)});
  Tensor db = new_empty(a, {a.size(0), a.size(1), a.size(2)});
  Tensor dstate = new_empty(a, {state.has_value() ? a.size(0) : 0, a.size(2)});
  args.da = da.mutable_data_ptr();
  args.db = db.mutable_data_ptr();
  if (state.has_value()) args.dstate = dstate.mutable_data_ptr();
  run(linear_recurrence_bwd_kernel(), args, a.size(0));
  return {da, db, dstate};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmfast, CPU, m) {
  m.impl("linear_recurrence", TORCH_BOX(&linear_recurrence));
  m.impl("linear_recurrence_backward", TORCH_BOX(&linear_recurrence_backward));
}

}  // namespace lmfast
