// lmfast::recurrent_forward and recurrent_backward on the GPU: checks, plan, launches,
// registration.
#include <algorithm>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "kernels/recurrent.cuh"
#include "launch.h"
#include "recurrent_cluster.h"

namespace lmfast::gpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::new_empty;
using torch::stable::new_zeros;
using torch::stable::accelerator::DeviceGuard;
using Optional = std::optional<Tensor>;

// A contiguous tensor of this shape on the GPU and in the dtype of `like`.
const void* matrix(const Tensor& t, const Tensor& like, const char* name,
                   std::initializer_list<int64_t> shape) {
  LMFAST_CHECK(t.is_cuda() && t.get_device_index() == like.get_device_index() &&
                   t.scalar_type() == like.scalar_type() && t.is_contiguous(),
               name, " must be contiguous, of one dtype and GPU with the others");
  bool fits = t.dim() == static_cast<int64_t>(shape.size());
  int64_t d = 0;
  for (const int64_t size : shape) {
    fits = fits && t.size(d) == size;
    ++d;
  }
  LMFAST_CHECK(fits, name, " has a wrong shape");
  return t.const_data_ptr();
}

const void* matrix(const Optional& t, const Tensor& like, const char* name,
                   std::initializer_list<int64_t> shape) {
  return t.has_value() ? matrix(*t, like, name, shape) : nullptr;
}

// `fits` is false where neither clusters nor the whole GPU hold the weights; `clusters`: which.
RecurrentPlan plan_for(RecurrentCell cell, int64_t hidden, int64_t batch, DType dtype,
                       bool backward, bool& clusters) {
  const RecurrentPlan within =
      cluster_plan(cell, static_cast<int>(hidden), static_cast<int>(batch), dtype, backward);
  clusters = within.fits;
  if (clusters) return within;
  int device = 0, shared = 0;
  LMFAST_CHECK(cudaGetDevice(&device) == cudaSuccess, "no current CUDA device");
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const int gates = recurrent_gates(cell);
  const int h = static_cast<int>(hidden);
  return recurrent_plan(backward ? 1 : gates, backward ? gates * h : h, h, static_cast<int>(batch),
                        dtype != DType::kF32, multiprocessors(),
                        std::min(shared, kRecurrentMaxShared));
}

// Calls run(Type<T>, rows, depth) for the tile of the plan.
template <typename Run>
void with_tile(DType dtype, const RecurrentPlan& plan, Run run) {
  with_type(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    constexpr const RecurrentTile(&tiles)[3] = sizeof(T) == 2 ? kHalfTiles : kFloatTiles;
    const auto at = [&](auto i) {
      constexpr RecurrentTile tile = tiles[decltype(i)::value];
      if (plan.tile_rows == tile.rows && plan.depth == tile.depth) {
        run(t, std::integral_constant<int, tile.rows>{}, std::integral_constant<int, tile.depth>{});
      }
    };
    at(std::integral_constant<int, 0>{});
    at(std::integral_constant<int, 1>{});
    at(std::integral_constant<int, 2>{});
  });
}

// What both directions share; keeps the device's copies of sizes and counters alive.
struct Layer {
  RecurrentShape s{};
  RecurrentPlan plan{};
  bool clusters = false;
  DType dtype;
  std::vector<Tensor> kept;
  cudaStream_t stream = nullptr;

  Layer(const Tensor& w_hh, const Tensor& like, int64_t rows, int64_t batch,
        const Optional& batch_sizes, int64_t cell, bool reverse, bool backward)
      : dtype(dtype_of(like, "the input's product")) {
    LMFAST_CHECK(cell >= 0 && cell <= 3, "no GPU kernel for this cell");
    s.cell = static_cast<RecurrentCell>(cell);
    const int64_t hidden = w_hh.dim() == 2 ? w_hh.size(1) : 0;
    LMFAST_CHECK(w_hh.is_cuda() && w_hh.get_device_index() == like.get_device_index() &&
                     w_hh.scalar_type() == like.scalar_type() && hidden > 0 &&
                     w_hh.size(0) == recurrent_gates(s.cell) * hidden,
                 "w_hh must be (gates * hidden, hidden) in the dtype and on the GPU of the others");
    LMFAST_CHECK(batch >= 0 && batch < (1 << 30) && hidden < (1 << 20), "too large");
    LMFAST_CHECK(dtype == DType::kF32 || hidden % 8 == 0,
                 "in 16 bits the hidden size must be a multiple of 8");
    plan = plan_for(s.cell, hidden, batch, dtype, backward, clusters);
    LMFAST_CHECK(plan.fits, "the weights of ", hidden, " hidden units do not fit on this GPU");
    stream = current_stream(like);
    s.reverse = reverse;
    s.batch = static_cast<int>(batch);
    s.hidden = static_cast<int>(hidden);
    s.w = w_hh.const_data_ptr();
    s.w_stride[0] = w_hh.stride(0);
    s.w_stride[1] = w_hh.stride(1);
    s.units = plan.units;
    s.unit_blocks = plan.unit_blocks;
    s.group_rows = plan.group_rows;
    s.at_once = plan.at_once;
    s.row_stride = plan.row_stride;
    s.gate_stride = plan.gate_stride;
    s.partial_size = plan.partial_size;
    if (batch_sizes.has_value()) {
      copy_sizes(*batch_sizes, like, rows);
    } else {
      LMFAST_CHECK(batch == 0 ? rows == 0 : rows % batch == 0, "rows must be a multiple of batch");
      s.steps = batch == 0 ? 0 : static_cast<int>(rows / batch);
    }
    if (clusters) return;
    Tensor arrived = new_zeros(like, {plan.groups}, ScalarType::Int);
    s.arrived = static_cast<unsigned*>(arrived.mutable_data_ptr());
    kept.push_back(arrived);
  }

