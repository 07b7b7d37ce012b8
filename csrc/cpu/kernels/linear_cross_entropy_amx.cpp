// Linear cross-entropy with products on AMX tiles: two passes, each a softmax attention of sorts
// (linear_cross_entropy_amx_block.h). The pass over tokens leaves losses, dhidden and each token's
// logsumexp; the pass over classes makes the logits again and leaves dweight and dbias.
//
// Floor: four products of N x E x V; at 4.7 TFLOP/s, what the tiles do on two cores, 26 ms for
// 3712 x 128 x 32011, plus 2 N V exponentials, 20 ms of which about half is hidden. Keeping the
// exponentials instead of making them again would move half a gigabyte.
//
// Each lane of the accumulator is owned by one group, each group by one thread: no sums are shared,
// nothing depends on the number of threads. Targets are left out of the sums and have their
// gradient added in fp32 at the end (linear_cross_entropy.cpp says why).
#include "linear_cross_entropy_amx.h"

#include "linear_cross_entropy_amx_pack.h"
#include "linear_cross_entropy_amx_single.h"
#include "linear_cross_entropy_token.h"

namespace lmfast::LMFAST_ISA {

#if defined(LMFAST_AMX)

namespace {

// A worker's scratch.
struct Desk {
  char* chunk;
  char* probs;
  float* logits;
  float* rows;
  char* groups;
  LceAmxLayout at;

