// The loops over time of elman_rnn, lstm and gru on an NVIDIA GPU, each one persistent kernel, for
// any GPU and for layers that need more than one cluster of multiprocessors; recurrent_cluster.cuh
// has the others.
//
// Floor: per step, reading the weights; they are therefore read once, into registers, and stay
// there for all steps. A block owns a few hidden units and holds their rows of the matrix; its
// warps share the depth. What remains per step is one exchange of the state through L2 (every block
// needs all of h: batch x hidden x 2 bytes per block) and one wait of the blocks for each other,
// about a microsecond; a library that starts a product and a kernel per step pays several. Batches
// are cut into groups that know nothing of each other where the multiprocessors allow it.
//
// Products. 16 bits: mma.sync with the weights as the 16-row operand and eight batch rows as the
// columns, so a batch of 8 wastes nothing. The depth may be walked in any order if both operands
// agree: a thread's four pairs of two steps are taken from 16 neighbouring bytes, and h goes from
// L2 to the matrix units by one load, without shared memory. fp32 stays fp32: lanes share the
// depth, multiply on the ordinary units, and halve their sums among each other until each lane
// holds one row. Either way a warp leaves partial sums in shared memory, and the thread that owns a
// unit and a batch row adds them, applies the cell and keeps the state: always the same thread, so
// states need no synchronisation. Sums are in a fixed order: the same bits every run.
//
// The wait is a counter per group in global memory: every block adds one when its part of a step is
// written, and goes on when all have. All blocks are resident, as the launch is cooperative. h is
// read past L1, which may hold the line from before it was written.
//
// Backward walks the other way with the transposed matrix: the product of the step before (the
// gates' gradients, exchanged as h is forward) gives dh, then the cell's derivative.
#pragma once

#include "recurrent_cells.cuh"
#include "recurrent_product.cuh"

namespace lmfast::gpu {

// All blocks of the group have done `count` steps.
__device__ __forceinline__ void wait_for_group(unsigned* arrived, unsigned count, int blocks) {
  __syncthreads();
  if (threadIdx.x == 0) {
    add_released(arrived);
    while (load_acquired(arrived) < count * static_cast<unsigned>(blocks)) pause_briefly();
  }
  __syncthreads();
}

// gridDim = (unit blocks, groups of the batch), threads: 32 x warps of the plan.
template <typename T, int R, int D>
__global__ void __launch_bounds__(kRecurrentMaxWarps * 32, 1)
    recurrent_fwd_kernel(const __grid_constant__ RecurrentFwd p) {
  float* partial = static_cast<float*>(dynamic_shared());
  const RecurrentShape& s = p.s;
  const int hidden = s.hidden, unit0 = blockIdx.x * s.units;
  const int units = s.units < hidden - unit0 ? s.units : hidden - unit0;
  const int group0 = blockIdx.y * s.group_rows;
  const int warps = blockDim.x / 32, stride = s.at_once + 1, gates = gates_of(s.cell);
  const T* y = static_cast<const T*>(p.y);

  RecurrentProduct<T, R, D> product;
  product.load_weights(ForwardRows<T>(s, unit0, units));

  for (int number = 0; number < s.steps; ++number) {
    const RecurrentStep step = step_of(s, number, s.reverse);
    const int last = step.rows - group0 < s.group_rows ? step.rows - group0 : s.group_rows;
    const bool any = number > 0 || p.h0 != nullptr;
    for (int b0 = 0; b0 < last; b0 += s.at_once) {
      const int count = last - b0 < s.at_once ? last - b0 : s.at_once;
      const int first = group0 + b0;
      if (any) {
        product.template multiply<PastL1>(
            [&](int n) -> const T* {
              if (first + n < step.started) return y + (step.before + first + n) * hidden;
              if (p.h0 == nullptr) return nullptr;
              return static_cast<const T*>(p.h0) + int64_t{first + n} * hidden;
            },
            count, hidden, partial, stride);
      }
      __syncthreads();
      for (int i = threadIdx.x; i < units * count; i += blockDim.x) {
        const int u = i % units, n = i / units;
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int g = 0; g < 4; ++g) {
          if (g >= gates || !any) continue;
          for (int v = 0; v < warps; ++v) sum[g] += partial[(v * R + g * s.units + u) * stride + n];
        }
        forward_unit<T>(p, step, first + n, unit0 + u, sum);
      }
      __syncthreads();
    }
    if (number + 1 < s.steps) {
      wait_for_group(s.arrived + blockIdx.y, number + 1, s.unit_blocks);
    }
  }
  keep_last_states<T>(p, group0, unit0, units);
}

template <typename T, int R, int D>
__global__ void __launch_bounds__(kRecurrentMaxWarps * 32, 1)
    recurrent_bwd_kernel(const __grid_constant__ RecurrentBwd p) {
  float* partial = static_cast<float*>(dynamic_shared());
  const RecurrentShape& s = p.s;
  const int hidden = s.hidden, unit0 = blockIdx.x * s.units;
  const int units = s.units < hidden - unit0 ? s.units : hidden - unit0;
  const int group0 = blockIdx.y * s.group_rows;
  const int warps = blockDim.x / 32, stride = s.at_once + 1, gates = gates_of(s.cell);
  const int gradients = gates == 1 ? 1 : 4, depth = gates * hidden;
  T* dgates = static_cast<T*>(p.dgates);

  RecurrentProduct<T, R, D> product;
  product.load_weights(BackwardRows<T>{s, unit0, units});

  for (int number = 0; number < s.steps; ++number) {
    const RecurrentStep step = step_of(s, number, !s.reverse);
    const int last = step.rows - group0 < s.group_rows ? step.rows - group0 : s.group_rows;
    for (int b0 = 0; b0 < last; b0 += s.at_once) {
      const int count = last - b0 < s.at_once ? last - b0 : s.at_once;
      const int first = group0 + b0;
      if (number > 0) {
        product.template multiply<PastL1>(
            [&](int n) -> const T* {
              if (first + n >= step.started) return nullptr;
              return dgates + (step.before + first + n) * gradients * hidden;
            },
            count, depth, partial, stride);
      }
      __syncthreads();
      const EarlierStep earlier = earlier_step(s, step.t);
      for (int i = threadIdx.x; i < units * count; i += blockDim.x) {
        const int u = i % units, n = i / units, b = first + n;
        float through = 0.0f;
        if (b < step.started) {
          for (int v = 0; v < warps; ++v) through += partial[(v * R + u) * stride + n];
        }
        const int64_t out = (step.at + b) * gradients * hidden + unit0 + u;
        backward_unit<T>(p, step, earlier, b, unit0 + u, through, [&](int gate, float value) {
          put<T>(p.dgates, out + gate * hidden, value);
        });
      }
      __syncthreads();
    }
    if (number + 1 < s.steps) {
      wait_for_group(s.arrived + blockIdx.y, number + 1, s.unit_blocks);
    }
  }
  keep_last_carry<T>(p, group0, unit0, units);
}

}  // namespace lmfast::gpu
