// What a group of lanes of cached_attention keeps while it walks keys, and how vectors get into and
// out of a cache: rotated, rounded.
#pragma once

#include "cached_attention.h"
#include "device.cuh"

namespace lmfast::gpu {

constexpr float kLog2E = 1.4426950408889634f;
// Vectors smaller than this are stored as zeros in int8: their inverse could overflow.
constexpr float kSmallestScaled = 1e-30f;

// int8 has a scale per vector; all floats stand for themselves.
template <typename S>
constexpr bool kHasScales = std::is_same<S, int8_t>::value;

// What a group of lanes knows of the keys it has seen, for M query rows: each thread its elements.
template <int M, int E>
struct CacheState {
  float q[M][E];
  float acc[M][E];
  float top[M];     // in base 2; -inf: no key yet
  float total[M];   // sum of 2^(score - top)
  int position[M];  // of the row's token; below every key for a row that is not there
  float slope[M];
};

__device__ __forceinline__ float finite_or_zero(float x) { return x == -INFINITY ? 0.0f : x; }

// The greater one, or NaN if either is.
__device__ __forceinline__ float greater_or_nan(float a, float b) {
  if (a != a) return a;
  return a >= b ? a : b;
}

// Joins sums over `added` to those over the state's own keys.
template <int M, int E>
__device__ __forceinline__ void join(CacheState<M, E>& s, int m, float top, float total,
                                     const float* acc) {
  const float shift = finite_or_zero(fmaxf(s.top[m], top));
  const float mine = exp2f(s.top[m] - shift), theirs = exp2f(top - shift);
  s.top[m] = fmaxf(s.top[m], top);
  s.total[m] = s.total[m] * mine + total * theirs;
#pragma unroll
  for (int e = 0; e < E; ++e) s.acc[m][e] = s.acc[m][e] * mine + acc[e] * theirs;
}

// Element d of the vector x, rotated for `position`.
template <typename T>
__device__ __forceinline__ float rotated(const T* x, int d, const CacheAppend& a,
                                         int64_t position) {
  const float here = to_float(x[d]);
  if (a.cos == nullptr || d >= a.rotary) return here;
  if (position < 0 || position >= a.table_rows) return nanf("");
  const int half = a.rotary / 2;
  const int pair = a.interleaved ? d / 2 : d % half;
  const bool second = a.interleaved ? d % 2 == 1 : d >= half;
  const int distance = a.interleaved ? 1 : half;
  const float there = to_float(x[second ? d - distance : d + distance]);
  const float c = a.cos[position * half + pair], s = a.sin[position * half + pair];
  return second ? there * s + here * c : here * c - there * s;
}

// Rounds a vector as the cache stores it; returns its scale, 1 for storage without scales.
template <typename S, int N, int P>
__device__ __forceinline__ float rounded(const float (&x)[P * N], int lanes, Pack<S, N> (&out)[P]) {
  if constexpr (!kHasScales<S>) {
#pragma unroll
    for (int e = 0; e < P * N; ++e) out[e / N].at[e % N] = from_float<S>(x[e]);
    return 1.0f;
  } else {
    float top[1] = {0.0f};
#pragma unroll
    for (int e = 0; e < P * N; ++e) top[0] = greater_or_nan(top[0], fabsf(x[e]));
    for (int step = lanes / 2; step > 0; step /= 2) {
      float other[1];
      from_lane_across(top, step, other);
      top[0] = greater_or_nan(top[0], other[0]);
    }
    const bool finite = top[0] <= 3.4028235e38f;
    const float inverse = !finite || top[0] < kSmallestScaled ? 0.0f : 127.0f / top[0];
#pragma unroll
    for (int e = 0; e < P * N; ++e) {
      out[e / N].at[e % N] = static_cast<int8_t>(finite ? rintf(x[e] * inverse) : 0.0f);
    }
    if (!finite) return nanf("");
    return top[0] < kSmallestScaled ? 0.0f : top[0] / 127.0f;
  }
}

}  // namespace lmfast::gpu
