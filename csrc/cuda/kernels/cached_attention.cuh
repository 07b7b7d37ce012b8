// Attention of few new tokens on a cache of keys and values: decoding on an NVIDIA GPU.
//
// Floor: the bytes of keys and values, once. A block takes one batch row, one key head and one part
// of the keys; the query rows that share the key head (the heads of a group, times new tokens) sit
// in its registers, so each key is read once for all of them. `lanes` threads share a key, each
// with one vector of 16 bytes (8 of 8-bit storage) of it and of every query row; a warp holds 32 /
// lanes keys side by side, and each group of lanes keeps kCacheKeysAtOnce keys and values under
// way: 16 KB a block, which covers the memory's latency with two blocks per multiprocessor. Per
// element of a key that is one conversion and one multiply-add per query row, a quarter of the
// units' rate at one row and two thirds at four (16 bit). With eight rows arithmetic would be the
// bound, and the state spills: beyond four the Triton kernel, on the matrix units, takes over.
// Where tokens are appended on the way, and the keys are few enough to stay in L2, up to eight rows
// are divided between two blocks instead: the second reads from L2, and one launch does what takes
// Triton three.
//
// Softmax runs online, in base 2, per group of lanes; groups, warps and parts are joined by the
// same rule, so a part without a key weighs nothing. The parts are cut from the keys a row really
// has, at the device: a long empty cache costs nothing and the host never waits for a length.
//
// Appending on the way: the last part also takes the new tokens, rotates them, rounds them as the
// cache stores them, attends to what was rounded, and stores it. No other part reads them, so there
// is nothing to wait for: one launch in place of three (rotate, store, attend).
#pragma once

#include "cache_state.cuh"
#include "cached_attention.h"

namespace lmfast::gpu {

// Takes U keys into the state. `hidden[u]`: the group has no such key.
template <typename S, int N, int P, int M, int U>
__device__ __forceinline__ void attend(const CachedAttention& p, CacheState<M, P * N>& state,
                                       const Pack<S, N> (&k)[U][P], const Pack<S, N> (&v)[U][P],
                                       const int (&key)[U], const bool (&hidden)[U],
                                       const bool (&lost)[U], const float (&key_scale)[U],
                                       const float (&value_scale)[U]) {
  float s[U * M];
#pragma unroll
  for (int u = 0; u < U; ++u) {
#pragma unroll
    for (int m = 0; m < M; ++m) s[u * M + m] = 0.0f;
#pragma unroll
    for (int i = 0; i < P; ++i) {
      float x[N];
      widen(k[u][i], x);
#pragma unroll
      for (int e = 0; e < N; ++e) {
#pragma unroll
        for (int m = 0; m < M; ++m) s[u * M + m] += x[e] * state.q[m][i * N + e];
      }
    }
  }
  sum_over_lanes(s, p.lanes);
#pragma unroll
  for (int u = 0; u < U; ++u) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      float& score = s[u * M + m];
      score *= key_scale[u] * p.scale;
      if (p.softcap > 0.0f) score = p.softcap * tanhf(score / p.softcap);
      const int distance = key[u] - state.position[m];
      score = (score + state.slope[m] * static_cast<float>(distance)) * kLog2E;
      if (lost[u]) score = nanf("");
      const bool beyond = p.window > 0 && distance <= -p.window;
      if (hidden[u] || distance > 0 || beyond) score = -INFINITY;
    }
  }
#pragma unroll
  for (int m = 0; m < M; ++m) {
    float top = state.top[m];
#pragma unroll
    for (int u = 0; u < U; ++u) top = fmaxf(top, s[u * M + m]);
    const float shift = finite_or_zero(top), correction = exp2f(state.top[m] - shift);
    state.top[m] = top;
    state.total[m] *= correction;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      float& weight = s[u * M + m];
      weight = exp2f(weight - shift);
      state.total[m] += weight;
      weight *= value_scale[u];
    }
#pragma unroll
    for (int e = 0; e < P * N; ++e) state.acc[m][e] *= correction;
  }
