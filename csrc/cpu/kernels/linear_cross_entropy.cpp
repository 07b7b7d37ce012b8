// Linear cross-entropy with fp32 products: logits, their exponentials and both gradients, a block
// of tokens at a time.
//
// Floor: three matrix products of N x E x V, 2 N E V flops each: 247 ms for 3712 x 128 x 32011 at
// 370 GF/s, 391 ms at the 233 of two Zen 4 cores, which take 436 (456 at the rate of PyTorch's own
// products). Before its tiles asked for the lines of probs, dweight and weight while they multiply,
// it took 482; none of the three is in L2. The fourth one, logits again for the weight gradient, is
// saved by keeping exp(logit) of one block (V x 192 floats, 24 MB, which stays in the last-level
// cache): recomputing it measured 82 ms more, and blocks of 64 tokens 30 ms more, as each block
// reads and writes dweight once.
//
// Layout: tokens are the lanes of every vector and the vocabulary is streamed, so softmax sums are
// vertical, nothing is transposed but a block of hidden, and weight is only ever the operand that
// gemm_f32 reads one number at a time: it is used where it lies, as (V, E) or as the transpose of
// (E, V). Threads own slices of the vocabulary, cut by the shape alone, and their partial sums are
// added in order: the result does not depend on the number of threads.
//
// Exponentials are taken relative to the target's logit instead of the largest one, which would
// need all logits first. The target's own exponential is then exactly 1 and is left out of the
// sums: loss = log1p(sum of the others), and the target's gradient -others / (1 + others), both
// without cancellation. Only a loss above 46 gets near overflow; such blocks are done again
// relative to their largest logits.
#include "linear_cross_entropy.h"

#include <type_traits>

#include "../gemm_f32.h"
#include "../simd.h"
#include "../simd_exp.h"
#include "linear_cross_entropy_block.h"

