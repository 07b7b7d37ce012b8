// Rotary position embedding on an NVIDIA GPU: queries and keys in one launch.
//
// Floor: bytes; q and k are read and written once. A block takes one token and all heads, or a
// share of them when there are few tokens: threadIdx.x counts the vectors of a head, threadIdx.y
// the heads. A thread keeps the cosines and sines of its vector in registers and walks the heads,
// so the tables are read once per token. A vector holds N first and N second elements of pairs
// (half layout) or N / 2 neighbouring pairs (interleaved). In place, a thread writes only what it
// has read itself.
#pragma once

#include "device.cuh"

namespace lmfast::gpu {

constexpr int kRopeThreads = 256;

struct RopeOperand {
  const void* in;
  void* out;
  int heads;
  int64_t in_stride[3], out_stride[3];  // batch, head, token
};

struct Rope {
  RopeOperand q, k;
  const float* cos;
  const float* sin;
  const int64_t* positions;  // null: token t is at offset + t
  int64_t offset;
  int64_t table_rows;
  int length, head_dim, rotary;
  bool per_token;  // positions are (B, T), not (B,)
  bool inverse;
  bool inplace;
};

// Vectors of n elements a head is walked in.
inline int rope_vectors(const Rope& p, int n, bool interleaved) {
  const int pairs = interleaved && n > 1 ? n / 2 : n;
  return p.rotary / 2 / pairs + (p.head_dim - p.rotary) / n;
}

// The rotated vector that starts at element `at` of a head.
template <typename T, int N, bool kInterleaved>
__device__ __forceinline__ void rotate(const T* in, T* out, int at, int half, const float (&cos)[N],
                                       const float (&sin)[N]) {
  if constexpr (kInterleaved && N == 1) {
    const float a = to_float(in[at]), b = to_float(in[at + 1]);
    out[at] = from_float<T>(a * cos[0] - b * sin[0]);
    out[at + 1] = from_float<T>(a * sin[0] + b * cos[0]);
  } else if constexpr (kInterleaved) {
    Pack<T, N> x = load<T, N>(in + at);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const float a = to_float(x.at[2 * i]), b = to_float(x.at[2 * i + 1]);
      x.at[2 * i] = from_float<T>(a * cos[i] - b * sin[i]);
      x.at[2 * i + 1] = from_float<T>(a * sin[i] + b * cos[i]);
    }
    store<T, N>(out + at, x);
  } else {
    Pack<T, N> x = load<T, N>(in + at), y = load<T, N>(in + half + at);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float a = to_float(x.at[i]), b = to_float(y.at[i]);
      x.at[i] = from_float<T>(a * cos[i] - b * sin[i]);
      y.at[i] = from_float<T>(a * sin[i] + b * cos[i]);
    }
    store<T, N>(out + at, x);
    store<T, N>(out + half + at, y);
  }
}

template <typename T, int N>
__device__ __forceinline__ void pass_through(const T* in, T* out, int at, bool known,
                                             bool inplace) {
  if (known && inplace) return;
  Pack<T, N> x;
  if (known) {
    x = load<T, N>(in + at);
  } else {
#pragma unroll
    for (int e = 0; e < N; ++e) x.at[e] = from_float<T>(nanf(""));
  }
  store<T, N>(out + at, x);
}

// gridDim = (B * T, shares of the heads). N > 1 needs operands and tables aligned to their vectors,
// and N to divide the rotating half (interleaved: the rotating part) and the rest of a head.
template <typename T, int N, bool kInterleaved>
__global__ void __launch_bounds__(kRopeThreads) rope_kernel(const __grid_constant__ Rope p) {
  const int64_t batch = blockIdx.x / p.length;
  const int token = blockIdx.x % p.length;
  int64_t position = p.offset + token;
  if (p.positions != nullptr) {
    position = p.per_token ? p.positions[batch * p.length + token] : p.positions[batch] + token;
  }
  // The host cannot look at positions without waiting for them: a row past the tables becomes NaN.
  const bool known = position >= 0 && position < p.table_rows;
  const int half = p.rotary / 2;
  constexpr int kPairs = kInterleaved && N > 1 ? N / 2 : N;
  const int rotating = half / kPairs;
  const int vectors = rotating + (p.head_dim - p.rotary) / N;
  const int heads = p.q.heads + p.k.heads;
  for (int v = threadIdx.x; v < vectors; v += blockDim.x) {
    float cos[N], sin[N];
    if (v < rotating) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i) cos[i] = sin[i] = nanf("");
      if (known) {
        const auto c = load<float, kPairs>(p.cos + position * half + v * kPairs);
        const auto s = load<float, kPairs>(p.sin + position * half + v * kPairs);
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          cos[i] = c.at[i];
          sin[i] = p.inverse ? -s.at[i] : s.at[i];
        }
      }
    }
    for (int h = blockIdx.y * blockDim.y + threadIdx.y; h < heads; h += gridDim.y * blockDim.y) {
      const bool of_q = h < p.q.heads;
      const RopeOperand& x = of_q ? p.q : p.k;
      const int head = of_q ? h : h - p.q.heads;
      const T* in = static_cast<const T*>(x.in) + batch * x.in_stride[0] + head * x.in_stride[1] +
                    token * x.in_stride[2];
      T* out = static_cast<T*>(x.out) + batch * x.out_stride[0] + head * x.out_stride[1] +
               token * x.out_stride[2];
      if (v < rotating) {
        rotate<T, N, kInterleaved>(in, out, v * kPairs * (kInterleaved ? 2 : 1), half, cos, sin);
      } else {
        pass_through<T, N>(in, out, p.rotary + (v - rotating) * N, known, p.inplace);
      }
    }
  }
}

}  // namespace lmfast::gpu