  // Sizes and first rows of the steps, from host memory; checked there.
  void copy_sizes(const Tensor& sizes, const Tensor& like, int64_t rows) {
    LMFAST_CHECK(sizes.is_cpu() && sizes.scalar_type() == ScalarType::Long && sizes.dim() == 1 &&
                     sizes.is_contiguous(),
                 "batch_sizes must be a contiguous int64 vector in host memory");
    s.steps = static_cast<int>(sizes.size(0));
    const int64_t* given = static_cast<const int64_t*>(sizes.const_data_ptr());
    std::vector<int64_t> both(2 * sizes.size(0));
    int64_t total = 0, before = s.batch;
    for (int64_t t = 0; t < s.steps; ++t) {
      LMFAST_CHECK(given[t] > 0 && given[t] <= before, "batch_sizes must be positive, not growing");
      before = both[t] = given[t];
      both[s.steps + t] = total;
      total += given[t];
    }
    LMFAST_CHECK(total == rows && (s.steps == 0 || given[0] == s.batch),
                 "batch_sizes must begin with batch and add up to the rows");
    cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
    LMFAST_CHECK(cudaStreamIsCapturing(stream, &capturing) == cudaSuccess &&
                     capturing == cudaStreamCaptureStatusNone,
                 "sequences of unequal lengths cannot be captured in a CUDA graph: a replay would "
                 "copy their sizes again, from host memory that is gone by then");
    Tensor copy = new_empty(like, {2 * sizes.size(0)}, ScalarType::Long);
    // From pageable memory: the call returns when the host's copy is no longer needed.
    LMFAST_CHECK(cudaMemcpyAsync(copy.mutable_data_ptr(), both.data(), both.size() * 8,
                                 cudaMemcpyHostToDevice, stream) == cudaSuccess,
                 "batch_sizes could not be copied");
    s.sizes = static_cast<const int64_t*>(copy.const_data_ptr());
    s.offsets = s.sizes + s.steps;
    kept.push_back(copy);
  }

  // Starts kernel(type, rows, depth), of the plan's tile, or its twin for clusters.
  template <typename Args, typename KernelOf>
  void launch(const Args& args, const char* name, KernelOf kernel_of) {
    if (clusters) return launch_in_clusters(args, plan, dtype, stream);
    with_tile(dtype, plan,
              [&](auto t, auto r, auto d) { launch_together(kernel_of(t, r, d), args, name); });
  }

