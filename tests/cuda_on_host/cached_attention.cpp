// The CUDA kernels of cached_attention, appending or not, against double precision.
#include "cuda_on_host.h"
// After the shim, which replaces what CUDA's keywords mean.
#include "check.h"
#include "csrc/cuda/kernels/cached_attention.cuh"

namespace lmfast::gpu {
namespace {

using cuda_on_host::launch;

struct Case {
  int heads, kv_heads, tokens, head_dim, capacity;
  std::vector<int64_t> lengths;  // of each batch row
  int splits, window;
  bool paged, appended, interleaved, options;
};

constexpr int kTableRows = 400;

// Storage (R, Hkv, C, D) with the head dimension padded, and where key j of a row lies.
template <typename S>
struct Storage {
  int rows, kv_heads, capacity, stride;
  std::vector<S> keys, values;
  std::vector<float> key_scales, value_scales;
  std::vector<int> table;
  int blocks;

  size_t at(int batch, int head, int key) const {
    const int row = table.empty() ? batch : table[batch * blocks + key / kTableBlock];
    return (size_t(row) * kv_heads + head) * capacity + key;
  }
};

template <typename S>
std::vector<S> stored_values(size_t count, unsigned seed) {
  if constexpr (!kHasScales<S>) {
    return random_values<S>(count, seed);
  } else {
    std::vector<S> codes(count);
    const auto source = random_values<float>(count, seed);
    for (size_t i = 0; i < count; ++i) codes[i] = static_cast<S>(source[i] * 60.0f);
    return codes;
  }
}

template <typename T>
double rotated_exactly(const T* x, int d, const CacheAppend& a, int64_t position) {
  if (a.cos == nullptr || d >= a.rotary) return to_float(x[d]);
  const int half = a.rotary / 2, pair = a.interleaved ? d / 2 : d % half;
  const int first = a.interleaved ? 2 * pair : pair, second = first + (a.interleaved ? 1 : half);
  const double c = a.cos[position * half + pair], s = a.sin[position * half + pair];
  const double x1 = to_float(x[first]), x2 = to_float(x[second]);
  return d == first ? x1 * c - x2 * s : x1 * s + x2 * c;
}

template <typename T, typename S, int N, int P, int M>
void check(const Case& c) {
  const int batch = int(c.lengths.size()), group = c.heads / c.kv_heads, dim = c.head_dim;
  const std::string what = "head " + std::to_string(dim) + " tokens " + std::to_string(c.tokens) +
                           " vector " + std::to_string(N) + " stored " + std::to_string(sizeof(S));
  Storage<S> st{batch + 1, c.kv_heads, c.capacity, dim + N, {}, {}, {}, {}, {}, 0};
  const size_t vectors = size_t(st.rows) * c.kv_heads * c.capacity;
  st.keys = stored_values<S>(vectors * st.stride, 1);
  st.values = stored_values<S>(vectors * st.stride, 2);
  st.key_scales = random_values<float>(vectors, 3);
  st.value_scales = random_values<float>(vectors, 4);
  for (float& s : st.key_scales) s = (std::fabs(s) + 0.1f) / 60.0f;
  for (float& s : st.value_scales) s = (std::fabs(s) + 0.1f) / 60.0f;
  st.blocks = (c.capacity + kTableBlock - 1) / kTableBlock;
  if (c.paged) {
    // Block 0 of all rows may be shared, but not where they append.
    for (int b = 0; b < batch; ++b) {
      for (int j = 0; j < st.blocks; ++j) st.table.push_back(j == 0 && !c.appended ? 0 : b + 1);
    }
  }
  const auto q = random_values<T>(size_t(batch) * c.tokens * c.heads * dim, 5);
  const auto k = random_values<T>(size_t(batch) * c.tokens * c.kv_heads * dim, 6);
  const auto v = random_values<T>(size_t(batch) * c.tokens * c.kv_heads * dim, 7);
  const int rotary = dim > 4 ? dim / 4 * 2 : 0;
  auto cos = random_values<float>(size_t(kTableRows) * rotary / 2, 8), sin = cos;
  for (size_t i = 0; i < cos.size(); ++i) {
    sin[i] = std::sin(cos[i] * 3.0f);
    cos[i] = std::cos(cos[i] * 3.0f);
  }
  const auto sinks = random_values<float>(c.heads, 9);
  auto alibi = random_values<float>(c.heads, 10);
  for (float& slope : alibi) slope = std::fabs(slope) / 8.0f;
  std::vector<T> out(q.size(), from_float<T>(NAN));

  CachedAttention p{};
  p.q = q.data();
  p.keys = st.keys.data();
  p.values = st.values.data();
  p.out = out.data();
  p.lengths = c.lengths.data();
  p.table = c.paged ? st.table.data() : nullptr;
  p.table_stride = st.blocks;
  p.key_scales = kHasScales<S> ? st.key_scales.data() : nullptr;
  p.value_scales = kHasScales<S> ? st.value_scales.data() : nullptr;
  for (int64_t* stride : {p.q_stride, p.out_stride}) {  // (B, T, H, D) in memory
    stride[0] = int64_t{c.tokens} * c.heads * dim;
    stride[1] = dim;
    stride[2] = int64_t{c.heads} * dim;
  }
  for (int64_t* stride : {p.append.k_stride, p.append.v_stride}) {
    stride[0] = int64_t{c.tokens} * c.kv_heads * dim;
    stride[1] = dim;
    stride[2] = int64_t{c.kv_heads} * dim;
  }
  for (int64_t* stride : {p.key_stride, p.value_stride}) {
    stride[0] = int64_t{c.kv_heads} * c.capacity * st.stride;
    stride[1] = int64_t{c.capacity} * st.stride;
    stride[2] = st.stride;
  }
  for (int64_t* stride : {p.key_scale_stride, p.value_scale_stride}) {
    stride[0] = int64_t{c.kv_heads} * c.capacity;
    stride[1] = c.capacity;
  }
  p.heads = c.heads;
  p.kv_heads = c.kv_heads;
  p.tokens = c.tokens;
  p.head_dim = dim;
  p.capacity = c.capacity;
  p.stored_rows = st.rows;
  p.window = c.window;
  p.splits = c.splits;
  p.lanes = cache_lanes(dim, N);
  p.scale = 0.25f;
  if (c.options) {
    p.softcap = 3.0f;
    p.sinks = sinks.data();
    p.alibi = alibi.data();
  }
  if (c.appended) {
    p.append.k = k.data();
    p.append.v = v.data();
    p.append.cos = rotary > 0 ? cos.data() : nullptr;
    p.append.sin = sin.data();
    p.append.table_rows = kTableRows;
    p.append.rotary = rotary;
    p.append.interleaved = c.interleaved;
  }
  const int rows = batch * c.heads * c.tokens;
  std::vector<float> parts(size_t(rows) * c.splits * dim, NAN), sums(size_t(rows) * c.splits * 2);
  if (c.splits > 1) {
    p.parts = parts.data();
    p.sums = sums.data();
  }
  const unsigned row_blocks = unsigned(c.tokens * group + M - 1) / M;
  launch(cached_attention_kernel<T, S, N, P, M>,
         {unsigned(batch * c.kv_heads), unsigned(c.splits), row_blocks}, {kCacheThreads}, p);
  if (c.splits > 1) launch(cached_attention_join_kernel<T>, {unsigned(rows)}, {32}, p);

  // What was stored, then attention over what is stored.
  const auto scale_of = [&](const std::vector<float>& scales, size_t at) {
    return kHasScales<S> ? double(scales[at]) : 1.0;
  };
  for (int b = 0; b < batch; ++b) {
    const int start = int(c.lengths[b]) - c.tokens;
    for (int h = 0; c.appended && h < c.kv_heads; ++h) {
      for (int t = 0; t < c.tokens; ++t) {
        if (start + t < 0) continue;
        const size_t at = st.at(b, h, start + t);
        const T* new_k = &k[(size_t(b * c.tokens + t) * c.kv_heads + h) * dim];
        const T* new_v = &v[(size_t(b * c.tokens + t) * c.kv_heads + h) * dim];
        double top_k = 0.0;
        for (int d = 0; d < dim; ++d) {
          top_k = std::fmax(top_k, std::fabs(rotated_exactly(new_k, d, p.append, start + t)));
        }
        for (int d = 0; d < dim; ++d) {
          const double exact_k = rotated_exactly(new_k, d, p.append, start + t);
          const double found_k = to_float(st.keys[at * st.stride + d]);
          const double found_v = to_float(st.values[at * st.stride + d]);
          if constexpr (kHasScales<S>) {
            const double unit = st.key_scales[at];
            expect(float(unit * 127.0), top_k, 1.0, what + " stored scale");
            if (std::fabs(found_k * unit - exact_k) > 0.51 * unit) {
              expect(float(found_k * unit), exact_k, 0.0, what + " stored code");
            }
          } else {
            // Below 1/64 eight-bit floats are 1/512 apart.
            const double apart = std::is_same<S, e4m3>::value ? 100.0 : 1.0;
            expect(from_float<S>(float(found_k)), exact_k, apart, what + " stored key");
            const S value = from_float<S>(to_float(new_v[d]));
            expect(float(found_v), to_float(value), 0.0, what + " stored value");
          }
        }
      }
    }
    for (int h = 0; h < c.heads; ++h) {
      for (int t = 0; t < c.tokens; ++t) {
        const size_t row = (size_t(b * c.tokens + t) * c.heads + h) * dim;
        const int position = start + t;
        const int low = c.window > 0 ? std::max(0, position - c.window + 1) : 0;
        std::vector<double> score;
        double top = c.options ? sinks[h] : -INFINITY;
        for (int j = low; j <= position; ++j) {
          const size_t at = st.at(b, h / group, j);
          double s = 0.0;
          for (int d = 0; d < dim; ++d) {
            const double query =
                to_float(from_float<T>(float(rotated_exactly(&q[row], d, p.append, position))));
            s += query * to_float(st.keys[at * st.stride + d]);
          }
          s *= p.scale * scale_of(st.key_scales, at);
          if (c.options) s = p.softcap * std::tanh(s / p.softcap) + alibi[h] * (j - position);
          score.push_back(s);
          top = std::fmax(top, s);
        }
        double total = c.options ? std::exp(sinks[h] - top) : 0.0;
        for (double& s : score) total += s = std::exp(s - top);
        for (int d = 0; d < dim; ++d) {
          double sum = 0.0;
          for (int j = low; j <= position; ++j) {
            const size_t at = st.at(b, h / group, j);
            sum += score[j - low] * to_float(st.values[at * st.stride + d]) *
                   scale_of(st.value_scales, at);
          }
          // A query rounded one unit apart moves scores of up to 40 by a few units of T.
          const double slack = c.appended && sizeof(T) == 2 ? 2000.0 * kHalfUnit<T> : 1.0;
          expect(out[row + d], score.empty() ? 0.0 : sum / total, slack, what);
        }
      }
    }
  }
}

// The nearest of the numbers there are, of two the one with an even code; 448 for what is beyond,
// NaN for what is not finite. Numbers between all neighbours, at their middles and beside them.
void check_rounding() {
  const auto value = [](int code) {  // of 0 <= code < 127: four bits of exponent, three of fraction
    const int exponent = code >> 3, fraction = code & 7;
    return exponent == 0 ? fraction * 0x1p-9 : (8 + fraction) * std::ldexp(1.0, exponent - 10);
  };
  for (int code = 0; code < 127; ++code) {
    for (const int sign : {0, 128}) {
      e4m3 stored;
      stored.__x = static_cast<__nv_fp8_storage_t>(code | sign);
      expect(to_float(stored), sign != 0 ? -value(code) : value(code), 0.0, "widened");
      const double middle = code < 126 ? (value(code) + value(code + 1)) / 2 : 1e30;
      const float above = std::nextafter(float(middle), 1e38f);
      const float below = code < 126 ? std::nextafter(float(middle), 0.0f) : 1e30f;
      const int of_middle = code < 126 ? code + code % 2 : 126;
      const int of_above = code < 126 ? code + 1 : 126;
      for (const auto& [x, wanted] : {std::pair<float, int>{float(value(code)), code},
                                      {below, code},
                                      {float(middle), of_middle},
                                      {above, of_above}}) {
        const int found = from_float<e4m3>(sign != 0 ? -x : x).__x;
        expect(float(found), wanted | sign, 0.0, "rounded " + std::to_string(x));
      }
    }
  }
  for (const float x : {INFINITY, -INFINITY, NAN}) {
    expect(float(from_float<e4m3>(x).__x & 127), 127.0, 0.0, "not finite");
  }
}

// A row of the table that is not there, and a cache that is full, give NaN; nothing is stored.
void check_lost() {
  const std::vector<float> q(8, 1.0f), k(8, 1.0f);
  std::vector<float> keys(2 * 128 * 8, 1.0f), values = keys, out(16, 0.0f);
  const std::vector<int> table = {0, 7, 1, 1};
  const std::vector<int64_t> lengths = {70, 129};
  CachedAttention p{};
  p.q = q.data();
  p.keys = keys.data();
  p.values = values.data();
  p.out = out.data();
  p.lengths = lengths.data();
  p.table = table.data();
  p.table_stride = 2;
  p.out_stride[0] = 8;
  for (int64_t* stride : {p.key_stride, p.value_stride}) {
    stride[0] = stride[1] = 128 * 8;
    stride[2] = 8;
  }
  p.heads = p.kv_heads = p.tokens = 1;
  p.head_dim = 8;
  p.capacity = 128;
  p.stored_rows = 2;
  p.splits = 1;
  p.lanes = 2;
  p.scale = 1.0f;
  p.append.k = p.append.v = k.data();
  launch(cached_attention_kernel<float, float, 4, 1, 1>, {2, 1}, {kCacheThreads}, p);
  for (const float x : out) {
    if (!std::isnan(x)) expect(x, NAN, 0.0, "lost");
  }
  for (const float x : keys) expect(x, 1.0, 0.0, "untouched");
}

void check_all(bool quick) {
  // heads, kv_heads, tokens, head_dim, capacity, lengths, splits, window, paged, appended, ...
  check<bf16, bf16, 8, 1, 4>({4, 2, 2, 64, 150, {131, 1}, 2, 0, true, true, false, true});
  check<f16, int8_t, 8, 1, 4>({3, 1, 1, 40, 90, {80, 0}, 1, 50, false, true, true, false});
  check<bf16, e4m3, 8, 1, 4>({4, 2, 2, 64, 150, {131, 1}, 2, 0, true, true, false, true});
  check<bf16, int8_t, 8, 1, 4>({7, 1, 1, 64, 90, {85, 1}, 2, 0, true, true, true, true});
  if (quick) return;
  check<f16, f16, 8, 1, 4>({8, 2, 2, 32, 140, {131, 1}, 2, 30, false, true, false, true});
  check<f16, e4m3, 8, 1, 1>({2, 2, 1, 24, 130, {129, 4}, 1, 9, false, true, true, false});
  check<float, e4m3, 1, 8, 4>({2, 1, 2, 7, 80, {66, 2}, 2, 0, true, true, true, true});
  check<float, float, 4, 2, 1>({2, 2, 1, 256, 70, {69}, 1, 0, false, false, false, false});
  check<float, float, 4, 1, 4>({2, 1, 2, 24, 200, {150, 2, 64}, 3, 0, true, true, true, true});
  check<float, int8_t, 8, 1, 1>({2, 2, 1, 16, 130, {129}, 2, 0, true, false, false, true});
  check<bf16, bf16, 8, 1, 1>({1, 1, 1, 128, 60, {60, 7}, 1, 5, false, false, false, false});
  check<f16, f16, 1, 8, 4>({4, 1, 1, 33, 40, {40, 3}, 1, 0, false, true, false, true});
  check<bf16, int8_t, 1, 8, 4>({2, 2, 3, 7, 80, {66, 2}, 2, 7, true, true, false, false});
}

}  // namespace
}  // namespace lmfast::gpu

// With an argument: a few cases, for the slow ThreadSanitizer.
int main(int argc, char**) {
  using namespace lmfast::gpu;
  check_all(argc > 1);
  check_lost();
  check_rounding();
  std::puts("cached_attention kernels agree with double precision");
}
