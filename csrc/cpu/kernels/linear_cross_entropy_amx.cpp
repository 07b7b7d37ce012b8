// Linear cross-entropy with products on AMX tiles: two passes, each a softmax attention of sorts
// (linear_cross_entropy_amx_block.h). The pass over tokens leaves losses, dhidden and each token's
// logsumexp; the pass over classes makes the logits again and leaves dweight and dbias.
//
// Floor: four products of N x E x V: 17 ms on two cores at 16 cycles a tdp for 3712 x 128 x 32011.
// Exponentials and tile loads share the products' ports and come on top
// (linear_cross_entropy_amx_single.h): 43 ms in all with one part, 57 before that header's layout.
// Keeping the exponentials instead of making them again would move half a gigabyte.
//
// Each lane of the accumulator is owned by one group, each group by one thread: no sums are shared,
// nothing depends on the number of threads. Targets are left out of the sums and have their
// gradient added in fp32 at the end (linear_cross_entropy.cpp says why).
#include "linear_cross_entropy_amx.h"

#include "linear_cross_entropy_amx_gradients.h"
#include "linear_cross_entropy_amx_single.h"
#include "linear_cross_entropy_token.h"

namespace lmfast::LMFAST_ISA {

#if defined(__AMX_TILE__)

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
    const int64_t first = smaller(group * kLceLanes + 16 * tile, a.p.classes);
    const int64_t rows = smaller(a.p.classes - first, kTileRows), stride = a.p.weight_row_stride;
    if (kParts == 1 && rows_of_bf16(a)) {
      const bf16* w = static_cast<const bf16*>(a.p.weight) + first * stride;
      for (int64_t e = 0; e < a.depth; e += kTileDepth) {
        char* to = desk.lanes(i) + (e / kTileDepth * 4 + tile) * kTileBytes;
        pack_transposed(w + e, stride, static_cast<int>(rows), static_cast<int>(a.p.width - e), to);
      }
      continue;
    }
    load_weight_rows(a, first, rows, desk.rows);
    pack_lanes<kParts>(a, desk.rows, tile, desk.lanes(i));
  }
  for (int64_t lane = 0; lane < kLceLanes; ++lane) {
    const int64_t v = group * kLceLanes + lane;
    const float bias = a.p.bias != nullptr && v < a.p.classes ? a.p.bias[v] : 0.0f;
    desk.add(i)[lane] = bias * class_unit<kParts>();
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
