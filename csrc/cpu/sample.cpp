// lmfast::sample on the CPU: checks, threads, registration.
#include "kernels/sample.h"

#include <optional>
#include <tuple>

#include "../common/tensor.h"
#include "scratch.h"

namespace lmfast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::new_empty;

// Kept from call to call: fresh megabytes would cost more page faults than the row costs time.
void* thread_scratch(int64_t bytes) {
  thread_local ScratchMemory memory(nullptr, &std::free);
  thread_local int64_t size = 0;
  if (bytes > size) {
    memory = allocate_scratch(bytes);
    size = bytes;
  }
  return memory.get();
}

const void* vector_of(const Tensor& t, ScalarType type, int64_t size, const char* name) {
  LMFAST_CHECK(t.is_cpu() && t.scalar_type() == type && t.is_contiguous() && t.dim() == 1 &&
                   t.size(0) == size,
               name, " must be a contiguous CPU vector of ", size, " elements of its dtype");
  return t.const_data_ptr();
}

const void* table_of(const std::optional<Tensor>& t, ScalarType type, const Tensor& logits,
                     const char* name) {
  if (!t.has_value()) return nullptr;
  LMFAST_CHECK(t->is_cpu() && t->scalar_type() == type && t->is_contiguous() && t->dim() == 2 &&
                   t->size(0) == logits.size(0) && t->size(1) == logits.size(1),
               name, " must be a contiguous CPU tensor of logits' shape and its dtype");
  return t->const_data_ptr();
}

std::tuple<Tensor, Tensor> sample(const Tensor& logits, const Tensor& uniform,
                                  const Tensor& settings, const std::optional<Tensor>& counts,
                                  const std::optional<Tensor>& prompt_mask,
                                  const std::optional<Tensor>& bias,
                                  const std::optional<Tensor>& suppress, bool want_log_probs) {
  check_rows(logits, "logits");
  LMFAST_CHECK(logits.dim() == 2 && logits.size(1) > 0 && logits.size(1) < (int64_t{1} << 31),
               "logits must be (B, V) with 0 < V < 2^31");
  const int64_t rows = logits.size(0), classes = logits.size(1);
  SampleArgs a{};
  a.dtype = dtype_of(logits, "logits");
  const auto type = a.dtype == DType::kF64 ? ScalarType::Double : ScalarType::Float;
  a.classes = classes;
  a.stride = logits.stride(0);
  a.logits = logits.const_data_ptr();
  LMFAST_CHECK(settings.is_cpu() && settings.scalar_type() == ScalarType::Double &&
                   settings.dim() == 2 && settings.size(1) == kSampleSettings &&
                   settings.is_contiguous() && (settings.size(0) == 1 || settings.size(0) == rows),
               "settings must be a contiguous float64 CPU tensor (1 or B, ",
               static_cast<int>(kSampleSettings), ")");
  a.settings = static_cast<const double*>(settings.const_data_ptr());
  a.settings_stride = settings.size(0) == 1 ? 0 : kSampleSettings;
  a.uniform = static_cast<const double*>(vector_of(uniform, ScalarType::Double, rows, "uniform"));
  a.counts = static_cast<const int32_t*>(table_of(counts, ScalarType::Int, logits, "counts"));
  a.prompt_mask =
      static_cast<const uint8_t*>(table_of(prompt_mask, ScalarType::Bool, logits, "prompt_mask"));
  if (bias.has_value()) {
    check_rows(*bias, "bias");
    LMFAST_CHECK(bias->scalar_type() == type && bias->dim() >= 1 && bias->dim() <= 2 &&
                     bias->size(bias->dim() - 1) == classes &&
                     (bias->dim() == 1 || bias->size(0) == rows),
                 "bias must be (V,) or (B, V) in the dtype of accumulation");
    a.bias = bias->const_data_ptr();
    a.bias_stride = bias->dim() == 1 ? 0 : bias->stride(0);
  }
  if (suppress.has_value()) {
    a.suppress_count = suppress->numel();
    a.suppress = static_cast<const int64_t*>(
        vector_of(*suppress, ScalarType::Long, a.suppress_count, "suppress"));
    for (int64_t i = 0; i < a.suppress_count; ++i) {
      LMFAST_CHECK(a.suppress[i] >= 0 && a.suppress[i] < classes, "suppress must be in [0, ",
                   classes, "), got ", a.suppress[i]);
    }
  }
  Tensor ids = new_empty(logits, {rows}, ScalarType::Long);
  Tensor log_probs = new_empty(logits, {want_log_probs ? rows : 0}, type);
  a.ids = static_cast<int64_t*>(ids.mutable_data_ptr());
  a.log_probs = want_log_probs ? log_probs.mutable_data_ptr() : nullptr;
  const auto kernel = sample_rows_kernel();
  const int64_t bytes = sample_scratch_bytes(classes);
  torch::stable::parallel_for(0, rows, grain_size(classes), [&](int64_t begin, int64_t end) {
    SampleArgs mine = a;
    mine.scratch = thread_scratch(bytes);
    kernel(mine, begin, end);
  });
  for (int64_t i = 0; i < rows; ++i) {
    LMFAST_CHECK(
        a.ids[i] >= 0, "row ", i,
        " of logits has no distribution: it holds NaN or inf, or no token is left to draw");
  }
  return {ids, log_probs};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmfast, CPU, m) { m.impl("sample", TORCH_BOX(&sample)); }

}  // namespace lmfast
