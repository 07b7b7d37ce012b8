// What the engine does row by row: embeddings, heads on their way into the cache, activations.
#pragma once

#include "engine_operand.h"
#include "glu_math.h"

namespace lmfast::LMFAST_ISA {
namespace {

LMFAST_INLINE float bf16_bits(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// A row of the output matrix, which lies in panels, as an embedding.
inline void unpack_row(const EngineMatrix& w, const char* memory, int64_t row, float* out,
                       int64_t n) {
  const int64_t panel = row / kEnginePanel, lane = row % kEnginePanel;
  const int64_t step = kEngineDepthStep[w.type];
  const EnginePlace p = engine_panel(w, memory, panel);
  const EnginePlace scales = w.group == 0 ? p : engine_scales(w, memory, panel);
  const float column =
      w.group == 0 && is_integer(w) ? reinterpret_cast<const float*>(memory + w.scales)[row] : 1.0f;
  for (int64_t k = 0; k < n; ++k) {
    const char* at = p.at + k / step * p.stride;
    const int64_t j = k % step;
    switch (static_cast<EngineWeights>(w.type)) {
      case EngineWeights::kF32:
        out[k] = reinterpret_cast<const float*>(at)[lane];
        continue;
      case EngineWeights::kBF16:
        out[k] = bf16_bits(reinterpret_cast<const uint16_t*>(at)[2 * lane + j]);
        continue;
      case EngineWeights::kI8:
        out[k] = static_cast<float>(reinterpret_cast<const uint8_t*>(at)[4 * lane + j] - 128);
        break;
      case EngineWeights::kI4: {
        const int byte = reinterpret_cast<const uint8_t*>(at)[4 * lane + j % 4];
        out[k] = static_cast<float>((j < 4 ? byte & 15 : byte >> 4) - 8);
        break;
      }
    }
    if (w.group != 0) {
      float lanes[VecF::kWidth];
      const char* scale = scales.at + k / w.group * scales.stride + lane * 2;
      VecF::load(reinterpret_cast<const f16*>(scale), 1).store(lanes);
      out[k] *= lanes[0];
    } else {
      out[k] *= column;
    }
  }
}

// x = embedding of the token * factor + embedding of its position.
inline void embed(const EngineArgs& a, int64_t token) {
  constexpr int W = VecF::kWidth;
  const EngineModel& m = *a.model;
  float* x = a.x + token * a.x_stride;
  const int64_t id = a.ids[token], n = m.width;
  const char* rows = a.weights + m.embedding;
  if (m.embedding == kEngineNone) {
    unpack_row(m.head, a.weights, id, x, n);
  } else if (m.embedding_type == static_cast<int64_t>(EngineWeights::kF32)) {
    memcpy(x, rows + id * n * 4, static_cast<size_t>(4 * n));
  } else if (m.embedding_type == static_cast<int64_t>(EngineWeights::kBF16)) {
    const uint16_t* row = reinterpret_cast<const uint16_t*>(rows) + id * n;
    for (int64_t i = 0; i < n; ++i) x[i] = bf16_bits(row[i]);
  } else {
    const int8_t* row = reinterpret_cast<const int8_t*>(rows) + id * n;
    const float scale = reinterpret_cast<const float*>(a.weights + m.embedding_scales)[id];
    for (int64_t i = 0; i < n; ++i) x[i] = static_cast<float>(row[i]) * scale;
  }
  const float factor = static_cast<float>(m.embedding_factor);
  const float* position =
      m.positions == kEngineNone
          ? nullptr
          : reinterpret_cast<const float*>(a.weights + m.positions) + a.positions[token] * n;
  for (int64_t i = 0; i < n; i += W) {
    const int lanes = lanes_left(i, n);
    VecF v = VecF::load(x + i, lanes) * VecF::set1(factor);
    if (position != nullptr) v = v + VecF::load(position + i, lanes);
    v.store(x + i, lanes);
  }
}

LMFAST_INLINE VecF activate(EngineActivation kind, VecF x) {
  switch (kind) {
    case EngineActivation::kRelu:
      return max(VecF::zero(), x);  // NaN stays: it comes second
    case EngineActivation::kGelu:
      return GeluErf::value<false>(x);
    case EngineActivation::kGeluTanh:
      return GeluTanh::value<false>(x);
    case EngineActivation::kSilu:
      return Silu::value<false>(x);
  }
  return x;
}

// The rotation and storage of a layer's heads, as rope_append does it.
inline RopeAppendArgs append_arguments(const EngineArgs& a, int64_t layer) {
  const EngineModel& m = *a.model;
  const EngineLayer& l = a.layers[layer];
  const EngineStorage& s = a.storage[layer];
  const int64_t wide = round_up(m.head_dim, kEnginePanel);
  RopeAppendArgs r{};
  r.dtype = DType::kF32;
  r.quantised = s.type == Stored::kI8;
  r.storage =
      s.type == Stored::kF32 ? DType::kF32 : (s.type == Stored::kBF16 ? DType::kBF16 : DType::kF16);
  r.rotated = l.rope != kEngineNone;
  r.interleaved = l.interleaved != 0;
  r.length = a.tokens;
  r.head_dim = m.head_dim;
  if (r.rotated) {
    const EngineTables& t = a.tables[l.rope];
    r.cos = t.cos;
    r.sin = t.sin;
    r.rotary = t.rotary;
    r.q_vectors = a.tokens * m.heads;
  }
  r.positions = a.positions;
  r.slots = a.groups[l.group].slots;
  r.columns = a.groups[l.group].columns;
  r.q = {a.qkv, m.heads, {0, wide, a.qkv_stride}};
  r.k = {a.qkv + m.heads * wide, m.kv_heads, {0, wide, a.qkv_stride}};
  r.v = {a.qkv + (m.heads + m.kv_heads) * wide, m.kv_heads, {0, wide, a.qkv_stride}};
  r.keys = s.keys;
  r.values = s.values;
  return r;
}

// Normalises head `head` (queries, then keys, then values) of a token, rotates and stores it.
LMFAST_INLINE void finish_head(const EngineArgs& a, const EngineLayer& l, const RopeAppendArgs& r,
                               int64_t token, int64_t head) {
  const EngineModel& m = *a.model;
  const int64_t wide = r.q.stride[1];
  float* x = a.qkv + token * a.qkv_stride + head * wide;
  const int64_t key = head - m.heads, value = key - m.kv_heads;
  const EngineNorm& norm = key < 0 ? l.q_norm : l.k_norm;
  if (value < 0 && l.whole_qk_norm == 0 &&
      norm.kind != static_cast<int64_t>(EngineNormKind::kNone)) {
    normalise(norm, a.weights, x, x, m.head_dim);
  }
  int64_t vector = 0;
  if (key < 0) {
    if (!r.rotated) return;
    vector = token * m.heads + head;
  } else if (value < 0) {
    vector = r.q_vectors + (token * m.kv_heads + key) * 2;
  } else {
    vector = r.q_vectors + (token * m.kv_heads + value) * 2 + 1;
  }
  rope_append(r, vector, vector + 1);
}

// RMSNorm over all heads of a token together, whose features are padded to panels.
inline void normalise_heads(const EngineNorm& norm, const char* memory, float* x, int64_t heads,
                            int64_t head_dim) {
  const int64_t wide = round_up(head_dim, kEnginePanel);
  float square = 0.0f;
  for (int64_t i = 0; i < heads * wide; i += VecF::kWidth) {
    const VecF v = VecF::load(x + i);  // padding is zero
    square += sum(v * v);
  }
  const float mean = square / static_cast<float>(heads * head_dim);
  const float scale = 1.0f / square_root(mean + static_cast<float>(norm.eps));
  const float* weight = reinterpret_cast<const float*>(memory + norm.weight);
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t d = 0; d < head_dim; ++d) x[h * wide + d] *= scale * weight[h * head_dim + d];
  }
}

}  // namespace
}  // namespace lmfast::LMFAST_ISA
