// lmfast::cross_entropy on the CPU: checks, threads, registration.
#include "kernels/cross_entropy.h"

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/tensor.h"

namespace lmfast {
namespace {

using torch::stable::new_empty;
using torch::stable::parallel_for;

enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

// dlogits: null for the loss alone.
Tensor run(const Tensor& logits, const Tensor& targets, const std::optional<Tensor>& dloss,
           int64_t ignore_index, int64_t reduction, double smoothing, double z_loss,
           const Tensor* dlogits) {
  using torch::headeronly::ScalarType;
  check_rows(logits, "logits");
  LMFAST_CHECK(logits.dim() == 2 && logits.size(1) > 0, "logits must be (N, V) with V > 0");
  const int64_t rows = logits.size(0), classes = logits.size(1);
  LMFAST_CHECK(targets.is_cpu() && targets.dim() == 1 && targets.size(0) == rows &&
                   targets.is_contiguous() && targets.scalar_type() == ScalarType::Long,
               "targets must be a contiguous int64 CPU vector with one element per row of logits");
  LMFAST_CHECK(reduction >= kNone && reduction <= kSum, "reduction must be 0, 1 or 2");
  const int64_t* target = static_cast<const int64_t*>(targets.const_data_ptr());
  int64_t kept = 0;
  for (int64_t i = 0; i < rows; ++i) {
    if (target[i] == ignore_index) continue;
    LMFAST_CHECK(target[i] >= 0 && target[i] < classes, "targets must be in [0, ", classes,
                 ") or ignore_index ", ignore_index, ", got ", target[i]);
    ++kept;
  }
  const double shared = reduction == kMean ? 1.0 / std::max<int64_t>(kept, 1) : 1.0;
  std::vector<double> losses(rows), scale(rows, shared);
  if (dloss.has_value()) {
    const int64_t size = reduction == kNone ? rows : 1;
    LMFAST_CHECK(dloss->is_cpu() && dloss->numel() == size && dloss->is_contiguous() &&
                     dloss->scalar_type() == ScalarType::Double,
                 "dloss must be a contiguous float64 CPU tensor of ", size, " elements");
    const double* incoming = static_cast<const double*>(dloss->const_data_ptr());
    for (int64_t i = 0; i < rows; ++i) scale[i] *= incoming[reduction == kNone ? i : 0];
  }
  CrossEntropyArgs a{};
  a.dtype = dtype_of(logits, "logits");
  a.classes = classes;
  a.stride = logits.stride(0);
  a.logits = logits.const_data_ptr();
  a.targets = target;
  a.ignore_index = ignore_index;
  a.smoothing = smoothing;
  a.z_loss = z_loss;
  a.loss = losses.data();
  a.scale = scale.data();
  if (dlogits != nullptr) {
    a.dlogits = dlogits->mutable_data_ptr();
    a.dstride = dlogits->stride(0);
  }
  const auto kernel = cross_entropy_rows_kernel();
  parallel_for(0, rows, grain_size(classes),
               [&](int64_t begin, int64_t end) { kernel(a, begin, end); });

  const auto type = a.dtype == DType::kF64 ? ScalarType::Double : ScalarType::Float;
  Tensor loss = reduction == kNone ? new_empty(logits, {rows}, type) : new_empty(logits, {}, type);
  void* out = loss.mutable_data_ptr();
  const auto put = [&](int64_t i, double value) {
    if (type == ScalarType::Double) {
      static_cast<double*>(out)[i] = value;
    } else {
      static_cast<float*>(out)[i] = static_cast<float>(value);
    }
  };
  if (reduction == kNone) {
    for (int64_t i = 0; i < rows; ++i) put(i, losses[i]);
  } else {
    double sum = 0.0;
    for (double l : losses) sum += l;
    put(0, sum * shared);
  }
  return loss;
}

std::tuple<Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& targets,
                                         const std::optional<Tensor>& dloss, int64_t ignore_index,
                                         int64_t reduction, double smoothing, double z_loss,
                                         bool want_dlogits) {
  Tensor dlogits =
      want_dlogits ? new_empty(logits, {logits.size(0), logits.size(1)}) : new_empty(logits, {0});
  Tensor loss = run(logits, targets, dloss, ignore_index, reduction, smoothing, z_loss,
                    want_dlogits ? &dlogits : nullptr);
  return {loss, dlogits};
}

Tensor cross_entropy_(const Tensor& logits, const Tensor& targets,
                      const std::optional<Tensor>& dloss, int64_t ignore_index, int64_t reduction,
                      double smoothing, double z_loss) {
  return run(logits, targets, dloss, ignore_index, reduction, smoothing, z_loss, &logits);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmfast, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("cross_entropy_", TORCH_BOX(&cross_entropy_));
}

}  // namespace lmfast
