// lmfast::cached_attention and decode_attention on the GPU: checks, launches, registration.
#include <algorithm>
#include <cmath>
#include <optional>

#include "kernels/cached_attention.cuh"
#include "launch.h"

namespace lmfast::gpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::empty_like;
using torch::stable::new_empty;
using torch::stable::accelerator::DeviceGuard;
using Optional = std::optional<Tensor>;

struct Call {
  CachedAttention p{};
  bool vectors = true;  // every operand can be read in vectors
};

void check_on(const Tensor& t, const Tensor& q, const char* name) {
  LMFAST_CHECK(t.is_cuda() && t.get_device_index() == q.get_device_index(), name,
               " must be on q's GPU");
}

template <int kCount>
void strides_of(const Tensor& t, int64_t (&stride)[kCount]) {
  for (int d = 0; d < kCount; ++d) stride[d] = t.stride(d);
}

const float* per_head(const Optional& t, const Tensor& q, const char* name) {
  if (!t.has_value()) return nullptr;
  check_on(*t, q, name);
  LMFAST_CHECK(t->scalar_type() == ScalarType::Float && t->dim() == 1 && t->is_contiguous() &&
                   t->size(0) == q.size(1),
               name, " must be a contiguous float32 vector with one number per head");
  return static_cast<const float*>(t->const_data_ptr());
}

float* scales_of(const Optional& scales, const Tensor& keys, int64_t (&stride)[2],
                 const char* name) {
  const bool int8 = keys.scalar_type() == ScalarType::Char;
  LMFAST_CHECK(scales.has_value() == int8, name, " are for int8 storage, and needed there");
  if (!int8) return nullptr;
  check_gpu_rows(*scales, keys, name);
  LMFAST_CHECK(scales->scalar_type() == ScalarType::Float && scales->dim() == 3 &&
                   scales->size(0) == keys.size(0) && scales->size(1) == keys.size(1) &&
                   scales->size(2) == keys.size(2),
               name, " must be float32 with the storage's shape (R, Hkv, C)");
  strides_of(*scales, stride);
  return static_cast<float*>(scales->mutable_data_ptr());
}

// Checks what both operators share, and fills everything but the appended tokens.
Call describe(const Tensor& q, const Tensor& keys, const Tensor& values, const Tensor& lengths,
              const Optional& table, const Optional& key_scales, const Optional& value_scales,
              std::optional<int64_t> window, std::optional<double> softcap, const Optional& sinks,
              const Optional& alibi, std::optional<double> scale, const Tensor& out,
              int64_t most_rows) {
  Call call;
  CachedAttention& p = call.p;
  const DType dtype = dtype_of(q, "q");
  LMFAST_CHECK(q.dim() == 4 && keys.dim() == 4 && values.dim() == 4,
               "q, keys and values must have 4 dimensions");
  check_gpu_rows(q, q, "q");
  check_gpu_rows(keys, q, "keys");
  check_gpu_rows(values, q, "values");
  check_same_shape(keys, values, "keys", "values");
  LMFAST_CHECK(keys.scalar_type() == values.scalar_type(), "values must have keys' dtype");
  const bool int8 = keys.scalar_type() == ScalarType::Char;
  LMFAST_CHECK(
      int8 || keys.scalar_type() == ScalarType::Float8_e4m3fn || dtype_of(keys, "keys") == dtype,
      "keys must have q's dtype or be int8 or float8_e4m3fn");
  LMFAST_CHECK(keys.size(3) == q.size(3) && keys.size(1) > 0 && q.size(1) % keys.size(1) == 0,
               "the heads of q must be a multiple of those of keys, of one size");
  LMFAST_CHECK(q.size(2) * (q.size(1) / keys.size(1)) <= most_rows &&
                   q.size(3) <= kCacheMaxHeadDim && q.size(0) * keys.size(1) < (int64_t{1} << 31) &&
                   keys.size(2) < (1 << 30),
               "more query rows per key head, or larger heads, than the kernel takes");
  check_on(lengths, q, "lengths");
  LMFAST_CHECK(lengths.scalar_type() == ScalarType::Long && lengths.dim() == 1 &&
                   lengths.size(0) == q.size(0) && lengths.is_contiguous(),
               "lengths must be a contiguous int64 vector with one number per row");
  p.heads = static_cast<int>(q.size(1));
  p.kv_heads = static_cast<int>(keys.size(1));
  p.tokens = static_cast<int>(q.size(2));
  p.head_dim = static_cast<int>(q.size(3));
  p.capacity = static_cast<int>(keys.size(2));
  p.stored_rows = static_cast<int>(keys.size(0));
  p.q = q.const_data_ptr();
  p.keys = keys.mutable_data_ptr();
  p.values = values.mutable_data_ptr();
  p.out = out.mutable_data_ptr();
  p.lengths = static_cast<const int64_t*>(lengths.const_data_ptr());
  strides_of(q, p.q_stride);
  strides_of(out, p.out_stride);
  strides_of(keys, p.key_stride);
  strides_of(values, p.value_stride);
  p.key_scales = scales_of(key_scales, keys, p.key_scale_stride, "key_scales");
  p.value_scales = scales_of(value_scales, values, p.value_scale_stride, "value_scales");
  if (table.has_value()) {
    check_on(*table, q, "table");
    LMFAST_CHECK(table->scalar_type() == ScalarType::Int && table->dim() == 2 &&
                     table->is_contiguous() && table->size(0) == q.size(0) &&
                     table->size(1) >= (keys.size(2) + kTableBlock - 1) / kTableBlock,
                 "table must be contiguous int32 of shape (B, ceil(C / 64))");
    p.table = static_cast<const int*>(table->const_data_ptr());
    p.table_stride = table->size(1);
  } else {
    LMFAST_CHECK(keys.size(0) == q.size(0), "without a table keys must have q's rows");
  }
  LMFAST_CHECK(window.value_or(0) >= 0, "window must not be negative");
  p.window = static_cast<int>(std::min<int64_t>(window.value_or(0), 1 << 30));
  p.softcap = static_cast<float>(softcap.value_or(0.0));
  p.scale = static_cast<float>(scale.value_or(1.0 / std::sqrt(std::max(1, p.head_dim))));
  p.sinks = per_head(sinks, q, "sinks");
  p.alibi = per_head(alibi, q, "alibi");
  call.vectors = aligned({&keys, &values});
  return call;
}

