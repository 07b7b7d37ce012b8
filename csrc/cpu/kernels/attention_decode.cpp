// Attention of a few query rows on a long cache: decoding.
//
// Floor: memory. Every key and value is read once, for all query heads of its group and all rows
// together (up to kDecodeRows), where it lies and in the type it is stored in; nothing is packed or
// copied, and nothing behind the row's length is touched. The keys are cut into splits, so that one
// sequence with one key head still occupies every thread; a split leaves its maximum, sum and
// unnormalised output, and attention_combine adds the splits in order. Splits depend on the lengths
// only, not on the threads.
//
// How far from the floor, and why. Zen 4, two cores, 8192 keys in huge pages; GB/s of one core that
// finds them in its cache, and of two that read them from memory, where a plain read takes 59:
//   one row of 64    fp32 70, 41   bf16 58, 40   int8 23, 39
//   four rows of 128 fp32 47, 35   bf16 40, 39   int8 10, 19
// Only int8 is bound by arithmetic (attention_decode_bytes.cpp). The others could multiply twice as
// fast as the memory reads, and do not: a read that asks for every line by prefetch, and does
// nothing else, takes 50 of 70 GB/s, one that leaves it to the processor 70, but 50 where 1,000
// cycles without a load come every 16 KB. Left to the processor, four rows of bf16 take 22 of 35
// GB/s instead of 29, since loads wait behind products; one row is as fast either way. With 4 KB
// pages even the plain read takes half.
//
// Per 64 keys, which lie in one row of storage: scores, softmax with the running maximum, outputs
// (attention_decode_unit.h). Products are in fp32 here, for every type; bf16 by bf16 is in
// attention_decode_pairs.cpp, int8 with AVX512-VNNI in attention_decode_bytes.cpp. More rows than
// kDecodeRows are cheaper as lanes (attention_fwd.cpp).
#include "attention_decode_unit.h"

namespace lmfast::LMFAST_ISA {
namespace {

// out = sum of splits, each scaled to the largest maximum, over the sum of their sums and the sink.
template <class T>
void combine_row(const AttentionArgs& a, int64_t at) {
  const int64_t t = at % a.length, head = at / a.length % a.heads, b = at / a.length / a.heads;
  const int64_t group = a.heads / a.kv_heads, rows = attention_rows(a);
  const int64_t padded = round_up(a.head_dim, 32), record = attention_record_size(a);
  const float* first =
      partial_of(a, {b, head / group, 0, 0}) + (head % group * a.length + t) * record;
  const float sink = a.sinks != nullptr ? a.sinks[head] : kLowest;
  const VecF unit = VecF::set1(exponent_unit(a));
  float m = sink;
  for (int64_t i = 0; i < a.splits; ++i) {
    const float x = first[i * rows * record + padded];
    m = x > m ? x : m;
  }
  float lanes[kVec], l = 0.0f;
  alignas(64) float out[256] = {};
  if (a.sinks != nullptr) {
    exp2<6>(VecF::set1(sink - m) * unit).store(lanes);
    l = lanes[0];
  }
  for (int64_t i = 0; i < a.splits; ++i) {
    const float* in = first + i * rows * record;
    const VecF factor = exp2<6>(VecF::set1(in[padded] - m) * unit);
    factor.store(lanes);
    l += lanes[0] * in[padded + 1];
    for (int64_t d = 0; d < padded; d += kVec) {
      fmadd(VecF::load(in + d), factor, VecF::load(out + d)).store(out + d);
    }
  }
  keep_sums(a, at, m, l);
  const VecF inverse = VecF::set1(l == 0.0f ? 0.0f : 1.0f / l);
  T* to = mutable_row_of<T>(a.out, b, head, t);
  for (int64_t d = 0; d < a.head_dim; d += kVec) {
    const int n = static_cast<int>(a.head_dim - d < kVec ? a.head_dim - d : kVec);
    (VecF::load(out + d) * inverse).store(to + d, n);
  }
}

}  // namespace

void attention_decode(const AttentionArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    by_stored_type(a.stored.type, [&](auto type) {
      decode_unit<FloatProducts<typename decltype(type)::type>>(a, i);
    });
  }
}

void attention_combine(const AttentionArgs& a, int64_t begin, int64_t end) {
  LMFAST_DISPATCH_DTYPE(a.dtype, scalar_t, {
    if constexpr (sizeof(scalar_t) <= sizeof(float)) {
      for (int64_t i = begin; i < end; ++i) combine_row<scalar_t>(a, i);
    }
  })
}

}  // namespace lmfast::LMFAST_ISA
