// The loops over time of elman_rnn, lstm and gru on an NVIDIA GPU, each one persistent kernel.
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

#include "recurrent.h"
#include "recurrent_product.cuh"

namespace lmfast::gpu {

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Where the loop stands: step number s is time t, with `rows` of the batch running, of which
// `started` ran in the step before.
struct RecurrentStep {
  int t, rows, started;
  int64_t at, before;  // first row of this step, and of the one before
};

__device__ __forceinline__ int rows_at(const RecurrentShape& s, int t) {
  if (t < 0 || t >= s.steps) return 0;
  return s.sizes == nullptr ? s.batch : static_cast<int>(s.sizes[t]);
}

__device__ __forceinline__ int64_t first_row(const RecurrentShape& s, int t) {
  return s.offsets == nullptr ? int64_t{t} * s.batch : s.offsets[t];
}

__device__ __forceinline__ RecurrentStep step_of(const RecurrentShape& s, int number, bool down) {
  RecurrentStep step;
  step.t = down ? s.steps - 1 - number : number;
  step.rows = rows_at(s, step.t);
  step.at = first_row(s, step.t);
  const int before = down ? step.t + 1 : step.t - 1;
  step.started = 0;
  step.before = 0;
  if (number == 0) return step;
  step.started = rows_at(s, before);
  step.before = first_row(s, before);
  return step;
}

// All blocks of the group have done `count` steps.
__device__ __forceinline__ void wait_for_group(unsigned* arrived, unsigned count, int blocks) {
  __syncthreads();
  if (threadIdx.x == 0) {
    add_released(arrived);
    while (load_acquired(arrived) < count * static_cast<unsigned>(blocks)) pause_briefly();
  }
  __syncthreads();
}

template <typename T>
__device__ __forceinline__ float value_at(const void* p, int64_t at) {
  return p == nullptr ? 0.0f : to_float(static_cast<const T*>(p)[at]);
}

template <typename T>
__device__ __forceinline__ void put(void* p, int64_t at, float value) {
  static_cast<T*>(p)[at] = from_float<T>(value);
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
  const int warps = blockDim.x / 32, stride = s.at_once + 1;
  const int gates = s.cell == RecurrentCell::kLstm ? 4 : s.cell == RecurrentCell::kGru ? 3 : 1;
  const T* w = static_cast<const T*>(s.w);
  T* y = static_cast<T*>(p.y);

  RecurrentProduct<T, R, D> product;
  product.load_weights([&](int row, int k) {
    const int gate = row / s.units, u = row % s.units;
    if (gate >= gates || u >= units || k >= hidden) return from_float<T>(0.0f);
    return w[(int64_t{gate} * hidden + unit0 + u) * s.w_stride[0] + k * s.w_stride[1]];
  });

  for (int number = 0; number < s.steps; ++number) {
    const RecurrentStep step = step_of(s, number, s.reverse);
    const int last = step.rows - group0 < s.group_rows ? step.rows - group0 : s.group_rows;
    const bool any = number > 0 || p.h0 != nullptr;
    for (int b0 = 0; b0 < last; b0 += s.at_once) {
      const int count = last - b0 < s.at_once ? last - b0 : s.at_once;
      const int first = group0 + b0;
      if (any) {
        product.multiply(
            [&](int n) -> const T* {
              if (first + n < step.started) return y + (step.before + first + n) * hidden;
              if (p.h0 == nullptr) return nullptr;
              return static_cast<const T*>(p.h0) + int64_t{first + n} * hidden;
            },
            count, hidden, partial, stride);
      }
      __syncthreads();
      for (int i = threadIdx.x; i < units * count; i += blockDim.x) {
        const int u = i % units, n = i / units, b = first + n;
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int g = 0; g < 4; ++g) {
          if (g >= gates || !any) continue;
          for (int v = 0; v < warps; ++v) sum[g] += partial[(v * R + g * s.units + u) * stride + n];
        }
        const int64_t row = step.at + b, unit = unit0 + u, state = int64_t{b} * hidden + unit;
        const int64_t in = row * gates * hidden + unit;
        const bool started = b < step.started;
        float h;
        if (gates == 1) {
          h = value_at<T>(p.projected, in) + sum[0];
          h = s.cell == RecurrentCell::kTanh ? tanhf(h) : (h < 0.0f ? 0.0f : h);
        } else if (gates == 4) {
          const float before = started ? p.c[state] : value_at<T>(p.c0, state);
          const float i_gate = sigmoid(value_at<T>(p.projected, in) + sum[0]);
          const float f = sigmoid(value_at<T>(p.projected, in + hidden) + sum[1]);
          const float g = tanhf(value_at<T>(p.projected, in + 2 * hidden) + sum[2]);
          const float o = sigmoid(value_at<T>(p.projected, in + 3 * hidden) + sum[3]);
          const float c = f * before + i_gate * g;
          h = o * tanhf(c);
          p.c[state] = c;
          if (p.gates != nullptr) {
            const int64_t at = row * 4 * hidden + unit;
            put<T>(p.gates, at, i_gate);
            put<T>(p.gates, at + hidden, f);
            put<T>(p.gates, at + 2 * hidden, g);
            put<T>(p.gates, at + 3 * hidden, o);
            put<T>(p.cells, row * hidden + unit, c);
          }
        } else {
          const float before = started ? p.h[state] : value_at<T>(p.h0, state);
          const float r = sigmoid(value_at<T>(p.projected, in) + sum[0]);
          const float z = sigmoid(value_at<T>(p.projected, in + hidden) + sum[1]);
          const float from_state = sum[2] + value_at<T>(p.hidden_bias, unit);
          const float n_gate = tanhf(value_at<T>(p.projected, in + 2 * hidden) + r * from_state);
          h = (1.0f - z) * n_gate + z * before;
          if (p.gates != nullptr) {
            const int64_t at = row * 4 * hidden + unit;
            put<T>(p.gates, at, r);
            put<T>(p.gates, at + hidden, z);
            put<T>(p.gates, at + 2 * hidden, n_gate);
            put<T>(p.gates, at + 3 * hidden, from_state);
          }
        }
        p.h[state] = h;
        put<T>(y, row * hidden + unit, h);
      }
      __syncthreads();
    }
    if (number + 1 < s.steps) {
      wait_for_group(s.arrived + blockIdx.y, number + 1, s.unit_blocks);
    }
  }
  // By the threads that wrote them: rows are walked as above, from the same first row.
  const int rows = s.batch - group0 < s.group_rows ? s.batch - group0 : s.group_rows;
  for (int b0 = 0; b0 < rows; b0 += s.at_once) {
    const int count = rows - b0 < s.at_once ? rows - b0 : s.at_once;
    for (int i = threadIdx.x; i < units * count; i += blockDim.x) {
      const int64_t state = int64_t{group0 + b0 + i / units} * hidden + unit0 + i % units;
      put<T>(p.h_n, state, p.h[state]);
      if (gates == 4) put<T>(p.c_n, state, p.c[state]);
    }
  }
}

