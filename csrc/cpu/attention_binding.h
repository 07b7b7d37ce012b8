// What the bindings of the attention operators share: from tensors to kernel arguments, and the
// run.
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

// What a cache adds to that; storage may have another type than q.
struct AttentionCache {
  std::optional<Tensor> table;                     // (B, at least the blocks in use) int32
  std::optional<Tensor> key_scales, value_scales;  // (rows, Hkv, S) float, for int8
};

AttentionTensor attention_tensor(const Tensor& t, const char* name);

// What keys or values are stored as; raises for any other type.
Stored stored_type(const Tensor& k);

// Kernel arguments with the memory they point to. Not to be copied while in use.
class AttentionCall {
 public:
  AttentionCall(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options,
                const AttentionCache* cache = nullptr);
  AttentionArgs args{};

 private:
  void set_shapes(const Tensor& q, const Tensor& k, const Tensor& v, bool table);
  void set_storage(const Tensor& k, const AttentionCache* cache);
  void set_mask(const Tensor& mask);

  bool find_runs(const Tensor& mask);

  std::vector<int64_t> offsets_, lengths_, runs_;
};

// Runs the forward on the arguments of a call whose `out` is set: splits the work over the threads,
// by the shapes and lengths alone. With `sum` set, for a backward, by the kernel whose scores are
// the backward's to the last bit.
void run_attention(AttentionArgs& args);

}  // namespace lmfast