// Calls launch(number of elements per vector, vectors per thread) as integral constants.
template <typename S, typename Launch>
void with_vectors(const Call& call, int head_dim, Launch launch) {
  constexpr int kVector = sizeof(S) == 4 ? 4 : 8;
  if (!call.vectors || head_dim % kVector != 0) {
    launch(std::integral_constant<int, 1>{}, std::integral_constant<int, kCacheMaxHeadDim / 32>{});
  } else if (head_dim <= 32 * kVector) {
    launch(std::integral_constant<int, kVector>{}, std::integral_constant<int, 1>{});
  } else {
    launch(std::integral_constant<int, kVector>{},
           std::integral_constant<int, kCacheMaxHeadDim / (32 * kVector)>{});
  }
}

template <typename T, typename S>
void launch(Call& call, int64_t batch, cudaStream_t stream) {
  CachedAttention& p = call.p;
  const int rows = p.tokens * (p.heads / p.kv_heads);
  const dim3 grid(static_cast<unsigned>(batch * p.kv_heads), p.splits,
                  (rows + kCacheMaxRows - 1) / kCacheMaxRows);
  with_vectors<S>(call, p.head_dim, [&](auto n, auto per_thread) {
    p.lanes = cache_lanes(p.head_dim, n);
    const auto run = [&](auto m) {
      cached_attention_kernel<T, S, n, per_thread, m><<<grid, kCacheThreads, 0, stream>>>(p);
    };
    // The scalar way is for odd sizes: one kernel for any number of rows.
    if constexpr (n == 1) {
      run(std::integral_constant<int, kCacheMaxRows>{});
    } else if (rows == 1) {
      run(std::integral_constant<int, 1>{});
    } else {
      run(std::integral_constant<int, kCacheMaxRows>{});
    }
  });
  check_launch("cached_attention_kernel");
  if (p.splits == 1) return;
  const unsigned all = static_cast<unsigned>(batch * p.heads * p.tokens);
  const int threads = std::min(kCacheMaxHeadDim, (p.head_dim + 31) / 32 * 32);
  cached_attention_join_kernel<T><<<all, threads, 0, stream>>>(p);
  check_launch("cached_attention_join_kernel");
}