namespace lmfast::LMFAST_ISA {
namespace {

constexpr int64_t kChunk = 96;  // classes at a time: their logits, 72 KB, stay in L2
constexpr int64_t kMaxLanes = 192;

// The slice's part of the vocabulary, cut at whole chunks.
LMFAST_INLINE void slice_range(const LceBlockArgs& a, int64_t slice, int64_t* begin, int64_t* end) {
  const int64_t chunks = (a.p.classes + kChunk - 1) / kChunk;
  *begin = chunks * slice / a.slices * kChunk;
  *end = smaller(chunks * (slice + 1) / a.slices * kChunk, a.p.classes);
}

// A block of weight as fp32, where it lies if it is fp32, otherwise converted into `buffer`
// (kChunk x kDepth). Element (class, column) is at [class * stride + column], or with kTransposed
// at [column * stride + class].
template <class W, bool kTransposed>
LMFAST_INLINE const float* weight_block(const LceProblem& p, int64_t first_class, int64_t classes,
                                        int64_t first_column, int64_t columns, float* buffer,
                                        int64_t* stride) {
  const int64_t outer = kTransposed ? p.weight_column_stride : p.weight_row_stride;
  const W* from =
      static_cast<const W*>(p.weight) +
      (kTransposed ? first_column * outer + first_class : first_class * outer + first_column);
  if constexpr (sizeof(W) == 4) {
    *stride = outer;
    return from;
  } else {
    const int64_t rows = kTransposed ? columns : classes, length = kTransposed ? classes : columns;
    *stride = kTransposed ? kChunk : kDepth;
    for (int64_t r = 0; r < rows; ++r) {
      const W* row = from + r * outer;
      float* out = buffer + r * *stride;
      int64_t i = 0;
      for (; i + VecF::kWidth <= length; i += VecF::kWidth) VecF::load(row + i).store(out + i);
      if (i < length) {
        VecF::load(row + i, static_cast<int>(length - i))
            .store(out + i, static_cast<int>(length - i));
      }
    }
    return buffer;
  }
}

// Kept probs and, by rows, the weight come from the last-level cache or from beyond it.
template <bool kTransposed>
using Ask = std::conditional_t<kTransposed, AskForC, AskForBoth>;

// logits[class][lane] of a chunk, without bias.
template <class W, bool kTransposed>
LMFAST_INLINE void chunk_logits(const LceBlockArgs& a, int64_t first, int64_t classes,
                                float* logits, float* buffer) {
  int64_t stride;
  for (int64_t e = 0; e < a.p.width; e += kDepth) {
    const int64_t depth = smaller(kDepth, a.p.width - e);
    const float* w = weight_block<W, kTransposed>(a.p, first, classes, e, depth, buffer, &stride);
    const float* h = a.hidden_t + e * a.lanes;
    if (e == 0) {
      gemm_f32<kTransposed, false>(classes, a.lanes, depth, w, stride, h, a.lanes, logits, a.lanes,
                                   logits, a.lanes, Ask<kTransposed>{});
    } else {
      gemm_f32<kTransposed, true>(classes, a.lanes, depth, w, stride, h, a.lanes, logits, a.lanes,
                                  logits, a.lanes, Ask<kTransposed>{});
    }
  }
}

// dhidden_t[column][lane] += sum over the chunk's classes of weight * probs.
template <class W, bool kTransposed>
LMFAST_INLINE void chunk_dhidden(const LceBlockArgs& a, int64_t first, int64_t classes,
                                 const float* probs, float* dhidden_t, bool add, float* buffer) {
  int64_t stride;
  for (int64_t e = 0; e < a.p.width; e += kDepth) {
    const int64_t rows = smaller(kDepth, a.p.width - e);
    const float* w = weight_block<W, kTransposed>(a.p, first, classes, e, rows, buffer, &stride);
    float* out = dhidden_t + e * a.lanes;
    if (add) {
      gemm_f32<!kTransposed, true>(rows, a.lanes, classes, w, stride, probs, a.lanes, out, a.lanes);
    } else {
      gemm_f32<!kTransposed, false>(rows, a.lanes, classes, w, stride, probs, a.lanes, out,
                                    a.lanes);
    }
  }
}

// Logits of a chunk -> exp(logit - center), 0 for the targets, added to sums. With a cap, what is
// stored is also multiplied by the cap's slope, which the gradients need and the sums must not
// have.
template <bool kBias, bool kCap>
void chunk_exp(const LceBlockArgs& a, int64_t first, int64_t classes, float* logits, float* sums) {
  constexpr float kGone = -1e30f;
  constexpr int W = VecF::kWidth, kVecs = kLceGroup / W;
  for (int64_t n = 0; n < a.tokens; ++n) {
    const int64_t at = a.p.target[a.first_token + n] - first;
    if (at >= 0 && at < classes) logits[at * a.lanes + n] = kGone;
  }
  for (int64_t n = 0; n < a.lanes; n += kVecs * W) {
    VecF center[kVecs], sum[kVecs];
    for (int i = 0; i < kVecs; ++i) {
      center[i] = VecF::load(a.center + n + i * W);
      sum[i] = VecF::zero();
    }
    for (int64_t v = 0; v < classes; ++v) {
      float* at = logits + v * a.lanes + n;
#pragma GCC unroll 4
      for (int i = 0; i < kVecs; ++i) {
        const VecF raw = VecF::load(at + i * W);
        VecF z = raw;
        if constexpr (kBias) z = z + VecF::set1(a.p.bias[first + v]);
        VecF ratio;
        if constexpr (kCap) z = capped(z, a.p.softcap, &ratio);
        VecF e = exp(z - center[i]);
        if constexpr (kCap) {
          e = select_less(raw, VecF::set1(kGone * 0.5f), VecF::zero(), e);
          sum[i] = sum[i] + e;
          e = e * fmadd(VecF::zero() - ratio, ratio, VecF::set1(1.0f));
        } else {
          sum[i] = sum[i] + e;
        }
        e.store(at + i * W);
      }
    }
    // A chunk's sum is finished before it is added: short chains of additions stay exact longer.
    for (int i = 0; i < kVecs; ++i) (VecF::load(sums + n + i * W) + sum[i]).store(sums + n + i * W);
  }
}

template <bool kBias>
LMFAST_INLINE void chunk_exp_capped(const LceBlockArgs& a, int64_t first, int64_t classes,
                                    float* logits, float* sums) {
  if (a.p.softcap > 0) {
    chunk_exp<kBias, true>(a, first, classes, logits, sums);
  } else {
    chunk_exp<kBias, false>(a, first, classes, logits, sums);
  }
}

template <class W, bool kTransposed>
void forward_slices(const LceBlockArgs& a, int64_t begin, int64_t end) {
  alignas(64) float scratch[kChunk * kMaxLanes];
  alignas(64) float buffer[sizeof(W) == 4 ? 1 : kChunk * kDepth];
  for (int64_t slice = begin; slice < end; ++slice) {
    int64_t first, past;
    slice_range(a, slice, &first, &past);
    float* sums = a.sums + slice * a.lanes;
    float* dhidden_t = a.dhidden_t == nullptr ? nullptr : a.dhidden_t + slice * a.p.width * a.lanes;
    for (int64_t n = 0; n < a.lanes; ++n) sums[n] = 0.0f;
    for (int64_t v = first; v < past; v += kChunk) {
      const int64_t classes = smaller(kChunk, past - v);
      float* probs = a.probs != nullptr ? a.probs + v * a.lanes : scratch;
      chunk_logits<W, kTransposed>(a, v, classes, probs, buffer);
      if (a.p.bias != nullptr) {
        chunk_exp_capped<true>(a, v, classes, probs, sums);
      } else {
        chunk_exp_capped<false>(a, v, classes, probs, sums);
      }
      if (dhidden_t != nullptr) {
        chunk_dhidden<W, kTransposed>(a, v, classes, probs, dhidden_t, v != first, buffer);
      }
    }
  }
}

template <class W, bool kTransposed>
void max_slices(const LceBlockArgs& a, int64_t begin, int64_t end) {
  alignas(64) float logits[kChunk * kMaxLanes];
  alignas(64) float buffer[sizeof(W) == 4 ? 1 : kChunk * kDepth];
  for (int64_t slice = begin; slice < end; ++slice) {
    int64_t first, past;
    slice_range(a, slice, &first, &past);
    float* largest = a.sums + slice * a.lanes;
    for (int64_t n = 0; n < a.lanes; ++n) largest[n] = -INFINITY;
    for (int64_t v = first; v < past; v += kChunk) {
      const int64_t classes = smaller(kChunk, past - v);
      chunk_logits<W, kTransposed>(a, v, classes, logits, buffer);
      for (int64_t i = 0; i < classes; ++i) {
        const VecF bias = VecF::set1(a.p.bias != nullptr ? a.p.bias[v + i] : 0.0f);
        for (int64_t n = 0; n < a.lanes; n += VecF::kWidth) {
          VecF z = VecF::load(logits + i * a.lanes + n) + bias;
          VecF ratio;
          if (a.p.softcap > 0) z = capped(z, a.p.softcap, &ratio);
          // A NaN logit as the second operand is what max returns.
          max(VecF::load(largest + n), z).store(largest + n);
        }
      }
    }
  }
}

// The bias gradient of a range of classes: probs times coefficient, summed over the lanes.
void chunk_dbias(const LceBlockArgs& a, int64_t first, int64_t classes) {
  for (int64_t v = first; v < first + classes; ++v) {
    const float* probs = a.probs + v * a.lanes;
    VecF total = VecF::zero();
    for (int64_t n = 0; n < a.lanes; n += VecF::kWidth) {
      total = fmadd(VecF::load(probs + n), VecF::load(a.coefficient + n), total);
    }
    a.dbias[v] = sum(total) + (a.accumulate ? a.dbias[v] : a.uniform_bias);
  }
}

}  // namespace

// Calls FUNCTION<weight type, kTransposed>.
#define LMFAST_LCE_WEIGHT(FUNCTION)                              \
  const bool transposed = a.p.weight_column_stride != 1;         \
  switch (a.p.weight_dtype) {                                    \
    case DType::kF32:                                            \
      return transposed ? FUNCTION<float, true>(a, begin, end)   \
                        : FUNCTION<float, false>(a, begin, end); \
    case DType::kBF16:                                           \
      return transposed ? FUNCTION<bf16, true>(a, begin, end)    \
                        : FUNCTION<bf16, false>(a, begin, end);  \
    case DType::kF16:                                            \
      return transposed ? FUNCTION<f16, true>(a, begin, end)     \
                        : FUNCTION<f16, false>(a, begin, end);   \
    case DType::kF64:                                            \
      return;                                                    \
  }

void lce_block_max(const LceBlockArgs& a, int64_t begin, int64_t end) {
  LMFAST_LCE_WEIGHT(max_slices)
}

void lce_block_forward(const LceBlockArgs& a, int64_t begin, int64_t end) {
  LMFAST_LCE_WEIGHT(forward_slices)
}

void lce_block_dweight(const LceBlockArgs& a, int64_t begin, int64_t end) {
  for (int64_t slice = begin; slice < end; ++slice) {
    int64_t first, past;
    slice_range(a, slice, &first, &past);
    for (int64_t v = first; v < past; v += kChunk) {
      const int64_t classes = smaller(kChunk, past - v);
      if (a.dbias != nullptr) chunk_dbias(a, v, classes);
      if (a.dweight == nullptr) continue;
      float* out = a.dweight + v * a.padded_width;
      const float* probs = a.probs + v * a.lanes;
      if (!a.accumulate && a.uniform == nullptr) {
        gemm_f32<false, false>(classes, a.padded_width, a.lanes, probs, a.lanes, a.hidden_scaled,
                               a.padded_width, out, a.padded_width, out, a.padded_width,
                               AskForBoth{});
        continue;
      }
      if (!a.accumulate) {
        for (int64_t i = 0; i < classes; ++i) {
          memcpy(out + i * a.padded_width, a.uniform, sizeof(float) * a.padded_width);
        }
      }
      gemm_f32<false, true>(classes, a.padded_width, a.lanes, probs, a.lanes, a.hidden_scaled,
                            a.padded_width, out, a.padded_width, out, a.padded_width, AskForBoth{});
    }
    add_targets(a, first, past);
  }
}

}  // namespace lmfast::LMFAST_ISA
