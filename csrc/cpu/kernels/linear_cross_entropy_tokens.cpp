// The parts of linear cross-entropy in blocks of tokens (linear_cross_entropy.cpp and
// linear_cross_entropy_bf16.cpp) that handle tokens one by one: a few per cent of its time.
#include "../simd.h"
#include "linear_cross_entropy_block.h"
#include "linear_cross_entropy_token.h"

namespace lmfast::LMFAST_ISA {
namespace {

// Center of the lanes behind the last token: their logits are the biases, and exponentials of zero
// keep sums over lanes finite whatever those are.
constexpr float kNoToken = 1e38f;

template <class T>
LMFAST_INLINE float scalar_at(const T* p) {
  if constexpr (sizeof(T) == 4) {
    return *reinterpret_cast<const float*>(p);
  } else {
    float lanes[VecF::kWidth];
    VecF::load(p, 1).store(lanes);
    return lanes[0];
  }
}

// hidden_t and the targets' logits. A target's logit is summed in gemm_f32's order, so that it is
// the same number there.
template <class H, class W>
void pack_groups(const LceBlockArgs& a, int64_t begin, int64_t end) {
  const LceProblem& p = a.p;
  for (int64_t n = begin * kLceGroup; n < end * kLceGroup; ++n) {
    if (n >= a.tokens) {
      for (int64_t e = 0; e < p.width; ++e) a.hidden_t[e * a.lanes + n] = 0.0f;
      a.target_logit[n] = a.target_slope[n] = 0.0f;
      a.center[n] = kNoToken;
      continue;
    }
    const int64_t token = a.first_token + n, target = p.target[token];
    const H* h = static_cast<const H*>(p.hidden) + p.row[token] * p.hidden_stride;
    const W* w = static_cast<const W*>(p.weight) + target * p.weight_row_stride;
    VecF logit = VecF::zero();
    for (int64_t block = 0; block < p.width; block += kDepth) {
      VecF part = VecF::zero();
      for (int64_t e = block; e < smaller(block + kDepth, p.width); ++e) {
        const float x = scalar_at(h + e), y = scalar_at(w + e * p.weight_column_stride);
        a.hidden_t[e * a.lanes + n] = x;
        part = fmadd(VecF::set1(y), VecF::set1(x), part);
      }
      logit = logit + part;
    }
    if (p.bias != nullptr) logit = logit + VecF::set1(p.bias[target]);
    float lanes[VecF::kWidth];
    logit.store(lanes);
    a.target_slope[n] = 1.0f;
    if (p.softcap > 0) {
      const double ratio = ::tanh(double(lanes[0]) / p.softcap);
      a.target_slope[n] = static_cast<float>(1.0 - ratio * ratio);
      VecF unused;
      capped(logit, p.softcap, &unused).store(lanes);
    }
    a.target_logit[n] = a.center[n] = lanes[0];
  }
}

// dhidden of `count` tokens from n0 on, a piece of its columns at a time: a slice's sums of it are
// read in one go. One element of every slice after the other was 5 % of the whole operator.
template <class H, class W>
void group_dhidden(const LceBlockArgs& a, int64_t n0, int64_t count, const FinishedToken* done) {
  constexpr int64_t kPiece = 64;
  const LceProblem& p = a.p;
  const int64_t row = a.dhidden_panels ? kLceGroup : a.lanes;
  const float* first = a.dhidden_t + (a.dhidden_panels ? n0 * a.dhidden_rows : n0);
  alignas(64) float total[kPiece * kLceGroup];
  for (int64_t e0 = 0; e0 < p.width; e0 += kPiece) {
    const int64_t columns = smaller(kPiece, p.width - e0);
    for (int64_t slice = 0; slice < a.slices; ++slice) {
      const float* part = first + slice * a.dhidden_rows * a.lanes + e0 * row;
      for (int64_t e = 0; e < columns; ++e) {
        for (int64_t i = 0; i < kLceGroup; i += VecF::kWidth) {
          float* to = total + e * kLceGroup + i;
          const VecF x = VecF::load(part + e * row + i);
          (slice == 0 ? x : VecF::load(to) + x).store(to);
        }
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t token = a.first_token + n0 + i;
      const W* w = static_cast<const W*>(p.weight) + p.target[token] * p.weight_row_stride;
      H* to = static_cast<H*>(p.dhidden) + p.row[token] * p.width;
      alignas(64) float grad[kPiece];
      for (int64_t e = 0; e < columns; ++e) {
        const float* mean = p.mean_weight;
        const float shared = mean != nullptr ? p.smoothing * mean[e0 + e] : 0.0f;
        grad[e] = total[e * kLceGroup + i] * done[i].coefficient +
                  done[i].target_gradient * scalar_at(w + (e0 + e) * p.weight_column_stride) -
                  p.scale[token] * shared;
      }
      for (int64_t e = 0; e < columns; e += VecF::kWidth) {
        const int n = static_cast<int>(smaller(VecF::kWidth, columns - e));
        VecF::load(grad + e, n).store(to + e0 + e, n);
      }
    }
  }
}

template <class H, class W>
void finish_groups(const LceBlockArgs& a, int64_t begin, int64_t end) {
  const LceProblem& p = a.p;
  for (int64_t group = begin; group < end; ++group) {
    const int64_t n0 = group * kLceGroup;
    alignas(64) float others[kLceGroup] = {};
    for (int64_t slice = 0; slice < a.slices; ++slice) {
      const float* part = a.sums + slice * a.lanes + n0;
      for (int64_t i = 0; i < kLceGroup; ++i) others[i] += part[i];
    }
    const int64_t count = a.tokens - n0 < kLceGroup ? a.tokens - n0 : kLceGroup;
    bool overflow = false;
    for (int64_t i = 0; i < count; ++i) {
      const float logit = a.target_logit[n0 + i];
      overflow = overflow || sum_overflows(logit, others[i]);
    }
    a.overflow[group] = overflow;
    if (overflow && !a.redo) continue;
    FinishedToken done[kLceGroup] = {};
    for (int64_t i = 0; i < count; ++i) {
      const int64_t n = n0 + i, token = a.first_token + n;
      double mean_logit = 0.0;
      if (p.mean_weight != nullptr) {
        mean_logit = p.mean_bias;
        for (int64_t e = 0; e < p.width; ++e) {
          mean_logit += double(p.mean_weight[e]) * a.hidden_t[e * a.lanes + n];
        }
      }
      done[i] =
          finish_token(p, p.scale[token], a.target_logit[n], a.center[n], others[i], mean_logit);
      done[i].target_gradient *= a.target_slope[n];
      p.loss[token] = done[i].loss;
    }
    if (a.hidden_scaled != nullptr) {
      for (int64_t i = 0; i < kLceGroup; ++i) {
        const int64_t n = n0 + i;
        a.coefficient[n] = done[i].coefficient;
        a.target_gradient[n] = done[i].target_gradient;
        float* row = a.hidden_scaled + n * a.padded_width;
        for (int64_t e = 0; e < p.width; ++e) {
          row[e] = a.hidden_t[e * a.lanes + n] * done[i].coefficient;
        }
        for (int64_t e = p.width; e < a.padded_width; ++e) row[e] = 0.0f;
      }
    }
    if (a.dhidden_t != nullptr) group_dhidden<H, W>(a, n0, count, done);
  }
}

template <class H>
void sum_hidden(const LceHiddenSumArgs& a, int64_t begin, int64_t end) {
  for (int64_t e = begin * kLceGroup; e < end * kLceGroup; e += VecF::kWidth) {
    const int n = static_cast<int>(smaller(VecF::kWidth, a.p.width - e));
    VecF total = VecF::zero();
    for (int64_t i = 0; n > 0 && i < a.p.tokens; ++i) {
      const H* h = static_cast<const H*>(a.p.hidden) + a.p.row[i] * a.p.hidden_stride;
      total = fmadd(VecF::set1(a.p.scale[i] * a.factor), VecF::load(h + e, n), total);
    }
    total.store(a.out + e);
  }
}

template <class T>
void convert(const LceConvertArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t kTile = 64;  // keeps both the rows read and the columns written in L1
  T* to = static_cast<T*>(a.to);
  for (int64_t v0 = begin; v0 < end; v0 += kTile) {
    const int64_t past = smaller(v0 + kTile, end);
    if (a.column_stride == 1) {
      for (int64_t v = v0; v < past; ++v) {
        for (int64_t e = 0; e < a.width; e += VecF::kWidth) {
          const int n = static_cast<int>(smaller(VecF::kWidth, a.width - e));
          VecF::load(a.from + v * a.padded_width + e).store(to + v * a.row_stride + e, n);
        }
      }
      continue;
    }
    for (int64_t e = 0; e < a.width; ++e) {
      for (int64_t v = v0; v < past; v += VecF::kWidth) {
        const int n = static_cast<int>(smaller(VecF::kWidth, past - v));
        float lanes[VecF::kWidth] = {};
        for (int i = 0; i < n; ++i) lanes[i] = a.from[(v + i) * a.padded_width + e];
        VecF::load(lanes).store(to + e * a.column_stride + v, n);
      }
    }
  }
}

}  // namespace

// Calls FUNCTION<H, weight type>.
#define LMFAST_LCE_WEIGHT_OF(FUNCTION, H)       \
  switch (a.p.weight_dtype) {                   \
    case DType::kF32:                           \
      return FUNCTION<H, float>(a, begin, end); \
    case DType::kBF16:                          \
      return FUNCTION<H, bf16>(a, begin, end);  \
    case DType::kF16:                           \
      return FUNCTION<H, f16>(a, begin, end);   \
    case DType::kF64:                           \
      return;                                   \
  }

// Calls FUNCTION<hidden type, weight type>.
#define LMFAST_LCE_HIDDEN(FUNCTION)         \
  switch (a.p.hidden_dtype) {               \
    case DType::kF32:                       \
      LMFAST_LCE_WEIGHT_OF(FUNCTION, float) \
      return;                               \
    case DType::kBF16:                      \
      LMFAST_LCE_WEIGHT_OF(FUNCTION, bf16)  \
      return;                               \
    case DType::kF16:                       \
      LMFAST_LCE_WEIGHT_OF(FUNCTION, f16)   \
      return;                               \
    case DType::kF64:                       \
      return;                               \
  }

void lce_block_pack(const LceBlockArgs& a, int64_t begin, int64_t end) {
  LMFAST_LCE_HIDDEN(pack_groups)
}

void lce_block_center(const LceBlockArgs& a, int64_t begin, int64_t end) {
  for (int64_t n = begin * kLceGroup; n < end * kLceGroup; n += VecF::kWidth) {
    VecF largest = VecF::load(a.sums + n);
    for (int64_t slice = 1; slice < a.slices; ++slice) {
      largest = max(largest, VecF::load(a.sums + slice * a.lanes + n));
    }
    largest.store(a.center + n);
  }
}

void lce_block_finish(const LceBlockArgs& a, int64_t begin, int64_t end) {
  LMFAST_LCE_HIDDEN(finish_groups)
}

void lce_hidden_sum(const LceHiddenSumArgs& a, int64_t begin, int64_t end) {
  switch (a.p.hidden_dtype) {
    case DType::kF32:
      return sum_hidden<float>(a, begin, end);
    case DType::kBF16:
      return sum_hidden<bf16>(a, begin, end);
    case DType::kF16:
      return sum_hidden<f16>(a, begin, end);
    case DType::kF64:
      return;
  }
}

void lce_convert(const LceConvertArgs& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::kF32:
      return convert<float>(a, begin, end);
    case DType::kBF16:
      return convert<bf16>(a, begin, end);
    case DType::kF16:
      return convert<f16>(a, begin, end);
    case DType::kF64:
      return;
  }
}

}  // namespace lmfast::LMFAST_ISA
