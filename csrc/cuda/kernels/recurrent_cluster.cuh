// The loops over time of elman_rnn, lstm and gru within clusters of multiprocessors (Hopper and
// later): for layers whose weights fit into the registers of up to 16 of them.
//
// As in recurrent.cuh the weights are read once and stay in registers, and a step is one product,
// the cells, and one exchange. What differs is the exchange. There it is a round through L2:
// stores, a counter in global memory on which every block spins, loads past L1, each of them most
// of a microsecond away. Here the blocks that share a group of the batch are one cluster, all of h
// lies in the shared memory of each of them, twice: a block writes its units' part of the next h
// into its own copy, then pushes that part into the other copies, 16 bytes a store, and a barrier
// of the cluster in hardware ends the step. The product's operand is then local. Two copies make
// one barrier per step enough: what is written in a step is not what is read in it.
//
// Groups know nothing of each other and nothing waits for all of them: no cooperative launch, and
// any batch is a number of clusters of which some run later. Rows of h are padded to 64 bytes more
// than a multiple of 128, so that the eight rows that a warp reads for a matrix instruction fall on
// different banks.
//
// Backward exchanges the gates' gradients, up to four times as wide, in the same way.
#pragma once

#include "recurrent_cells.cuh"
#include "recurrent_product.cuh"

namespace lmfast::gpu {

// Copies columns [begin, begin + count) of a block's rows into the same place in the other blocks
// of the cluster. Rows are a multiple of 16 bytes apart, begin is one, and what lies behind `count`
// up to the next is this block's as well.
template <typename T>
__device__ __forceinline__ void push(T* rows, int row_count, int stride, int begin, int count,
                                     unsigned rank, unsigned ranks) {
  constexpr int kVector = kFullVector<T>;
  const int vectors = (count + kVector - 1) / kVector, all = row_count * vectors;
  for (int i = threadIdx.x; i < all * static_cast<int>(ranks - 1); i += blockDim.x) {
    const unsigned other = (rank + 1 + i / all) % ranks;
    T* at = rows + (i % all) / vectors * stride + begin + i % vectors * kVector;
    store_to_rank(at, other, *reinterpret_cast<const uint4*>(at));
  }
}

// Sets both copies to the rows that `first` gives, null for zeros, and what pads them to zero.
template <typename T, typename First>
__device__ __forceinline__ void fill_rows(T* copies, int row_count, int stride, int width,
                                          First first) {
  for (int i = threadIdx.x; i < 2 * row_count * stride; i += blockDim.x) {
    const T* row = first(i / stride % row_count);
    copies[i] = row != nullptr && i % stride < width ? row[i % stride] : from_float<T>(0.0f);
  }
}

// What a block works on: a few hidden units of a group of the batch's rows. Its warps leave their
// parts of the product, R rows each, in shared memory.
template <int R>
struct RecurrentBlock {
  float* partial;
  int unit0, units;  // a cluster may have blocks to spare, without units
  int group0;        // the group's first row
  int stride, warps, gates;

  explicit __device__ RecurrentBlock(const RecurrentShape& s)
      : partial(static_cast<float*>(dynamic_shared())),
        unit0(blockIdx.x * s.units),
        group0(blockIdx.y * s.group_rows),
        stride(s.at_once + 1),
        warps(blockDim.x / 32),
        gates(gates_of(s.cell)) {
    const int there = s.units < s.hidden - unit0 ? s.units : s.hidden - unit0;
    units = there > 0 ? there : 0;
  }

  // How many rows of its group run in a step.
  __device__ __forceinline__ int rows_of(const RecurrentShape& s, const RecurrentStep& step) const {
    return step.rows - group0 < s.group_rows ? step.rows - group0 : s.group_rows;
  }

