// lmfast::product_f32 on the CPU: checks, division over threads, registration.
#include <algorithm>
#include <optional>

#include "product_operand.h"
#include "recurrent_tensors.h"

namespace lmfast {
namespace {

// a b^T + bias, sums over the depth in chunks of `chunk`.
Tensor product_f32(Tensor a, Tensor b, std::optional<Tensor> bias, int64_t chunk) {
  constexpr int64_t kSmallWork = 1 << 18;  // multiply-adds worth a second thread
  constexpr int64_t kFewRows = 640;        // up to which packing B beforehand costs more
  ProductArgs p{};
  p.a = product_operand(a, "a");
  p.b = product_operand(b, "b");
  LMFAST_CHECK(a.size(1) == b.size(1), "a and b must have rows of one length");
  LMFAST_CHECK(chunk >= 1, "chunk must be at least 1, got ", chunk);
  p.rows = a.size(0);
  p.columns = b.size(0);
  p.depth = a.size(1);
  p.chunk = std::min(chunk, std::max<int64_t>(1, p.depth));
  p.bias = floats(bias, "bias", {p.columns});
  Tensor c = empty_floats({p.rows, p.columns});
  if (p.rows == 0 || p.columns == 0) return c;
  p.c = writable(c);

  const int64_t panels = (p.columns + kProductLanes - 1) / kProductLanes;
  const bool few = p.rows <= kFewRows;
  bool reads_columns;
  product_traits_kernel()({&reads_columns}, 0, 0);
  p.packing = few && p.b.by_columns && p.columns % 16 == 0 && reads_columns ? ProductPacking::kNone
              : few && !p.b.by_columns && !p.a.by_columns ? ProductPacking::kByUnit
                                                          : ProductPacking::kBefore;
  ScratchMemory packed(nullptr, &std::free);
  if (p.packing == ProductPacking::kBefore) {
    packed = allocate_scratch(panels * p.depth * kProductLanes * 4);
    p.packed_b = static_cast<float*>(packed.get());
    const auto pack = product_pack_kernel();
    torch::stable::parallel_for(0, panels, grain_size(p.depth * kProductLanes),
                                [&](int64_t begin, int64_t end) { pack(p, begin, end); });
  }

  // Units as even as they get, and as many for each thread: rows first, unless each packs its
  // panels for itself, and panels where there are few rows. No sum depends on the division. Rows of
  // a unit with a chunk of A fill half of L1; where A's columns are contiguous, as in a weight's
  // gradient, the depth is long and every unit reads all of B from beyond L2, so there are fewer
  // and larger ones (two cores of Zen 4, depth 3840: 128 by 128 157 -> 172 GF/s, 512 by 128 170 ->
  // 182; depth 2240, 512 by 512 193 -> 204).
  const int64_t most_rows = p.a.by_columns ? 96 : 48, of_thread = p.a.by_columns ? 3 : 4;
  const int64_t threads = torch::stable::get_num_threads();
  const bool alone = threads == 1 || p.rows * p.columns * p.depth < kSmallWork;
  const int64_t wanted = alone ? 1 : of_thread * threads;
  const int64_t least = p.packing == ProductPacking::kByUnit
                            ? (wanted + panels - 1) / panels
                            : std::max((p.rows + most_rows - 1) / most_rows, wanted);
  divide_product_rows(p, alone ? least : (least + threads - 1) / threads * threads);
  const int64_t groups = std::clamp<int64_t>(wanted / p.blocks, 1, panels);
  p.group = (panels + groups - 1) / groups;
  p.groups = (panels + p.group - 1) / p.group;
  const int64_t units = p.blocks * p.groups;
  const auto multiply = product_multiply_kernel();
  for_each_unit(
      units, 4 * product_scratch_floats(p),
      [&](void* scratch, int64_t i) {
        ProductArgs mine = p;
        mine.scratch = static_cast<float*>(scratch);
        multiply(mine, i, i + 1);
      },
      alone ? units : 1);
  return c;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmfast, CPU, m) { m.impl("product_f32", TORCH_BOX(&product_f32)); }

}  // namespace lmfast