#pragma unroll
  for (int u = 0; u < U; ++u) {
#pragma unroll
    for (int i = 0; i < P; ++i) {
      float x[N];
      widen(v[u][i], x);
#pragma unroll
      for (int e = 0; e < N; ++e) {
#pragma unroll
        for (int m = 0; m < M; ++m) state.acc[m][i * N + e] += s[u * M + m] * x[e];
      }
    }
  }
}

// The storage row of a key, or -1 if the table names one that is not there.
__device__ __forceinline__ int storage_row(const CachedAttention& p, int batch, int key) {
  if (p.table == nullptr) return batch;
  const int entry = p.table[batch * p.table_stride + key / kTableBlock];
  return entry >= 0 && entry < p.stored_rows ? entry : -1;
}

// What a row's sum over values, taken at `top`, is multiplied by: one over its sum of weights, the
// sink's included.
__device__ __forceinline__ float whole_weight(float top, float total, const float* sinks,
                                              int head) {
  if (total == 0.0f) return 0.0f;
  if (sinks == nullptr) return 1.0f / total;
  const float sink = sinks[head] * kLog2E;
  const float shift = fmaxf(top, sink);
  const float mine = exp2f(top - shift);
  return mine / (total * mine + exp2f(sink - shift));
}

// gridDim = (B * Hkv, splits, rows / M, rounded up). N elements of S a vector, P vectors of a key
// per thread.
template <typename T, typename S, int N, int P, int M>
__global__ void __launch_bounds__(kCacheThreads, 2)
    cached_attention_kernel(const __grid_constant__ CachedAttention p) {
  constexpr int kWarps = kCacheThreads / 32, kElements = P * N;
  __shared__ float shared_acc[kWarps][M][kCacheMaxHeadDim];
  __shared__ float shared_top[kWarps][M], shared_total[kWarps][M];

  const int batch = blockIdx.x / p.kv_heads, kv_head = blockIdx.x % p.kv_heads;
  const int part = blockIdx.y;
  const int lane = threadIdx.x % p.lanes, group = threadIdx.x / p.lanes;
  const int groups = kCacheThreads / p.lanes;
  const int group_heads = p.heads / p.kv_heads;
  const int first_row = blockIdx.z * M, all_rows = p.tokens * group_heads;
  const int rows = all_rows - first_row < M ? all_rows - first_row : M;
  const int64_t length = p.lengths[batch];
  // Never beyond the storage: the host cannot look at lengths without waiting for them.
  const int limit = static_cast<int>(length < p.capacity ? (length > 0 ? length : 0) : p.capacity);
  const int start = limit - p.tokens;
  const bool appending = p.append.k != nullptr;
  const bool full = appending && length > p.capacity;

  CacheState<M, kElements> state;
#pragma unroll
  for (int m = 0; m < M; ++m) {
    state.top[m] = -INFINITY;
    state.total[m] = 0.0f;
    const bool there = m < rows;
    const int row = there ? first_row + m : 0;
    const int token = row / group_heads, head = kv_head * group_heads + row % group_heads;
    state.position[m] = there ? start + token : -1;
    state.slope[m] = p.alibi != nullptr ? p.alibi[head] : 0.0f;
    const T* q = static_cast<const T*>(p.q) + batch * p.q_stride[0] + head * p.q_stride[1] +
                 token * p.q_stride[2];
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const int d = (e / N * p.lanes + lane) * N + e % N;
      state.acc[m][e] = 0.0f;
      // Rounded to T, as the operator that rotates by itself leaves it.
      state.q[m][e] = there && d < p.head_dim
                          ? to_float(from_float<T>(rotated(q, d, p.append, state.position[m])))
                          : 0.0f;
    }
  }

  // The keys that are stored already and that some row sees, and of those this part's share.
  const int stored = appending ? (start > 0 ? start : 0) : limit;
  int low = p.window > 0 && start - p.window + 1 > 0 ? start - p.window + 1 : 0;
  const int at_once = groups * kCacheKeysAtOnce;
  const int all = stored > low ? stored - low : 0;
  const int share = ((all + p.splits - 1) / p.splits + at_once - 1) / at_once * at_once;
  low += part * share;
  const int high = low + share < stored ? low + share : stored;
  const S* keys = static_cast<const S*>(p.keys) + kv_head * p.key_stride[1];
  const S* values = static_cast<const S*>(p.values) + kv_head * p.value_stride[1];
  for (int first = low; first < high; first += at_once) {
    Pack<S, N> k[kCacheKeysAtOnce][P], v[kCacheKeysAtOnce][P];
    float key_scale[kCacheKeysAtOnce], value_scale[kCacheKeysAtOnce];
    int key[kCacheKeysAtOnce];
    bool hidden[kCacheKeysAtOnce], lost[kCacheKeysAtOnce];
#pragma unroll
    for (int u = 0; u < kCacheKeysAtOnce; ++u) {
      key[u] = first + u * groups + group;
      hidden[u] = key[u] >= high;
      const int row = hidden[u] ? 0 : storage_row(p, batch, key[u]);
      lost[u] = row < 0 || full;
      const int64_t r = row < 0 ? 0 : row, column = hidden[u] ? 0 : key[u];
      const S* from = keys + r * p.key_stride[0] + column * p.key_stride[2];
      const S* value_from = values + r * p.value_stride[0] + column * p.value_stride[2];
#pragma unroll
      for (int i = 0; i < P; ++i) {
        const int d = (i * p.lanes + lane) * N;
        k[u][i] = v[u][i] = Pack<S, N>{};
        if (hidden[u] || d >= p.head_dim) continue;
        k[u][i] = load<S, N>(from + d);
        v[u][i] = load<S, N>(value_from + d);
      }
      key_scale[u] = value_scale[u] = 1.0f;
      if (kHasScales<S> && !hidden[u]) {
        key_scale[u] =
            p.key_scales[r * p.key_scale_stride[0] + kv_head * p.key_scale_stride[1] + column];
        value_scale[u] = p.value_scales[r * p.value_scale_stride[0] +
                                        kv_head * p.value_scale_stride[1] + column];
      }
    }
    attend<S, N, P, M, kCacheKeysAtOnce>(p, state, k, v, key, hidden, lost, key_scale, value_scale);
  }

  if (appending && part == p.splits - 1) {
    for (int first = 0; first < p.tokens; first += groups) {
      const int token = first + group;
      const int key[1] = {start + token};
      const bool hidden[1] = {token >= p.tokens || key[0] < 0};
      const int row = hidden[0] ? 0 : storage_row(p, batch, key[0]);
      const bool lost[1] = {row < 0 || full};
      const int64_t t = hidden[0] ? 0 : token;
      const T* new_k = static_cast<const T*>(p.append.k) + batch * p.append.k_stride[0] +
                       kv_head * p.append.k_stride[1] + t * p.append.k_stride[2];
      const T* new_v = static_cast<const T*>(p.append.v) + batch * p.append.v_stride[0] +
                       kv_head * p.append.v_stride[1] + t * p.append.v_stride[2];
      float x[kElements], y[kElements];
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const int d = (e / N * p.lanes + lane) * N + e % N;
        const bool inside = !hidden[0] && d < p.head_dim;
        x[e] = inside ? rotated(new_k, d, p.append, key[0]) : 0.0f;
        y[e] = inside ? to_float(new_v[d]) : 0.0f;
      }
      Pack<S, N> k[1][P], v[1][P];
      const float key_scale[1] = {rounded<S, N, P>(x, p.lanes, k[0])};
      const float value_scale[1] = {rounded<S, N, P>(y, p.lanes, v[0])};
      if (!hidden[0] && !lost[0] && first_row == 0) {
        S* to = static_cast<S*>(p.keys) + row * p.key_stride[0] + kv_head * p.key_stride[1] +
                key[0] * p.key_stride[2];
        S* value_to = static_cast<S*>(p.values) + row * p.value_stride[0] +
                      kv_head * p.value_stride[1] + key[0] * p.value_stride[2];
#pragma unroll
        for (int i = 0; i < P; ++i) {
          const int d = (i * p.lanes + lane) * N;
          if (d >= p.head_dim) continue;
          store<S, N>(to + d, k[0][i]);
          store<S, N>(value_to + d, v[0][i]);
        }
        if (kHasScales<S> && lane == 0) {
          p.key_scales[row * p.key_scale_stride[0] + kv_head * p.key_scale_stride[1] + key[0]] =
              key_scale[0];
          p.value_scales[row * p.value_scale_stride[0] + kv_head * p.value_scale_stride[1] +
                         key[0]] = value_scale[0];
        }
      }
      attend<S, N, P, M, 1>(p, state, k, v, key, hidden, lost, key_scale, value_scale);
    }
  }

  // Groups of a warp, then warps.
