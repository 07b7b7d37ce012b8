#include "engine_model.h"

#include <algorithm>
#include <cstring>

#include "bf16_products.h"

namespace lmfast {

using torch::headeronly::ScalarType;

void set_instructions(EngineArgs& a) {
  const Isa isa = current_isa();
  a.vnni = has_byte_products();
  a.bf16 = isa == Isa::kAmx || (isa == Isa::kAvx512 && has_bf16_products());
}

void set_rounding(EngineArgs& a, int64_t rounded) {
  LMFAST_CHECK(rounded >= 0 && rounded <= 2,
               "rounded must be 0, 1 (rows of layers) or 2 (of all products), got ", rounded);
  a.rounded = rounded > 0;
  a.rounded_head = rounded > 1;
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
  const bool recurrent = m.magic == kEngineCellMagic;
  LMFAST_CHECK(m.magic == kEngineMagic || recurrent, "the program was written for another version");
  for (int64_t size : {m.layers, m.width, m.heads, m.kv_heads, m.head_dim, m.hidden, m.vocab}) {
    LMFAST_CHECK(size >= 1 && size <= (int64_t{1} << 31), "a size is out of range: ", size);
  }
  LMFAST_CHECK(m.head_dim <= 256 && m.heads % m.kv_heads == 0, "the heads do not fit");
  LMFAST_CHECK(m.groups >= 1 && m.groups <= m.layers && m.ropes >= 0 && m.ropes <= m.layers,
               "groups or rotations out of range");
  const size_t each = recurrent ? sizeof(EngineCell) : sizeof(EngineLayer);
  LMFAST_CHECK(program.numel() * 8 == static_cast<int64_t>(sizeof(EngineModel)) +
                                          m.layers * static_cast<int64_t>(each),
               "the program has a wrong length");
  if (recurrent) {
    cells_ = reinterpret_cast<const EngineCell*>(model_ + 1);
  } else {
    layers_ = reinterpret_cast<const EngineLayer*>(model_ + 1);
  }
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
  for (int64_t i = 0; i < m.layers; ++i) {
    recurrent ? check_cell(cells_[i]) : check_layer(layers_[i]);
  }
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

void EngineMemory::check_cell(const EngineCell& l) {
  const EngineModel& m = *model_;
  LMFAST_CHECK(l.kind >= 0 && l.kind <= 5, "unknown kind of cell: ", l.kind);
  const int64_t wide = round_up(m.width, kEnginePanel);
  const int64_t input = kEngineInputGates[l.kind] * wide, state = kEngineStateGates[l.kind] * wide;
  const auto check = [&](const EngineMatrix& w, int64_t columns, const char* what) {
    check_matrix(w, columns, m.width, what);
    LMFAST_CHECK(w.panels * kEnginePanel == columns, what, " has the wrong number of panels");
  };
  check(l.input, input, "a layer's input matrix");
  if (state > 0) check(l.state, state, "a layer's state matrix");
  if (l.kind == static_cast<int64_t>(EngineCellKind::kGruTextbook)) {
    check(l.candidate, wide, "a layer's candidate matrix");
  }
  sizes_.qkv = std::max(sizes_.qkv, round_up(input, 64));
  sizes_.hidden = std::max(sizes_.hidden, round_up(state, 64));
  sizes_.joined = round_up(wide, 64);
}

StepParts::StepParts(StepMemory& memory, EngineArgs& a, const EngineSizes& sizes) {
  const int64_t most = std::max(a.tokens, a.outputs);
  constexpr int64_t kWorkOfThread = 1 << 19;  // bytes of weights: 15 to 30 us, a fork takes 4
  const int64_t work = sizes.bytes * (1 + a.tokens / 4);
  const int64_t wanted = std::max<int64_t>(1, work / kWorkOfThread);
  threads_ = std::min<int64_t>({torch::stable::get_num_threads(), wanted, 64});
  a.operand_stride = sizes.operand;
  const bool shared = most > kEngineFewRows || a.rounded || a.rounded_head;
  operand_ = memory.add(shared ? engine_operand_bytes(most, sizes.operand) : 0);
  a.scratch_bytes = round_up(a.attention_scratch + engine_sums(most) * 4 +
                                 engine_private_bytes(most, sizes.operand, shared),
                             4096);
  scratch_ = memory.add(threads_ * a.scratch_bytes);
  const int64_t segments = (a.model->vocab + kEngineSegment - 1) / kEngineSegment;
  best_ = memory.add(a.chosen != nullptr ? a.tokens * segments * 8 : 0);
  progress_ = memory.add(sizeof(EngineProgress));
}

void StepParts::place(char* base, EngineArgs& a) const {
  a.operand = base + operand_;
  a.scratch = base + scratch_;
  a.best = reinterpret_cast<int64_t*>(base + best_);
  a.progress = reinterpret_cast<EngineProgress*>(base + progress_);
  std::memset(static_cast<void*>(a.progress), 0, sizeof(EngineProgress));
  a.progress->participants = threads_;
}

void clear_behind(float* rows, int64_t count, int64_t stride, int64_t width) {
  if (stride == width) return;
  for (int64_t i = 0; i < count; ++i) {
    std::memset(rows + i * stride + width, 0, static_cast<size_t>(4 * (stride - width)));
  }
}

void run_step(const EngineArgs& a, engine_run_fn kernel, int64_t threads) {
  if (threads == 1) return kernel(a, 0, 1);
  torch::stable::parallel_for(0, threads, 1,
                              [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

}  // namespace lmfast