template <typename T, int R, int D>
__global__ void __launch_bounds__(kRecurrentMaxWarps * 32, 1)
    recurrent_bwd_kernel(const __grid_constant__ RecurrentBwd p) {
  float* partial = static_cast<float*>(dynamic_shared());
  const RecurrentShape& s = p.s;
  const int hidden = s.hidden, unit0 = blockIdx.x * s.units;
  const int units = s.units < hidden - unit0 ? s.units : hidden - unit0;
  const int group0 = blockIdx.y * s.group_rows;
  const int warps = blockDim.x / 32, stride = s.at_once + 1;
  const bool lstm = s.cell == RecurrentCell::kLstm, gru = s.cell == RecurrentCell::kGru;
  const int gradients = lstm || gru ? 4 : 1;
  const int depth = (lstm ? 4 : gru ? 3 : 1) * hidden;
  const T* w = static_cast<const T*>(s.w);
  T* dgates = static_cast<T*>(p.dgates);

  // The matrix transposed. The GRU's gradients lie with n in front of r and z.
  RecurrentProduct<T, R, D> product;
  product.load_weights([&](int row, int k) {
    if (row >= units || k >= depth) return from_float<T>(0.0f);
    const int from = !gru ? k : k < hidden ? k + 2 * hidden : k - hidden;
    return w[from * s.w_stride[0] + (unit0 + row) * s.w_stride[1]];
  });

  for (int number = 0; number < s.steps; ++number) {
    const RecurrentStep step = step_of(s, number, !s.reverse);
    const int earlier = s.reverse ? step.t + 1 : step.t - 1;  // in the order of the forward
    const int earlier_rows = rows_at(s, earlier);
    const int64_t earlier_at = earlier_rows > 0 ? first_row(s, earlier) : 0;
    const int last = step.rows - group0 < s.group_rows ? step.rows - group0 : s.group_rows;
    for (int b0 = 0; b0 < last; b0 += s.at_once) {
      const int count = last - b0 < s.at_once ? last - b0 : s.at_once;
      const int first = group0 + b0;
      if (number > 0) {
        product.multiply(
            [&](int n) -> const T* {
              if (first + n >= step.started) return nullptr;
              return dgates + (step.before + first + n) * gradients * hidden;
            },
            count, depth, partial, stride);
      }
      __syncthreads();
      for (int i = threadIdx.x; i < units * count; i += blockDim.x) {
        const int u = i % units, n = i / units, b = first + n;
        const int64_t row = step.at + b, unit = unit0 + u, state = int64_t{b} * hidden + unit;
        const int64_t at = row * hidden + unit, out = row * gradients * hidden + unit;
        const bool started = b < step.started;
        float dh = value_at<T>(p.dy, at);
        if (started) {
          float sum = 0.0f;
          for (int v = 0; v < warps; ++v) sum += partial[(v * R + u) * stride + n];
          dh += sum;
        } else {
          dh += value_at<T>(p.dh_n, state);
        }
        const bool has_earlier = b < earlier_rows;
        const int64_t earlier_row = (earlier_at + b) * hidden + unit;
        if (gradients == 1) {
          const float y = value_at<T>(p.y, at);
          const bool tanh = s.cell == RecurrentCell::kTanh;
          put<T>(dgates, out, tanh ? dh * (1.0f - y * y) : (y > 0.0f ? dh : 0.0f * dh));
          continue;
        }
        const int64_t kept = row * 4 * hidden + unit;
        const float g0 = value_at<T>(p.gates, kept), g1 = value_at<T>(p.gates, kept + hidden);
        const float g2 = value_at<T>(p.gates, kept + 2 * hidden);
        const float g3 = value_at<T>(p.gates, kept + 3 * hidden);
        float carry = started ? p.carry[state] : 0.0f;
        if (lstm) {
          if (!started) carry = value_at<T>(p.dc_n, state);
          const float before =
              has_earlier ? value_at<T>(p.cells, earlier_row) : value_at<T>(p.c0, state);
          const float c = tanhf(value_at<T>(p.cells, at));
          const float dc = carry + dh * g3 * (1.0f - c * c);
          put<T>(dgates, out, dc * g2 * g0 * (1.0f - g0));
          put<T>(dgates, out + hidden, dc * before * g1 * (1.0f - g1));
          put<T>(dgates, out + 2 * hidden, dc * g0 * (1.0f - g2 * g2));
          put<T>(dgates, out + 3 * hidden, dh * c * g3 * (1.0f - g3));
          p.carry[state] = dc * g1;
        } else {
          // g0 reset, g1 update, g2 new, g3 the state's share of new before the reset.
          dh += carry;
          const float before =
              has_earlier ? value_at<T>(p.y, earlier_row) : value_at<T>(p.h0, state);
          const float dn = dh * (1.0f - g1) * (1.0f - g2 * g2);
          put<T>(dgates, out, dn * g0);
          put<T>(dgates, out + hidden, dn * g3 * g0 * (1.0f - g0));
          put<T>(dgates, out + 2 * hidden, dh * (before - g2) * g1 * (1.0f - g1));
          put<T>(dgates, out + 3 * hidden, dn);
          p.carry[state] = dh * g1;
        }
      }
      __syncthreads();
    }
    if (number + 1 < s.steps) {
      wait_for_group(s.arrived + blockIdx.y, number + 1, s.unit_blocks);
    }
  }
  if (p.carry == nullptr) return;
  const int rows = s.batch - group0 < s.group_rows ? s.batch - group0 : s.group_rows;
  for (int b0 = 0; b0 < rows; b0 += s.at_once) {
    const int count = rows - b0 < s.at_once ? rows - b0 : s.at_once;
    for (int i = threadIdx.x; i < units * count; i += blockDim.x) {
      const int64_t state = int64_t{group0 + b0 + i / units} * hidden + unit0 + i % units;
      put<T>(p.carry_last, state, p.carry[state]);
    }
  }
}

}  // namespace lmfast::gpu
