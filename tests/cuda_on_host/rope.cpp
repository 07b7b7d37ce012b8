// The CUDA kernel of rope against double precision.
#include "cuda_on_host.h"
// After the shim, which replaces what CUDA's keywords mean.
#include "check.h"
#include "csrc/cuda/kernels/rope.cuh"

namespace lmfast::gpu {
namespace {

using cuda_on_host::launch;

constexpr int kBatch = 2, kLength = 3, kTableRows = 9;

struct Case {
  int q_heads, k_heads, head_dim, rotary;
  bool interleaved, inverse, inplace;
  enum { kOffset, kStarts, kPerToken } positions;
};

// (B, T, H, D) in memory, seen as (B, H, T, D).
RopeOperand operand(const void* in, void* out, int heads, int head_dim) {
  RopeOperand o{in, out, heads, {}, {}};
  for (int64_t* stride : {o.in_stride, o.out_stride}) {
    stride[0] = int64_t{kLength} * heads * head_dim;
    stride[1] = head_dim;
    stride[2] = int64_t{heads} * head_dim;
  }
  return o;
}

template <typename T>
void compare(const Case& c, const std::vector<T>& in, const std::vector<T>& out, int heads,
             const std::vector<float>& cos, const std::vector<float>& sin,
             const std::vector<int64_t>& positions, const std::string& what) {
  const int half = c.rotary / 2;
  for (int b = 0; b < kBatch; ++b) {
    for (int t = 0; t < kLength; ++t) {
      const int64_t position = positions[b * kLength + t];
      const bool known = position >= 0 && position < kTableRows;
      for (int h = 0; h < heads; ++h) {
        const size_t row = (size_t(b * kLength + t) * heads + h) * c.head_dim;
        for (int d = 0; d < c.head_dim; ++d) {
          const T found = out[row + d];
          if (!known) {
            if (!std::isnan(to_float(found))) expect(found, NAN, 0.0, what + " past the tables");
            continue;
          }
          if (d >= c.rotary) {
            expect(found, to_float(in[row + d]), 0.0, what + " rest of the head");
            continue;
          }
          const int pair = c.interleaved ? d / 2 : d % half;
          const bool second = c.interleaved ? d % 2 == 1 : d >= half;
          const double a = to_float(in[row + (c.interleaved ? 2 * pair : pair)]);
          const double e = to_float(in[row + (c.interleaved ? 2 * pair + 1 : pair + half)]);
          const double co = cos[position * half + pair];
          const double si = sin[position * half + pair] * (c.inverse ? -1.0 : 1.0);
          expect(found, second ? a * si + e * co : a * co - e * si, 0.1, what);
        }
      }
    }
  }
}

template <typename T, int N>
void check(const Case& c, unsigned shares) {
  const std::string what = "rope head " + std::to_string(c.head_dim) + " rotary " +
                           std::to_string(c.rotary) + " vector " + std::to_string(N);
  const size_t tokens = size_t{kBatch} * kLength;
  const auto q = random_values<T>(tokens * c.q_heads * c.head_dim, 1);
  const auto k = random_values<T>(tokens * c.k_heads * c.head_dim, 2);
  const auto cos = random_values<float>(size_t(kTableRows) * c.rotary / 2, 3);
  const auto sin = random_values<float>(size_t(kTableRows) * c.rotary / 2, 4);
  auto q_out = q, k_out = k;
  if (!c.inplace) {
    q_out.assign(q.size(), from_float<T>(NAN));
    k_out.assign(k.size(), from_float<T>(NAN));
  }
  Rope p{};
  p.q = operand(c.inplace ? q_out.data() : q.data(), q_out.data(), c.q_heads, c.head_dim);
  p.k = operand(c.inplace ? k_out.data() : k.data(), k_out.data(), c.k_heads, c.head_dim);
  p.cos = cos.data();
  p.sin = sin.data();
  p.table_rows = kTableRows;
  p.length = kLength;
  p.head_dim = c.head_dim;
  p.rotary = c.rotary;
  p.inverse = c.inverse;
  p.inplace = c.inplace;
  std::vector<int64_t> given, all;
  if (c.positions == Case::kOffset) {
    p.offset = 4;
    for (int i = 0; i < kBatch * kLength; ++i) all.push_back(4 + i % kLength);
  } else if (c.positions == Case::kStarts) {
    given = {kTableRows - 2, -1};  // the last token of the first, the first of the second are out
    for (int i = 0; i < kBatch * kLength; ++i) all.push_back(given[i / kLength] + i % kLength);
  } else {
    given = all = {8, 0, 3, 3, kTableRows, 1};
    p.per_token = true;
  }
  p.positions = given.empty() ? nullptr : given.data();
  const unsigned vectors = rope_vectors(p, N, c.interleaved);
  const unsigned x = vectors < 32 ? vectors : 32;
  const auto kernel = c.interleaved ? rope_kernel<T, N, true> : rope_kernel<T, N, false>;
  launch(kernel, {unsigned(tokens), shares}, {x, 2}, p);
  compare(c, q, q_out, c.q_heads, cos, sin, all, what + " q");
  compare(c, k, k_out, c.k_heads, cos, sin, all, what + " k");
}

template <typename T>
void check_type() {
  constexpr int kFull = kFullVector<T>;
  for (const bool interleaved : {false, true}) {
    check<T, kFull>({4, 2, 8 * kFull, 8 * kFull, interleaved, false, false, Case::kOffset}, 1);
    check<T, kFull>({3, 1, 6 * kFull, 2 * kFull, interleaved, true, false, Case::kStarts}, 2);
    check<T, kFull>({5, 5, 4 * kFull, 2 * kFull, interleaved, false, true, Case::kPerToken}, 3);
    check<T, 1>({3, 2, 11, 6, interleaved, false, true, Case::kStarts}, 1);
    check<T, 1>({2, 1, 90, 80, interleaved, true, false, Case::kPerToken}, 1);
  }
}

}  // namespace
}  // namespace lmfast::gpu

int main() {
  using namespace lmfast::gpu;
  check_type<float>();
  check_type<bf16>();
  check_type<f16>();
  std::puts("rope kernel agrees with double precision");
}
