// The CUDA kernels of rms_norm against double precision, with the launcher's block shapes.
#include "cuda_on_host.h"
// After the shim, which replaces what CUDA's keywords mean.
#include "check.h"
#include "csrc/cuda/kernels/rms_norm.cuh"

namespace lmfast::gpu {
namespace {

using cuda_on_host::Index;
using cuda_on_host::launch;

constexpr float kEps = 1e-5f;

// `heads` x `tokens` rows seen transposed: two dimensions that do not merge, padded between rows.
RowLayout layout(int heads, int tokens, int width, int padding) {
  RowLayout rows;
  const int64_t stride = width + padding;
  rows.ndim = 2;
  rows.count = int64_t{heads} * tokens;
  rows.size[0] = heads;
  rows.size[1] = tokens;
  for (int operand = 0; operand < 4; ++operand) {
    rows.stride[operand][0] = stride;
    rows.stride[operand][1] = stride * heads;
  }
  return rows;
}

template <typename T, typename W, int N>
void check_forward(int heads, int tokens, int width, bool residual, bool weighted) {
  const std::string what = "forward width " + std::to_string(width) + " vector " +
                           std::to_string(N) + " size " + std::to_string(sizeof(T));
  RmsNormFwd p{};
  p.rows = layout(heads, tokens, width, N);
  p.width = width;
  p.eps = kEps;
  const size_t size = static_cast<size_t>(heads) * tokens * (width + N);
  const auto x = random_values<T>(size, 1), r = random_values<T>(size, 2);
  const auto w = random_values<W>(width, 3);
  std::vector<T> y(size, from_float<T>(NAN)), sum(size, from_float<T>(NAN));
  p.x = x.data();
  p.y = y.data();
  p.weight = weighted ? w.data() : nullptr;
  if (residual) {
    p.residual = r.data();
    p.sum = sum.data();
  }
  const BlockShape block = rms_norm_block(width / N, kMaxFwdThreads);
  const unsigned blocks = (heads * tokens + block.rows - 1) / block.rows;
  launch(rms_norm_fwd_kernel<T, W, N>, {blocks},
         {unsigned(block.threads_per_row), unsigned(block.rows)}, p);
  for (int64_t row = 0; row < p.rows.count; ++row) {
    const int64_t at = row_offset(p.rows, 0, row);
    std::vector<double> h(width);
    double squares = 0.0;
    for (int c = 0; c < width; ++c) {
      h[c] = to_float(x[at + c]);
      if (residual) {
        expect(sum[at + c], h[c] + to_float(r[at + c]), 0.0, what + " sum");
        h[c] = to_float(sum[at + c]);
      }
      squares += h[c] * h[c];
    }
    const double scale = 1.0 / std::sqrt(squares / width + kEps);
    for (int c = 0; c < width; ++c) {
      expect(y[at + c], h[c] * scale * (weighted ? to_float(w[c]) : 1.0), 1.0, what);
    }
  }
}

template <typename T, typename W, int N>
void check_backward(int heads, int tokens, int width, unsigned most_blocks, bool with_dsum) {
  const std::string what = "backward width " + std::to_string(width) + " vector " +
                           std::to_string(N) + " size " + std::to_string(sizeof(T));
  RmsNormBwd p{};
  p.rows = layout(heads, tokens, width, N);
  p.width = width;
  p.eps = kEps;
  const size_t size = static_cast<size_t>(heads) * tokens * (width + N);
  const auto x = random_values<T>(size, 1), dy = random_values<T>(size, 2);
  const auto dsum = random_values<T>(size, 3);
  const auto w = random_values<W>(width, 4);
  std::vector<T> dx(size, from_float<T>(NAN));
  const BlockShape block = rms_norm_block(width / N, kMaxBwdThreads);
  const unsigned needed = (heads * tokens + block.rows - 1) / block.rows;
  const unsigned blocks = needed < most_blocks ? needed : most_blocks;
  std::vector<float> partial(static_cast<size_t>(blocks) * width, NAN);
  std::vector<W> dweight(width, from_float<W>(NAN));
  p.x = x.data();
  p.dy = dy.data();
  p.dsum = with_dsum ? dsum.data() : nullptr;
  p.weight = w.data();
  p.dx = dx.data();
  p.partial = partial.data();
  launch(rms_norm_bwd_kernel<T, W, N>, {blocks},
         {unsigned(block.threads_per_row), unsigned(block.rows)}, p);
  const unsigned columns = (width + kSumColumns - 1) / kSumColumns;
  launch(add_partial_rows_kernel<W>, {columns}, {kSumColumns, kSumSlices}, partial.data(),
         dweight.data(), int(blocks), width);

  std::vector<double> expected(width);
  for (int64_t row = 0; row < p.rows.count; ++row) {
    const int64_t at = row_offset(p.rows, 0, row);
    double squares = 0.0, product = 0.0;
    for (int c = 0; c < width; ++c) {
      const double h = to_float(x[at + c]);
      squares += h * h;
      product += h * to_float(dy[at + c]) * to_float(w[c]);
    }
    const double scale = 1.0 / std::sqrt(squares / width + kEps);
    for (int c = 0; c < width; ++c) {
      const double h = to_float(x[at + c]), g = to_float(dy[at + c]);
      expected[c] += g * h * scale;
      const double slope = product * scale / width;
      const double more = with_dsum ? to_float(dsum[at + c]) : 0.0;
      expect(dx[at + c], scale * (g * to_float(w[c]) - h * scale * slope) + more, 4.0,
             what + " dx");
    }
  }
  for (int c = 0; c < width; ++c) {
    expect(dweight[c], expected[c], heads * tokens, what + " dweight");
  }
}

template <typename T, typename W>
void check_types() {
  constexpr int kFull = kFullVector<T>;
  check_forward<T, W, kFull>(3, 7, 8 * kFull, false, true);    // 8 threads a row
  check_forward<T, W, kFull>(2, 3, 33 * kFull, true, true);    // 16 threads, some with less
  check_forward<T, W, kFull>(2, 1, 300 * kFull, true, false);  // 96 threads
  check_forward<T, W, 1>(3, 3, 5, true, true);                 // shorter than a row's threads
  check_forward<T, W, 1>(1, 2, 769, false, true);
  check_backward<T, W, kFull>(3, 37, 8 * kFull, 3, false);
  check_backward<T, W, kFull>(2, 5, 33 * kFull, 2, true);
  check_backward<T, W, kFull>(3, 3, 300 * kFull, 2, true);
  check_backward<T, W, 1>(3, 21, 5, 2, true);
  check_backward<T, W, 1>(1, 5, 769, 2, false);
}

// Rows longer than the threads keep: the rest is read again.
void check_long_rows() {
  check_forward<float, float, 1>(1, 1, kMaxFwdThreads * kKept + 35, true, true);
  check_backward<float, float, 1>(3, 1, kMaxBwdThreads * kKept + 35, 2, true);
}

}  // namespace
}  // namespace lmfast::gpu

// With an argument: one type and no rows of a thousand threads, for the slow ThreadSanitizer.
int main(int argc, char**) {
  using namespace lmfast::gpu;
  check_types<f16, float>();
  if (argc == 1) {
    check_types<float, float>();
    check_types<bf16, bf16>();
    check_long_rows();
  }
  std::puts("rms_norm kernels agree with double precision");
}
