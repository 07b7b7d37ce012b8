#include "tensor.h"

#include <algorithm>

namespace lmfast {

DType dtype_of(const Tensor& t, const char* name) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return DType::kF64;
    case ScalarType::Float:
      return DType::kF32;
    case ScalarType::BFloat16:
      return DType::kBF16;
    case ScalarType::Half:
      return DType::kF16;
    default:
      LMFAST_CHECK(false, name, " must be float64, float32, bfloat16 or float16");
  }
  return DType::kF32;
}

void check_rows(const Tensor& t, const char* name) {
  LMFAST_CHECK(t.is_cpu(), name, " must be a CPU tensor");
  LMFAST_CHECK(t.dim() >= 1, name, " must have at least one dimension");
  LMFAST_CHECK(t.numel() == 0 || t.size(t.dim() - 1) == 1 || t.stride(t.dim() - 1) == 1, name,
               " must have stride 1 in its last dimension, got ", t.stride(t.dim() - 1));
}

void check_same_shape(const Tensor& a, const Tensor& b, const char* name_a, const char* name_b) {
  bool same = a.dim() == b.dim();
  for (int64_t d = 0; same && d < a.dim(); ++d) same = a.size(d) == b.size(d);
  LMFAST_CHECK(same, name_a, " and ", name_b, " must have the same shape");
}

RowLayout row_layout(std::initializer_list<const Tensor*> operands) {
  RowLayout layout;
  const Tensor* first = *operands.begin();
  const int n = static_cast<int>(operands.size());
  LMFAST_CHECK(n <= kMaxRowOperands, "too many operands for a row layout: ", n);
  const auto operand = [&](int i) {
    const Tensor* t = *(operands.begin() + i);
    return t != nullptr ? t : first;
  };
  for (int64_t d = 0; d < first->dim() - 1; ++d) {
    const int64_t size = first->size(d);
    layout.count *= size;
    if (size == 1) continue;
    const int last = layout.ndim - 1;
    bool merge = last >= 0;
    for (int i = 0; merge && i < n; ++i) {
      merge = layout.stride[i][last] == operand(i)->stride(d) * size;
    }
    if (merge) {
      layout.size[last] *= size;
    } else {
      LMFAST_CHECK(layout.ndim < kMaxRowDims, "more than ", kMaxRowDims,
                   " leading dimensions that cannot be merged; call .contiguous() first");
      layout.size[layout.ndim++] = size;
    }
    const int at = layout.ndim - 1;
    for (int i = 0; i < kMaxRowOperands; ++i) {
      layout.stride[i][at] = i < n ? operand(i)->stride(d) : 0;
    }
  }
  return layout;
}

int64_t grain_size(int64_t elements) {
  constexpr int64_t kElementsPerThread = 32768;
  return std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, elements));
}

}  // namespace lmfast