  Desk(const LceAmxArgs& a, int64_t worker) : at(lce_amx_layout(a)) {
    chunk = a.scratch + worker * a.worker_bytes;
    probs = chunk + at.probs;
    logits = reinterpret_cast<float*>(chunk + at.logits);
    rows = reinterpret_cast<float*>(chunk + at.rows);
    groups = chunk + at.groups;
  }
  char* lanes(int64_t i) const { return groups + i * at.group_bytes; }
  float* add(int64_t i) const { return reinterpret_cast<float*>(lanes(i) + at.group_add); }
  Group group(int64_t i) const {
    char* base = lanes(i);
    return {base, add(i), reinterpret_cast<float*>(base + at.group_sums),
            reinterpret_cast<float*>(base + at.group_acc)};
  }
};

// ---- the pass over tokens ----

template <int kParts>
void pack_token_group(const LceAmxArgs& a, const Desk& desk, int64_t i, int64_t group,
                      float* target_logit, double* mean_logit) {
  const LceProblem& p = a.p;
  for (int tile = 0; tile < 4; ++tile) {
    const int64_t first = group * kLceLanes + 16 * tile;
    load_hidden_rows(a, first, p.tokens - first, desk.rows);
    pack_lanes<kParts>(a, desk.rows, tile, desk.lanes(i));
    for (int64_t r = 0; r < kTileRows; ++r) {
      const int64_t token = first + r, lane = 16 * tile + r;
      const float* h = desk.rows + r * a.depth;
      float logit = 0.0f;
      double mean = p.mean_bias;
      for (int64_t e = 0; e < p.width; ++e) {
        logit += h[e] * a.target_rows[e * a.padded_tokens + token];
      }
      if (p.mean_weight != nullptr) {
        for (int64_t e = 0; e < p.width; ++e) mean += double(h[e]) * p.mean_weight[e];
      }
      if (p.bias != nullptr && token < p.tokens) logit += p.bias[p.target[token]];
      target_logit[lane] = logit;
      mean_logit[lane] = mean;
      desk.add(i)[lane] = -logit * exponent_unit<kParts>();
    }
  }
  memset(desk.group(i).sums, 0, kLceLanes * sizeof(float));
}

// Streams the vocabulary past `count` groups of tokens from `first_group`.
template <int kParts, Mode kMode>
void stream_classes(const LceAmxArgs& a, const Desk& desk, int64_t first_slot, int64_t first_group,
                    int64_t count) {
  Holes holes;
  for (int64_t v = 0; v < a.p.classes; v += a.chunk) {
    const int64_t classes = smaller(a.chunk, a.p.classes - v);
    const StreamChunk chunk = pack_classes<kParts>(a, v, classes, desk.rows, desk.chunk);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = (first_group + i) * kLceLanes;
      const int64_t tokens = smaller(kLceLanes, a.p.tokens - first);
      holes.count = 0;
      for (int64_t lane = 0; kMode != Mode::kMax && lane < tokens; ++lane) {
        const int64_t row = a.p.target[first + lane] - v;
        if (row < 0 || row >= classes) continue;
        holes.row[holes.count] = static_cast<int32_t>(row);
        holes.lane[holes.count++] = static_cast<int32_t>(lane);
      }
      const Group group = desk.group(first_slot + i);
      if constexpr (kParts == 1 && kMode == Mode::kSum) {
        const bool rows_add = a.p.bias != nullptr || chunk.count > classes;
        single_probs_of_tokens(a, chunk, group, holes, rows_add, desk.logits, desk.probs);
        if (a.want_product) single_product(a, chunk, desk.probs, group.acc, v > 0);
      } else {
        chunk_probs<kParts, kMode>(a, chunk, group, holes, desk.logits, desk.probs);
        if (kMode == Mode::kSum && a.want_product) {
          chunk_product<kParts>(a, chunk, desk.probs, group.acc, v > 0);
        }
      }
    }
  }
}

template <class H>
void store_dhidden(const LceAmxArgs& a, int64_t group, const float* acc, const float* coefficient) {
  const LceProblem& p = a.p;
  for (int64_t j = 0; j < 4; ++j) {
    const int64_t first = group * kLceLanes + 16 * j;
    const int64_t count = smaller(kTileRows, p.tokens - first);
    if (count <= 0) return;
    const VecF factor = VecF::load(coefficient + 16 * j);
    const VecF target = VecF::load(a.target_gradient + first, lanes_of(count));
    for (int64_t e = 0; e < p.width; e += 16) {
      __m512i t[16];
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i) {
        const VecF row = e + i < p.width
                             ? VecF::load(a.target_rows + (e + i) * a.padded_tokens + first)
                             : VecF::zero();
        const VecF sum = VecF::load(acc + (e + i) * kLceLanes + 16 * j);
        t[i] = _mm512_castps_si512(fmadd(sum, factor, row * target).v);
      }
      transpose_words(t);
      const int n = lanes_of(p.width - e);
      for (int64_t i = 0; i < count; ++i) {
        VecF grad = {_mm512_castsi512_ps(t[i])};
        if (p.mean_weight != nullptr) {
          grad = fmadd(VecF::set1(-p.scale[first + i] * p.smoothing),
                       VecF::load(p.mean_weight + e, n), grad);
        }
        grad.store(static_cast<H*>(p.dhidden) + p.row[first + i] * p.width + e, n);
      }
    }
  }
}

// Losses and gradients of a group; false if its sums overflow and `redone` is not set.
template <int kParts>
bool finish_token_group(const LceAmxArgs& a, const Group& group, int64_t index,
                        const float* target_logit, const double* mean_logit, bool redone) {
  const LceProblem& p = a.p;
  const int64_t first = index * kLceLanes, count = smaller(kLceLanes, p.tokens - first);
  alignas(64) float coefficient[kLceLanes] = {};
  bool overflow = false;
  for (int64_t i = 0; i < count; ++i) {
    overflow = overflow || sum_overflows(target_logit[i], group.sums[i]);
  }
  if (overflow && !redone) return false;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t token = first + i;
    const float center = redone ? -group.add[i] / exponent_unit<kParts>() : target_logit[i];
    const FinishedToken f =
        finish_token(p, p.scale[token], target_logit[i], center, group.sums[i], mean_logit[i]);
    p.loss[token] = f.loss;
    coefficient[i] = f.coefficient;
    // exp(logit - lse) has the rounding error of lse, which is too large next to fp32 products.
    a.center[token] = kParts == 1 ? static_cast<float>(f.lse) : center;
    a.weight[token] = kParts == 1 ? f.weight : f.coefficient;
    a.target_gradient[token] = f.target_gradient;
  }
  if (p.dhidden == nullptr) return true;
  if (p.hidden_dtype == DType::kF32) {
    store_dhidden<float>(a, index, group.acc, coefficient);
  } else if (p.hidden_dtype == DType::kBF16) {
    store_dhidden<bf16>(a, index, group.acc, coefficient);
  } else {
    store_dhidden<f16>(a, index, group.acc, coefficient);
  }
  return true;
}

