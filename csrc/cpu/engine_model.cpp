#include "engine_model.h"

#include <algorithm>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace lmfast {

using torch::headeronly::ScalarType;

bool has_avx512_vnni() {
  if (static_cast<int>(current_isa()) < static_cast<int>(Isa::kAvx512)) return false;
#if defined(__x86_64__)
  static const bool present = [] {
    uint32_t a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (c & (1u << 11)) != 0;
  }();
  return present;
#else
  return false;
#endif
}

EngineMemory::EngineMemory(const Tensor& weights, const Tensor& program)
    : weights_(static_cast<const char*>(weights.const_data_ptr())), size_(weights.numel()) {
  LMFAST_CHECK(weights.is_cpu() && weights.scalar_type() == ScalarType::Byte &&
                   weights.is_contiguous() && reinterpret_cast<uintptr_t>(weights_) % 64 == 0,
               "weights must be contiguous bytes on the CPU, aligned to 64");
  LMFAST_CHECK(program.is_cpu() && program.scalar_type() == ScalarType::Long &&
                   program.is_contiguous() &&
                   program.numel() * 8 >= static_cast<int64_t>(sizeof(EngineModel)),
               "program must be contiguous int64 words on the CPU");
  model_ = static_cast<const EngineModel*>(program.const_data_ptr());
  const EngineModel& m = *model_;
  LMFAST_CHECK(m.magic == kEngineMagic, "the program was written for another version");
  for (int64_t size : {m.layers, m.width, m.heads, m.kv_heads, m.head_dim, m.hidden, m.vocab}) {
    LMFAST_CHECK(size >= 1 && size <= (int64_t{1} << 31), "a size is out of range: ", size);
  }
  LMFAST_CHECK(m.head_dim <= 256 && m.heads % m.kv_heads == 0, "the heads do not fit");
  LMFAST_CHECK(m.groups >= 1 && m.groups <= m.layers && m.ropes >= 0 && m.ropes <= m.layers,
               "groups or rotations out of range");
  LMFAST_CHECK(program.numel() * 8 == static_cast<int64_t>(sizeof(EngineModel)) +
                                          m.layers * static_cast<int64_t>(sizeof(EngineLayer)),
               "the program has a wrong length");
  layers_ = reinterpret_cast<const EngineLayer*>(model_ + 1);
  sizes_.x = round_up(m.width, 64);
  check_norm(m.final_norm, m.width, "final norm");
  check_matrix(m.head, m.vocab, m.width, "head");
  if (m.embedding != kEngineNone) {
    LMFAST_CHECK(m.embedding_type >= 0 && m.embedding_type <= 2, "unknown type of embeddings");
    constexpr int64_t kBytes[] = {4, 2, 1};
    check_span(m.embedding, m.vocab * m.width * kBytes[m.embedding_type], "embedding");
    if (m.embedding_type == 2) check_span(m.embedding_scales, m.vocab * 4, "embedding scales");
  }
  if (m.positions != kEngineNone) {
    LMFAST_CHECK(m.position_count >= 1, "positions out of range");
    check_span(m.positions, m.position_count * m.width * 4, "positions");
  }
  for (int64_t i = 0; i < m.layers; ++i) check_layer(layers_[i]);
  sizes_.operand = round_up(sizes_.operand, 64);
}

void EngineMemory::check_span(int64_t offset, int64_t bytes, const char* what) const {
  LMFAST_CHECK(offset >= 0 && offset % 64 == 0 && bytes <= size_ && offset <= size_ - bytes, what,
               " lies outside of the weights");
}

void EngineMemory::check_norm(const EngineNorm& norm, int64_t width, const char* what) const {
  LMFAST_CHECK(norm.kind >= 0 && norm.kind <= 2, "unknown kind of norm: ", norm.kind);
  if (norm.kind == 0) return;
  check_span(norm.weight, width * 4, what);
  if (norm.bias != kEngineNone) check_span(norm.bias, width * 4, what);
}