#pragma unroll
  for (int m = 0; m < M; ++m) {
    for (int step = p.lanes; step < 32; step *= 2) {
      float mine[kElements + 2], other[kElements + 2];
      mine[kElements] = state.top[m];
      mine[kElements + 1] = state.total[m];
#pragma unroll
      for (int e = 0; e < kElements; ++e) mine[e] = state.acc[m][e];
      from_lane_across(mine, step, other);
      join(state, m, other[kElements], other[kElements + 1], other);
    }
  }
  const int warp = threadIdx.x / 32;
  if (static_cast<int>(threadIdx.x % 32) < p.lanes) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const int d = (e / N * p.lanes + lane) * N + e % N;
        if (d < p.head_dim) shared_acc[warp][m][d] = state.acc[m][e];
      }
      if (lane == 0) {
        shared_top[warp][m] = state.top[m];
        shared_total[warp][m] = state.total[m];
      }
    }
  }
  __syncthreads();
  for (int at = threadIdx.x; at < rows * p.head_dim; at += kCacheThreads) {
    const int m = at / p.head_dim, d = at % p.head_dim;
    float top = -INFINITY, total = 0.0f, sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, shared_top[w][m]);
    const float shift = finite_or_zero(top);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float weight = exp2f(shared_top[w][m] - shift);
      total += shared_total[w][m] * weight;
      sum += shared_acc[w][m][d] * weight;
    }
    const int of_group = first_row + m, token = of_group / group_heads;
    const int head = kv_head * group_heads + of_group % group_heads;
    if (p.parts == nullptr) {
      T* out = static_cast<T*>(p.out) + batch * p.out_stride[0] + head * p.out_stride[1] +
               token * p.out_stride[2];
      const float weight = whole_weight(top, total, p.sinks, head);
      out[d] = from_float<T>(total == 0.0f ? 0.0f : sum * weight);
      continue;
    }
    const int64_t row = (int64_t{batch} * p.heads + head) * p.tokens + token;
    p.parts[(row * p.splits + part) * p.head_dim + d] = sum;
    if (d == 0) {
      p.sums[(row * p.splits + part) * 2] = top;
      p.sums[(row * p.splits + part) * 2 + 1] = total;
    }
  }
}