template <int kParts>
void tokens_of_worker(const LceAmxArgs& a, int64_t worker) {
  const Desk desk(a, worker);
  const int64_t begin = a.groups * worker / a.workers, end = a.groups * (worker + 1) / a.workers;
  constexpr int64_t kMost = 64;  // groups at once; scratch has room for a.groups_at_once of them
  float target_logit[kMost][kLceLanes];
  double mean_logit[kMost][kLceLanes];
  for (int64_t g = begin; g < end; g += a.groups_at_once) {
    const int64_t count = smaller(a.groups_at_once, end - g);
    for (int64_t i = 0; i < count; ++i) {
      pack_token_group<kParts>(a, desk, i, g + i, target_logit[i], mean_logit[i]);
    }
    stream_classes<kParts, Mode::kSum>(a, desk, 0, g, count);
    for (int64_t i = 0; i < count; ++i) {
      const Group group = desk.group(i);
      if (finish_token_group<kParts>(a, group, g + i, target_logit[i], mean_logit[i], false)) {
        continue;
      }
      for (int64_t lane = 0; lane < kLceLanes; ++lane) {
        group.sums[lane] = -INFINITY;
        desk.add(i)[lane] = 0.0f;
      }
      stream_classes<kParts, Mode::kMax>(a, desk, i, g + i, 1);
      for (int64_t lane = 0; lane < kLceLanes; ++lane) {
        desk.add(i)[lane] = -group.sums[lane];
        group.sums[lane] = 0.0f;
      }
      stream_classes<kParts, Mode::kSum>(a, desk, i, g + i, 1);
      finish_token_group<kParts>(a, group, g + i, target_logit[i], mean_logit[i], true);
    }
  }
}

// ---- the pass over classes ----

template <int kParts>
void pack_class_group(const LceAmxArgs& a, const Desk& desk, int64_t i, int64_t group) {
  for (int tile = 0; tile < 4; ++tile) {
    const int64_t first = group * kLceLanes + 16 * tile;
    load_weight_rows(a, smaller(first, a.p.classes), a.p.classes - first, desk.rows);
    pack_lanes<kParts>(a, desk.rows, tile, desk.lanes(i));
  }
  for (int64_t lane = 0; lane < kLceLanes; ++lane) {
    const int64_t v = group * kLceLanes + lane;
    const float bias = a.p.bias != nullptr && v < a.p.classes ? a.p.bias[v] : 0.0f;
    desk.add(i)[lane] = bias * class_unit<kParts>();
  }
}

// What the targets among a group's classes add, before the accumulator is multiplied by `shared`.
template <class H>
void add_targets(const LceAmxArgs& a, int64_t group, float shared, float* acc) {
  for (int64_t i = a.group_begin[group]; i < a.group_begin[group + 1]; ++i) {
    const int64_t token = a.by_group[i], lane = a.p.target[token] - group * kLceLanes;
    const float grad = a.target_gradient[token] / shared;
    const H* h = static_cast<const H*>(a.p.hidden) + a.p.row[token] * a.p.hidden_stride;
    for (int64_t e = 0; e < a.p.width; e += 16) {
      const int n = lanes_of(a.p.width - e);
      float values[16];
      VecF::load(h + e, n).store(values);
      for (int j = 0; j < n; ++j) acc[(e + j) * kLceLanes + lane] += grad * values[j];
    }
    if (a.dbias != nullptr) acc[(a.out_tiles - 2) * kTileRows * kLceLanes + lane] += grad;
  }
}

