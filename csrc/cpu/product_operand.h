// A matrix as the fp32 products take it.
#pragma once

#include "../common/tensor.h"
#include "kernels/product.h"

namespace lmfast {

inline ProductOperand product_operand(const Tensor& t, const char* name) {
  LMFAST_CHECK(t.is_cpu() && t.dim() == 2 && dtype_of(t, name) == DType::kF32, name,
               " must be a float32 CPU matrix");
  ProductOperand m{};
  m.data = static_cast<const float*>(t.const_data_ptr());
  m.by_columns = t.size(1) > 1 && t.stride(1) != 1;
  m.stride = m.by_columns ? t.stride(1) : t.stride(0);
  LMFAST_CHECK(!m.by_columns || t.size(0) <= 1 || t.stride(0) == 1, name,
               " must have contiguous rows or columns");
  return m;
}

}  // namespace lmfast
