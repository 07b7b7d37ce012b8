// What the bindings of operators that rotate share: the tables and the positions.
#pragma once

#include <algorithm>
#include <optional>

#include "../common/tensor.h"

namespace lmfast {

// A vector of int64 on the CPU; null if there is none.
inline const int64_t* indices(const std::optional<Tensor>& t, const char* name) {
  if (!t.has_value()) return nullptr;
  LMFAST_CHECK(
      t->is_cpu() && t->scalar_type() == torch::headeronly::ScalarType::Long && t->is_contiguous(),
      name, " must be a contiguous int64 CPU tensor");
  return static_cast<const int64_t*>(t->const_data_ptr());
}

// Sets the tables and positions of arguments whose dtype, length and head size are set. Positions
// come from memory or from an offset; every one must have a row in the tables.
template <typename Args>
void set_rotation(const Tensor& cos, const Tensor& sin, const std::optional<Tensor>& positions,
                  int64_t offset, int64_t batch, Args& a) {
  LMFAST_CHECK(
      cos.is_cpu() && sin.is_cpu() && cos.dim() == 2 && cos.is_contiguous() && sin.is_contiguous(),
      "cos and sin must be contiguous CPU matrices (length, rotary / 2)");
  check_same_shape(cos, sin, "cos", "sin");
  const DType table = dtype_of(cos, "cos");
  LMFAST_CHECK(table == dtype_of(sin, "sin") &&
                   (table == DType::kF32 || (table == DType::kF64 && a.dtype == DType::kF64)),
               "cos and sin must be float32, or float64 with float64 q and k");
  a.fp64_tables = table == DType::kF64;
  a.rotary = 2 * cos.size(1);
  LMFAST_CHECK(a.rotary <= a.head_dim, "the tables rotate ", a.rotary,
               " dimensions but the head size is ", a.head_dim);
  a.cos = cos.const_data_ptr();
  a.sin = sin.const_data_ptr();
  a.offset = offset;
  int64_t lowest = offset, highest = offset + a.length - 1;
  if (const int64_t* p = indices(positions, "positions")) {
    const bool per_row = positions->dim() == 1 && positions->size(0) == batch;
    const bool per_token =
        positions->dim() == 2 && positions->size(0) == batch && positions->size(1) == a.length;
    LMFAST_CHECK(per_row || per_token, "positions must have shape (B,) or (B, T)");
    (per_row ? a.starts : a.positions) = p;
    if (positions->numel() > 0) {
      const auto [least, most] = std::minmax_element(p, p + positions->numel());
      lowest = *least;
      highest = *most;
    }
    if (per_row) highest += a.length - 1;
  }
  if (batch == 0 || a.length == 0) return;
  LMFAST_CHECK(lowest >= 0 && highest < cos.size(0), "positions reach from ", lowest, " to ",
               highest, " but cos and sin have rows for 0 to ", cos.size(0) - 1,
               "; build longer tables with rope_tables(length, ...)");
}

}  // namespace lmfast