template <class W>
void store_dweight(const LceAmxArgs& a, int64_t group, float shared, const float* acc) {
  const int64_t width = a.p.width;
  const VecF factor = VecF::set1(shared);
  for (int64_t j = 0; j < 4; ++j) {
    const int64_t first = group * kLceLanes + 16 * j;
    const int64_t count = smaller(kTileRows, a.p.classes - first);
    if (count <= 0) return;
    W* out = static_cast<W*>(a.dweight) + first * a.dweight_row_stride;
    if (a.dweight_column_stride != 1) {
      for (int64_t e = 0; e < width; ++e) {
        const VecF uniform = VecF::set1(a.uniform != nullptr ? a.uniform[e] : 0.0f);
        fmadd(VecF::load(acc + e * kLceLanes + 16 * j), factor, uniform)
            .store(out + e * a.dweight_column_stride, lanes_of(count));
      }
      continue;
    }
    for (int64_t e = 0; e < width; e += 16) {
      __m512i t[16];
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i) {
        t[i] = _mm512_loadu_si512(acc + (e + i) * kLceLanes + 16 * j);
      }
      transpose_words(t);
      const int n = lanes_of(width - e);
      const VecF uniform = a.uniform != nullptr ? VecF::load(a.uniform + e, n) : VecF::zero();
      for (int64_t i = 0; i < count; ++i) {
        fmadd({_mm512_castsi512_ps(t[i])}, factor, uniform)
            .store(out + i * a.dweight_row_stride + e, n);
      }
    }
  }
}

inline void finish_class_group(const LceAmxArgs& a, int64_t group, float* acc) {
  const float shared = a.shared_weight != 0.0f ? a.shared_weight : 1.0f;
  if (a.p.hidden_dtype == DType::kF32) add_targets<float>(a, group, shared, acc);
  if (a.p.hidden_dtype == DType::kBF16) add_targets<bf16>(a, group, shared, acc);
  if (a.p.hidden_dtype == DType::kF16) add_targets<f16>(a, group, shared, acc);
  if (a.dbias != nullptr) {
    const int64_t first = group * kLceLanes;
    const float* sums = acc + (a.out_tiles - 2) * kTileRows * kLceLanes;
    for (int64_t i = 0; i < smaller(kLceLanes, a.p.classes - first); ++i) {
      a.dbias[first + i] = sums[i] * shared + a.uniform_bias;
    }
  }
  if (a.dweight == nullptr) return;
  if (a.p.weight_dtype == DType::kF32) store_dweight<float>(a, group, shared, acc);
  if (a.p.weight_dtype == DType::kBF16) store_dweight<bf16>(a, group, shared, acc);
  if (a.p.weight_dtype == DType::kF16) store_dweight<f16>(a, group, shared, acc);
}

template <int kParts>
void classes_of_worker(const LceAmxArgs& a, int64_t worker) {
  const Desk desk(a, worker);
  const int64_t begin = a.groups * worker / a.workers, end = a.groups * (worker + 1) / a.workers;
  Holes holes;
  for (int64_t g = begin; g < end; g += a.groups_at_once) {
    const int64_t count = smaller(a.groups_at_once, end - g);
    for (int64_t i = 0; i < count; ++i) pack_class_group<kParts>(a, desk, i, g + i);
    for (int64_t n = 0; n < a.p.tokens; n += a.chunk) {
      const int64_t tokens = smaller(a.chunk, a.p.tokens - n);
      const char* packed = a.packed + n / a.chunk * a.packed_bytes;
      const StreamChunk chunk = {packed, packed + desk.at.columns,
                                 reinterpret_cast<const float*>(packed + desk.at.add),
                                 (tokens + 31) / 32 * 32};
      for (int64_t i = 0; i < count; ++i) {
        holes.count = 0;
        for (int64_t t = a.group_begin[g + i]; t < a.group_begin[g + i + 1]; ++t) {
          const int64_t row = a.by_group[t] - n;
          if (row < 0 || row >= tokens) continue;
          holes.row[holes.count] = static_cast<int32_t>(row);
          holes.lane[holes.count++] =
              static_cast<int32_t>(a.p.target[a.by_group[t]] - (g + i) * kLceLanes);
        }
        const Group group = desk.group(i);
        if constexpr (kParts == 1) {
          const bool lanes_add = a.p.bias != nullptr;
          single_probs_of_classes(a, chunk, group, holes, lanes_add, desk.logits, desk.probs);
          single_product(a, chunk, desk.probs, group.acc, n > 0);
        } else {
          chunk_probs<kParts, Mode::kPlain>(a, chunk, group, holes, desk.logits, desk.probs);
          chunk_product<kParts>(a, chunk, desk.probs, group.acc, n > 0);
        }
      }
    }
    for (int64_t i = 0; i < count; ++i) finish_class_group(a, g + i, desk.group(i).acc);
  }
}

