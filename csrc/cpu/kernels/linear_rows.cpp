#include "linear_rows.h"

#include "../simd.h"

namespace lmfast::LMFAST_ISA {
namespace {

template <class T>
void lay_out(const LinearRowsArgs& a, int64_t begin, int64_t end) {
  constexpr int W = VecF::kWidth;
  const int64_t half = a.depth / 2;
  for (int64_t r = begin; r < end; ++r) {
    const T* x = static_cast<const T*>(a.x) + r * a.stride;
    float* out = a.out + r * a.depth;
    for (int64_t i = 0; i < a.depth; i += W) {
      const int n = a.depth - i < W ? static_cast<int>(a.depth - i) : W;
      const VecF v = n == W ? VecF::load(x + i) : VecF::load(x + i, n);
      if (!a.apart) {
        v.store(out + i, n);
        continue;
      }
      float lanes[W];
      v.store(lanes);
      for (int j = 0; j < n; ++j) out[(i + j) / 2 + (j % 2 != 0 ? half : 0)] = lanes[j];
    }
  }
}

}  // namespace

void linear_rows(const LinearRowsArgs& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::kBF16:
      return lay_out<bf16>(a, begin, end);
    case DType::kF16:
      return lay_out<f16>(a, begin, end);
    default:
      return lay_out<float>(a, begin, end);
  }
}

}  // namespace lmfast::LMFAST_ISA
