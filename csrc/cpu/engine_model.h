// A packed model's memory, checked: what its program says lies inside its weights.
#pragma once

#include "../common/tensor.h"
#include "kernels/engine.h"

namespace lmfast {

// Whether the processor has AVX512-VNNI and the level in use has AVX-512.
bool has_avx512_vnni();

// Floats between rows, and bytes of weights that a step reads.
struct EngineSizes {
  int64_t x, qkv, joined, hidden, operand, bytes;
  bool posts;
};

class EngineMemory {
 public:
  EngineMemory(const Tensor& weights, const Tensor& program);
  const EngineModel& model() const { return *model_; }
  const EngineLayer* layers() const { return layers_; }
  const char* weights() const { return weights_; }
  const EngineSizes& sizes() const { return sizes_; }

 private:
  void check_span(int64_t offset, int64_t bytes, const char* what) const;
  void check_norm(const EngineNorm& norm, int64_t width, const char* what) const;
  void check_matrix(const EngineMatrix& w, int64_t columns, int64_t depth, const char* what);
  void check_layer(const EngineLayer& layer);

  const char* weights_;
  int64_t size_;
  const EngineModel* model_;
  const EngineLayer* layers_;
  EngineSizes sizes_{};
};

}  // namespace lmfast