  template <typename Args>
  void launch_together(void (*kernel)(Args), Args args, const char* name) {
    const void* function = reinterpret_cast<const void*>(kernel);
    int device = 0;
    LMFAST_CHECK(cudaGetDevice(&device) == cudaSuccess, "no current CUDA device");
    LMFAST_CHECK(allow_shared_memory(function, device), name, ": ", plan.shared_bytes,
                 " bytes of shared memory are refused");
    void* arguments[] = {&args};
    const dim3 grid(plan.unit_blocks, plan.groups), block(plan.warps * 32);
    check_launch(name, cudaLaunchCooperativeKernel(function, grid, block, arguments,
                                                   plan.shared_bytes, stream));
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> recurrent_forward(
    const Tensor& projected, const Tensor& w_hh, const Optional& hidden_bias, const Optional& h0,
    const Optional& c0, const Optional& batch_sizes, int64_t batch, int64_t cell, bool reverse,
    bool keep) {
  const DeviceGuard guard(projected.get_device_index());
  const int64_t rows = projected.size(0), hidden = w_hh.size(1);
  Layer layer(w_hh, projected, rows, batch, batch_sizes, cell, reverse, false);
  const RecurrentCell kind = layer.s.cell;
  const bool lstm = kind == RecurrentCell::kLstm;
  const int64_t kept = keep ? recurrent_kept(kind) : 0;
  RecurrentFwd a{};
  a.s = layer.s;
  a.projected = matrix(projected, projected, "projected", {rows, recurrent_gates(kind) * hidden});
  a.hidden_bias = matrix(hidden_bias, projected, "hidden_bias", {hidden});
  a.h0 = matrix(h0, projected, "h0", {batch, hidden});
  a.c0 = matrix(c0, projected, "c0", {batch, hidden});
  Tensor y = new_empty(projected, {rows, hidden});
  Tensor h_n = new_empty(projected, {batch, hidden});
  Tensor c_n = new_empty(projected, {lstm ? batch : 0, hidden});
  Tensor gates = new_empty(projected, {kept != 0 ? rows : 0, kept * hidden});
  Tensor cells = new_empty(projected, {lstm && keep ? rows : 0, hidden});
  Tensor state = new_empty(projected, {lstm ? 2 : 1, batch, hidden}, ScalarType::Float);
  if (rows == 0) {
    for (auto [to, from] : {std::pair{&h_n, &h0}, std::pair{&c_n, &c0}}) {
      if (from->has_value() && to->size(0) > 0) {
        torch::stable::copy_(*to, **from);
      } else {
        torch::stable::zero_(*to);
      }
    }
    return {y, h_n, c_n, gates, cells};
  }
  a.y = y.mutable_data_ptr();
  a.h_n = h_n.mutable_data_ptr();
  a.c_n = c_n.mutable_data_ptr();
  if (kept != 0) {
    a.gates = gates.mutable_data_ptr();
    a.cells = cells.mutable_data_ptr();
  }
  a.h = static_cast<float*>(state.mutable_data_ptr());
  a.c = a.h + batch * hidden;
  LMFAST_CHECK(!h0.has_value() || aligned({&*h0}), "h0 must be aligned to 16 bytes");
  layer.launch(a, "recurrent_fwd_kernel", [](auto t, auto r, auto d) {
    return recurrent_fwd_kernel<typename decltype(t)::type, r, d>;
  });
  return {y, h_n, c_n, gates, cells};
}

std::tuple<Tensor, Tensor> recurrent_backward(const Optional& dy, const Optional& dh_n,
                                              const Optional& dc_n, const Tensor& y,
                                              const Tensor& gates, const Tensor& cells,
                                              const Tensor& w_hh, const Optional& h0,
                                              const Optional& c0, const Optional& batch_sizes,
                                              int64_t batch, int64_t cell, bool reverse) {
  const DeviceGuard guard(y.get_device_index());
  const int64_t rows = y.size(0), hidden = w_hh.size(1);
  Layer layer(w_hh, y, rows, batch, batch_sizes, cell, reverse, true);
  const RecurrentCell kind = layer.s.cell;
  const bool lstm = kind == RecurrentCell::kLstm;
  const int64_t kept = recurrent_kept(kind);
  RecurrentBwd a{};
  a.s = layer.s;
  a.dy = matrix(dy, y, "dy", {rows, hidden});
  a.dh_n = matrix(dh_n, y, "dh_n", {batch, hidden});
  a.dc_n = matrix(dc_n, y, "dc_n", {batch, hidden});
  a.y = matrix(y, y, "y", {rows, hidden});
  a.h0 = matrix(h0, y, "h0", {batch, hidden});
  a.c0 = matrix(c0, y, "c0", {batch, hidden});
  if (kept != 0) a.gates = matrix(gates, y, "gates", {rows, kept * hidden});
  if (lstm) a.cells = matrix(cells, y, "cells", {rows, hidden});
  Tensor dgates = new_empty(y, {rows, recurrent_gradients(kind) * hidden});
  Tensor carry = new_empty(y, {kept != 0 ? batch : 0, hidden});
  Tensor state = new_empty(y, {kept != 0 ? batch : 0, hidden}, ScalarType::Float);
  if (rows == 0) {
    if (lstm && dc_n.has_value()) {
      torch::stable::copy_(carry, *dc_n);
    } else {
      torch::stable::zero_(carry);
    }
    return {dgates, carry};
  }
  a.dgates = dgates.mutable_data_ptr();
  if (kept != 0) {
    a.carry = static_cast<float*>(state.mutable_data_ptr());
    a.carry_last = carry.mutable_data_ptr();
  }
  layer.launch(a, "recurrent_bwd_kernel", [](auto t, auto r, auto d) {
    return recurrent_bwd_kernel<typename decltype(t)::type, r, d>;
  });
  return {dgates, carry};
}

// Whether a layer's weights fit, forward and, if asked for, backward, on the device of `like`.
bool recurrent_fits(const Tensor& like, int64_t hidden, int64_t batch, int64_t cell,
                    bool backward) {
  if (cell < 0 || cell > 3 || hidden < 1 || hidden >= (1 << 20)) return false;
  const DeviceGuard guard(like.get_device_index());
  const DType dtype = dtype_of(like, "x");
  if (dtype != DType::kF32 && hidden % 8 != 0) return false;
  const auto kind = static_cast<RecurrentCell>(cell);
  bool clusters = false;
  return plan_for(kind, hidden, batch, dtype, false, clusters).fits &&
         (!backward || plan_for(kind, hidden, batch, dtype, true, clusters).fits);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmfast, CUDA, m) {
  m.impl("recurrent_forward", TORCH_BOX(&recurrent_forward));
  m.impl("recurrent_backward", TORCH_BOX(&recurrent_backward));
  m.impl("recurrent_fits", TORCH_BOX(&recurrent_fits));
}

}  // namespace lmfast::gpu