void run(Call& call, const Tensor& q, const Tensor& keys) {
  CachedAttention& p = call.p;
  const int64_t batch = q.size(0);
  if (batch == 0 || p.heads == 0 || p.tokens == 0 || p.head_dim == 0) return;
  const DeviceGuard guard(q.get_device_index());
  const cudaStream_t stream = current_stream(q);
  p.splits = cache_splits(batch * p.kv_heads, multiprocessors(), p.capacity);
  const int64_t parts = p.splits > 1 ? batch * p.heads * p.tokens * p.splits : 0;
  Tensor part = new_empty(q, {parts, p.head_dim}, ScalarType::Float);
  Tensor sums = new_empty(q, {parts, 2}, ScalarType::Float);
  if (parts > 0) {
    p.parts = static_cast<float*>(part.mutable_data_ptr());
    p.sums = static_cast<float*>(sums.mutable_data_ptr());
  }
  with_type(dtype_of(q, "q"), [&](auto t) {
    using T = typename decltype(t)::type;
    if (keys.scalar_type() == ScalarType::Char) {
      launch<T, int8_t>(call, batch, stream);
    } else if (keys.scalar_type() == ScalarType::Float8_e4m3fn) {
      launch<T, e4m3>(call, batch, stream);
    } else {
      launch<T, T>(call, batch, stream);
    }
  });
}

Tensor cached_attention(const Tensor& q, const Tensor& keys, const Tensor& values,
                        const Tensor& lengths, const Optional& table, const Optional& key_scales,
                        const Optional& value_scales, std::optional<int64_t> window,
                        std::optional<double> softcap, const Optional& sinks, const Optional& alibi,
                        std::optional<double> scale) {
  Tensor out = empty_like(q);
  Call call = describe(q, keys, values, lengths, table, key_scales, value_scales, window, softcap,
                       sinks, alibi, scale, out, kCacheMaxRows);
  run(call, q, keys);
  return out;
}

const void* check_new(const Tensor& t, const Tensor& q, const Tensor& keys, int64_t (&stride)[3],
                      const char* name) {
  check_gpu_rows(t, q, name);
  LMFAST_CHECK(t.scalar_type() == q.scalar_type() && t.dim() == 4 && t.size(0) == q.size(0) &&
                   t.size(1) == keys.size(1) && t.size(2) == q.size(2) && t.size(3) == q.size(3),
               name, " must be (B, Hkv, T, D) in q's dtype");
  strides_of(t, stride);
  return t.const_data_ptr();
}

Tensor decode_attention(const Tensor& q, const Tensor& k, const Tensor& v, Tensor keys,
                        Tensor values, std::optional<Tensor> key_scales,
                        std::optional<Tensor> value_scales, const Tensor& lengths,
                        const Optional& table, const Optional& cos, const Optional& sin,
                        bool interleaved, std::optional<int64_t> window,
                        std::optional<double> softcap, const Optional& sinks, const Optional& alibi,
                        std::optional<double> scale) {
  Tensor out = empty_like(q);
  Call call = describe(q, keys, values, lengths, table, key_scales, value_scales, window, softcap,
                       sinks, alibi, scale, out, kAppendMaxRows);
  CacheAppend& a = call.p.append;
  a.k = check_new(k, q, keys, a.k_stride, "k");
  a.v = check_new(v, q, keys, a.v_stride, "v");
  a.interleaved = interleaved;
  LMFAST_CHECK(cos.has_value() == sin.has_value(), "cos and sin go together");
  if (cos.has_value()) {
    check_same_shape(*cos, *sin, "cos", "sin");
    for (const Tensor* t : {&*cos, &*sin}) {
      check_on(*t, q, "cos and sin");
      LMFAST_CHECK(t->scalar_type() == ScalarType::Float && t->dim() == 2 && t->is_contiguous() &&
                       2 * t->size(1) <= q.size(3),
                   "cos and sin must be contiguous float32 tables of at most half a head's size");
    }
    a.cos = static_cast<const float*>(cos->const_data_ptr());
    a.sin = static_cast<const float*>(sin->const_data_ptr());
    a.table_rows = cos->size(0);
    a.rotary = static_cast<int>(2 * cos->size(1));
  }
  run(call, q, keys);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmfast, CUDA, m) {
  m.impl("cached_attention", TORCH_BOX(&cached_attention));
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
}

}  // namespace lmfast::gpu