void EngineMemory::check_matrix(const EngineMatrix& w, int64_t columns, int64_t depth,
                                const char* what) {
  LMFAST_CHECK(w.type >= 0 && w.type <= 3, "unknown type of weights: ", w.type);
  const int64_t step = kEngineDepthStep[w.type];
  const bool integer = w.type >= static_cast<int64_t>(EngineWeights::kI8);
  LMFAST_CHECK(w.panels >= 1 && w.panels * kEnginePanel >= columns && w.depth >= depth &&
                   w.depth % step == 0 && w.depth <= round_up(depth, 256),
               what, " has the wrong size");
  LMFAST_CHECK(w.group == 0 || (integer && w.group % 8 == 0 && w.group <= 256 && w.group > 0 &&
                                w.depth % w.group == 0),
               what, " has groups of a wrong size: ", w.group);
  const int64_t bytes = w.panels * (w.depth / step) * 64;
  check_span(w.weights, bytes, what);
  sizes_.bytes += bytes;
  if (w.bias != kEngineNone) check_span(w.bias, w.panels * kEnginePanel * 4, what);
  if (integer) {
    const int64_t scales = w.group == 0 ? 4 : w.depth / w.group * 2;
    check_span(w.scales, w.panels * kEnginePanel * scales, what);
  }
  sizes_.operand = std::max(sizes_.operand, w.depth);
}

void EngineMemory::check_layer(const EngineLayer& l) {
  const EngineModel& m = *model_;
  const int64_t wide = round_up(m.head_dim, kEnginePanel);
  check_norm(l.attention_norm, m.width, "attention norm");
  check_norm(l.attention_post_norm, m.width, "attention post norm");
  check_norm(l.mlp_norm, m.width, "feed-forward norm");
  check_norm(l.mlp_post_norm, m.width, "feed-forward post norm");
  const bool whole = l.whole_qk_norm != 0;
  LMFAST_CHECK(!whole || (l.q_norm.kind == 1 && l.k_norm.kind == 1),
               "norms over all heads must be RMSNorm, of queries and keys");
  check_norm(l.q_norm, m.head_dim * (whole ? m.heads : 1), "query norm");
  check_norm(l.k_norm, m.head_dim * (whole ? m.kv_heads : 1), "key norm");
  const int64_t qkv = (m.heads + 2 * m.kv_heads) * wide, joined = m.heads * m.head_dim;
  const int64_t up = round_up(m.hidden, kEnginePanel) * (l.gated != 0 ? 2 : 1);
  check_matrix(l.qkv, qkv, m.width, "queries, keys and values");
  check_matrix(l.o, m.width, joined, "output");
  check_matrix(l.up, up, m.width, "up");
  check_matrix(l.down, m.width, m.hidden, "down");
  LMFAST_CHECK(l.qkv.panels * kEnginePanel == qkv && l.up.panels * kEnginePanel == up &&
                   l.o.panels * kEnginePanel == round_up(m.width, kEnginePanel) &&
                   l.down.panels == l.o.panels,
               "a layer's matrices have the wrong number of panels");
  LMFAST_CHECK(l.rope == kEngineNone || (l.rope >= 0 && l.rope < m.ropes), "unknown rotation");
  LMFAST_CHECK(l.group >= 0 && l.group < m.groups && l.window >= 0, "unknown group or window");
  LMFAST_CHECK(l.activation >= 0 && l.activation <= 3, "unknown activation: ", l.activation);
  if (l.sinks != kEngineNone) check_span(l.sinks, m.heads * 4, "sinks");
  sizes_.qkv = std::max(sizes_.qkv, qkv);
  sizes_.joined = std::max({sizes_.joined, round_up(joined, 64), l.o.depth});
  sizes_.hidden = std::max({sizes_.hidden, round_up(m.hidden, 64), l.down.depth});
  sizes_.posts = sizes_.posts || l.attention_post_norm.kind != 0 || l.mlp_post_norm.kind != 0;
}

}  // namespace lmfast