  // The product's row `row` for batch row n, in a fixed order.
  __device__ __forceinline__ float sum(int row, int n) const {
    float total = 0.0f;
    for (int v = 0; v < warps; ++v) total += partial[(v * R + row) * stride + n];
    return total;
  }
};

// gridDim = (blocks of a cluster, groups of the batch), threads: 32 x warps of the plan. Shared:
// the products' parts, then two copies of h.
template <typename T, int R, int D>
__global__ void __launch_bounds__(kRecurrentMaxWarps * 32, 1)
    recurrent_cluster_fwd_kernel(const __grid_constant__ RecurrentFwd p) {
#ifdef LMFAST_CLUSTERS
  const RecurrentShape& s = p.s;
  const RecurrentBlock<R> block(s);
  const int hidden = s.hidden, unit0 = block.unit0, units = block.units, group0 = block.group0;
  T* copies = reinterpret_cast<T*>(block.partial + s.partial_size);

  RecurrentProduct<T, R, D> product;
  product.load_weights(ForwardRows<T>(s, unit0, units));
  // A row that starts later than others finds its first state in either copy.
  fill_rows(copies, s.group_rows, s.row_stride, hidden, [&](int n) -> const T* {
    if (p.h0 == nullptr || group0 + n >= s.batch) return nullptr;
    return static_cast<const T*>(p.h0) + int64_t{group0 + n} * hidden;
  });
  sync_cluster();

  for (int number = 0; number < s.steps; ++number) {
    const RecurrentStep step = step_of(s, number, s.reverse);
    const int last = block.rows_of(s, step);
    const T* now = copies + number % 2 * s.group_rows * s.row_stride;
    T* next = copies + (number + 1) % 2 * s.group_rows * s.row_stride;
    for (int b0 = 0; b0 < last; b0 += s.at_once) {
      const int count = last - b0 < s.at_once ? last - b0 : s.at_once;
      product.template multiply<FromShared>(
          [&](int n) -> const T* { return now + (b0 + n) * s.row_stride; }, count, hidden,
          block.partial, block.stride);
      __syncthreads();
      for (int i = threadIdx.x; i < units * count; i += blockDim.x) {
        const int u = i % units, n = i / units;
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int g = 0; g < 4; ++g) {
          if (g < block.gates) sum[g] = block.sum(g * s.units + u, n);
        }
        const float h = forward_unit<T>(p, step, group0 + b0 + n, unit0 + u, sum);
        next[(b0 + n) * s.row_stride + unit0 + u] = from_float<T>(h);
      }
      __syncthreads();
    }
    if (number + 1 < s.steps) {
      if (last > 0) {
        push(next, last, s.row_stride, unit0, units, blockIdx.x, gridDim.x);
      }
      sync_cluster();
    }
  }
  keep_last_states<T>(p, group0, unit0, units);
#else
  __trap();
#endif
}

template <typename T, int R, int D>
__global__ void __launch_bounds__(kRecurrentMaxWarps * 32, 1)
    recurrent_cluster_bwd_kernel(const __grid_constant__ RecurrentBwd p) {
#ifdef LMFAST_CLUSTERS
  const RecurrentShape& s = p.s;
  const RecurrentBlock<R> block(s);
  const int hidden = s.hidden, unit0 = block.unit0, units = block.units, group0 = block.group0;
  T* copies = reinterpret_cast<T*>(block.partial + s.partial_size);
  const int gates = block.gates, gradients = gates == 1 ? 1 : 4;
  // The gradients that meet the matrix, each `gate_stride` behind the other; a GRU's fourth does
  // not.
  const int gate_stride = s.gate_stride, depth = (gates - 1) * gate_stride + hidden;
  T* dgates = static_cast<T*>(p.dgates);

  RecurrentProduct<T, R, D> product;
  const BackwardRows<T> rows{s, unit0, units};
  product.load_weights([&](int row, int k) {
    const int gate = k / gate_stride, unit = k % gate_stride;
    return unit < hidden ? rows(row, gate * hidden + unit) : from_float<T>(0.0f);
  });
  fill_rows(copies, s.group_rows, s.row_stride, 0, [](int) -> const T* { return nullptr; });
  sync_cluster();

  for (int number = 0; number < s.steps; ++number) {
    const RecurrentStep step = step_of(s, number, !s.reverse);
    const EarlierStep earlier = earlier_step(s, step.t);
    const int last = block.rows_of(s, step);
    const T* now = copies + number % 2 * s.group_rows * s.row_stride;
    T* next = copies + (number + 1) % 2 * s.group_rows * s.row_stride;
    for (int b0 = 0; b0 < last; b0 += s.at_once) {
      const int count = last - b0 < s.at_once ? last - b0 : s.at_once;
      product.template multiply<FromShared>(
          [&](int n) -> const T* { return now + (b0 + n) * s.row_stride; }, count, depth,
          block.partial, block.stride);
      __syncthreads();
      for (int i = threadIdx.x; i < units * count; i += blockDim.x) {
        const int u = i % units, n = i / units, b = group0 + b0 + n;
        const float through = block.sum(u, n);
        const int64_t out = (step.at + b) * gradients * hidden + unit0 + u;
        T* mine = next + (b0 + n) * s.row_stride + unit0 + u;
        backward_unit<T>(p, step, earlier, b, unit0 + u, through, [&](int gate, float value) {
          put<T>(dgates, out + gate * hidden, value);
          if (gate < gates) mine[gate * gate_stride] = from_float<T>(value);
        });
      }
      __syncthreads();
    }
    if (number + 1 < s.steps) {
      if (last > 0) {
        for (int gate = 0; gate < gates; ++gate) {
          push(next, last, s.row_stride, gate * gate_stride + unit0, units, blockIdx.x, gridDim.x);
        }
      }
      sync_cluster();
    }
  }
  keep_last_carry<T>(p, group0, unit0, units);
#else
  __trap();
#endif
}

}  // namespace lmfast::gpu
