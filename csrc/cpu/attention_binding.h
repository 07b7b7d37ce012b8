// What the bindings of the attention operators share: from tensors to kernel arguments.
#pragma once

#include <optional>
#include <vector>

#include "../common/tensor.h"
#include "kernels/attention.h"

namespace lmfast {

// The arguments every attention operator takes besides its tensors of values.
struct AttentionOptions {
  bool causal;
  std::optional<int64_t> offset;  // of all rows; or
  std::optional<Tensor> offsets;  // (B) int64; neither: lengths - T
  std::optional<Tensor> lengths;  // (B) int64
  std::optional<Tensor> mask;     // (B, H, T, S), bool or floating point, any strides
  int64_t window;
  double softcap;
  std::optional<Tensor> sinks, alibi;  // (H) float
  double scale;
};

AttentionTensor attention_tensor(const Tensor& t, const char* name);

// Kernel arguments with the memory they point to. Not to be copied while in use.
class AttentionCall {
 public:
  AttentionCall(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options);
  AttentionArgs args{};

 private:
  std::vector<int64_t> offsets_, lengths_;
};

}  // namespace lmfast
