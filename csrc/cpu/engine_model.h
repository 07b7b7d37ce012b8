// A packed model's memory, checked: what its program says lies inside its weights. And what the
// bindings of both kinds of model share.
#pragma once

#include "../common/tensor.h"
#include "kernels/engine.h"

namespace lmfast {

// What the processor has at the level in use.
void set_instructions(EngineArgs& a);
// Which products may round their rows to bf16: 0 none, 1 those of layers, 2 all.
void set_rounding(EngineArgs& a, int64_t rounded);

// Floats between rows, and bytes of weights that a step reads.
struct EngineSizes {
  int64_t x, qkv, joined, hidden, operand, bytes;
  bool posts;
};

class EngineMemory {
 public:
  EngineMemory(const Tensor& weights, const Tensor& program);
  const EngineModel& model() const { return *model_; }
  const EngineLayer* layers() const { return layers_; }  // of a decoder
  const EngineCell* cells() const { return cells_; }     // of a recurrent model
  const char* weights() const { return weights_; }
  const EngineSizes& sizes() const { return sizes_; }

 private:
  void check_span(int64_t offset, int64_t bytes, const char* what) const;
  void check_norm(const EngineNorm& norm, int64_t width, const char* what) const;
  void check_matrix(const EngineMatrix& w, int64_t columns, int64_t depth, const char* what);
  void check_layer(const EngineLayer& layer);
  void check_cell(const EngineCell& cell);

  const char* weights_;
  int64_t size_;
  const EngineModel* model_;
  const EngineLayer* layers_ = nullptr;
  const EngineCell* cells_ = nullptr;
  EngineSizes sizes_{};
};

// Numbers of a tensor that must have `count` of them.
inline const int64_t* integers(const Tensor& t, const char* name, int64_t count) {
  LMFAST_CHECK(t.is_cpu() && t.scalar_type() == torch::headeronly::ScalarType::Long &&
                   t.is_contiguous() && t.numel() == count,
               name, " must be a contiguous int64 CPU tensor of ", count, " numbers");
  return static_cast<const int64_t*>(t.const_data_ptr());
}
inline void check_below(const int64_t* values, int64_t count, int64_t limit, const char* name) {
  for (int64_t i = 0; i < count; ++i) {
    LMFAST_CHECK(values[i] >= 0 && values[i] < limit, name, " must lie in 0..", limit - 1, ", got ",
                 values[i]);
  }
}

// The memory of one step, one allocation: pieces are counted first, then taken.
class StepMemory {
 public:
  int64_t add(int64_t bytes) {
    const int64_t at = size_;
    size_ += round_up(bytes, 64);
    return at;
  }
  int64_t size() const { return size_; }

 private:
  int64_t size_ = 0;
};

// Places the parts that every step has: operands, each thread's own memory, the choice of tokens.
class StepParts {
 public:
  StepParts(StepMemory& memory, EngineArgs& a, const EngineSizes& sizes);
  void place(char* base, EngineArgs& a) const;
  int64_t threads() const { return threads_; }

 private:
  int64_t threads_, operand_, scratch_, best_, progress_;
};

// Zeros behind the ends of rows, which products read.
void clear_behind(float* rows, int64_t count, int64_t stride, int64_t width);

// Runs the kernel with so many threads, in one fork.
void run_step(const EngineArgs& a, engine_run_fn kernel, int64_t threads);

}  // namespace lmfast