template <class W>
void gather_target_rows(const LceAmxArgs& a, int64_t begin, int64_t end) {
  const int64_t past = smaller(end, a.p.width), row = a.p.weight_row_stride;
  float* out = const_cast<float*>(a.target_rows);
  for (int64_t n = 0; n < a.padded_tokens; ++n) {
    for (int64_t e = begin; n >= a.p.tokens && e < past; ++e) out[e * a.padded_tokens + n] = 0.0f;
  }
  if (a.p.weight_column_stride == 1) {
    for (int64_t n = 0; n < a.p.tokens; ++n) {
      const W* w = static_cast<const W*>(a.p.weight) + a.p.target[n] * row;
      for (int64_t e = begin; e < past; e += 16) {
        const int count = lanes_of(past - e);
        float values[16];
        VecF::load(w + e, count).store(values);
        for (int i = 0; i < count; ++i) out[(e + i) * a.padded_tokens + n] = values[i];
      }
    }
    return;
  }
  for (int64_t e = begin; e < past; ++e) {
    const W* w = static_cast<const W*>(a.p.weight) + e * a.p.weight_column_stride;
    for (int64_t n = 0; n < a.p.tokens; ++n) {
      VecF::load(w + a.p.target[n], 1).store(out + e * a.padded_tokens + n, 1);
    }
  }
}

}  // namespace

void lce_amx_target_rows(const LceAmxArgs& a, int64_t begin, int64_t end) {
  begin *= 16;
  end *= 16;
  if (a.p.weight_dtype == DType::kF32) return gather_target_rows<float>(a, begin, end);
  if (a.p.weight_dtype == DType::kBF16) return gather_target_rows<bf16>(a, begin, end);
  gather_target_rows<f16>(a, begin, end);
}

void lce_amx_tokens(const LceAmxArgs& a, int64_t begin, int64_t end) {
  const TileSession session;
  for (int64_t worker = begin; worker < end; ++worker) {
    a.parts == 1 ? tokens_of_worker<1>(a, worker) : tokens_of_worker<3>(a, worker);
  }
}

void lce_amx_pack(const LceAmxArgs& a, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) {
    const int64_t first = c * a.chunk, count = smaller(a.chunk, a.p.tokens - first);
    char* to = a.packed + c * a.packed_bytes;
    float* rows = reinterpret_cast<float*>(to + lce_amx_layout(a).chunk);
    a.parts == 1 ? pack_tokens<1>(a, first, count, rows, to)
                 : pack_tokens<3>(a, first, count, rows, to);
  }
}

void lce_amx_classes(const LceAmxArgs& a, int64_t begin, int64_t end) {
  const TileSession session;
  for (int64_t worker = begin; worker < end; ++worker) {
    a.parts == 1 ? classes_of_worker<1>(a, worker) : classes_of_worker<3>(a, worker);
  }
}

#else

void lce_amx_target_rows(const LceAmxArgs&, int64_t, int64_t) {}
void lce_amx_tokens(const LceAmxArgs&, int64_t, int64_t) {}
void lce_amx_pack(const LceAmxArgs&, int64_t, int64_t) {}
void lce_amx_classes(const LceAmxArgs&, int64_t, int64_t) {}

#endif

}  // namespace lmfast::LMFAST_ISA