// One block per row (batch, head, token): the parts, weighted by what each has seen.
template <typename T>
__global__ void __launch_bounds__(kCacheMaxHeadDim)
    cached_attention_join_kernel(const __grid_constant__ CachedAttention p) {
  const int64_t row = blockIdx.x;
  const int token = row % p.tokens, head = row / p.tokens % p.heads;
  const int64_t batch = row / p.tokens / p.heads;
  const float* sums = p.sums + row * p.splits * 2;
  float top = -INFINITY;
  for (int i = 0; i < p.splits; ++i) top = fmaxf(top, sums[2 * i]);
  const float shift = finite_or_zero(top);
  T* out = static_cast<T*>(p.out) + batch * p.out_stride[0] + head * p.out_stride[1] +
           token * p.out_stride[2];
  for (int d = threadIdx.x; d < p.head_dim; d += blockDim.x) {
    float total = 0.0f, sum = 0.0f;
    for (int i = 0; i < p.splits; ++i) {
      const float weight = exp2f(sums[2 * i] - shift);
      total += sums[2 * i + 1] * weight;
      sum += p.parts[(row * p.splits + i) * p.head_dim + d] * weight;
    }
    const float weight = whole_weight(top, total, p.sinks, head);
    out[d] = from_float<T>(total == 0.0f ? 0.0f : sum * weight);
  }
}

}  // namespace lmfast::gpu
