// Linear cross-entropy with bf16 products on AVX512-BF16, for processors without AMX: a block of
// tokens at a time, as linear_cross_entropy.cpp does it in fp32.
//
// Floor: three products of N x E x V at 466 GF/s, the measured peak of vdpbf16ps on two cores of a
// Zen 4 EPYC: 196 ms for 3712 x 128 x 32011.
//
// Measured there: 250 ms (476 in fp32; PyTorch's bf16 products with logits in memory 367). Of a
// thread's time 86 % are the three products, at 96, 96 and 84 % of the peak, 7 % exponentials and
// 4 % rounding weight.
//   - The exponentials of a block are kept in bf16 (V x 256, 16 MB) for the weight gradient: two
//     passes over the logits, as on AMX, have a fourth product, and took 302 ms.
//   - The exponentials that dweight reads next are prefetched: from 73 to 84 % of the peak.
//   - Chunks of 256 classes are no slower than of 128, and dhidden's sums, a panel of 16 tokens
//     after the other, are added over the slices in one go: 1 % of the time where it was 5.
//   - No faster: weight rounded once for all blocks of tokens, which then comes from memory (3 %
//     slower); blocks of 384 or 512 tokens (within 1 %); two or three strips of dweight to a panel
//     of hidden (1 to 4 % slower). Adding to dweight costs nothing beside its products.
//
// vdpbf16ps sums pairs of neighbours along the summed dimension, so each of the three products
// wants pairs of another one: columns for the logits, classes for dhidden, tokens for dweight.
// Nothing is transposed for that. A (dots_bf16.h) may lie by rows or by pairs of rows: weight is
// rounded to both, 8 KB at a time; the exponentials leave the registers as rows (pairs of tokens)
// for dweight and interleaved with the row below (pairs of classes) for dhidden.
#include "../dots_bf16.h"
#include "../simd.h"
#include "../simd_exp.h"
#include "linear_cross_entropy_block.h"

namespace lmfast::LMFAST_ISA {

#if defined(__AVX512BF16__)

namespace {

constexpr int64_t kChunk = kLceBf16Chunk, kBlock = kLceBf16Block;
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kGone = -1e30f;  // a logit without weight

enum class Mode { kSum, kMax };

LMFAST_INLINE void slice_range(const LceBlockArgs& a, int64_t slice, int64_t* begin, int64_t* end) {
  const int64_t chunks = (a.p.classes + kChunk - 1) / kChunk;
  *begin = chunks * slice / a.slices * kChunk;
  *end = smaller(chunks * (slice + 1) / a.slices * kChunk, a.p.classes);
}

// Rows k and k + 1 of 16 floats as 16 pairs.
LMFAST_INLINE __m512i interleaved_pairs(__m512 even, __m512 odd) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, to_pairs(even, odd));
}

template <class W>
LMFAST_INLINE __m512i load_rounded(const W* p, int64_t n) {
  const int low = static_cast<int>(n < 0 ? 0 : n > 16 ? 16 : n);
  const int high = static_cast<int>(n < 16 ? 0 : n > 32 ? 16 : n - 16);
  return to_pairs(low == 16 ? VecF::load(p).v : VecF::load(p, low).v,
                  high == 16 ? VecF::load(p + 16).v : VecF::load(p + 16, high).v);
}
LMFAST_INLINE __m512i load_rounded(const bf16* p, int64_t n) {
  return n >= 32 ? load_pairs(p) : load_pairs(p, static_cast<int>(n));
}

// A chunk of weight, `classes` rows from `first`, as rows and as pairs of rows of bf16.
template <class W, bool kTransposed>
void pack_weight(const LceBlockArgs& a, const LceBf16Layout& at, int64_t first, int64_t classes,
                 char* to) {
  const LceProblem& p = a.p;
  const int64_t stride = kTransposed ? p.weight_column_stride : p.weight_row_stride;
  const W* from = static_cast<const W*>(p.weight) + (kTransposed ? first : first * stride);
  const int64_t rows = kTransposed ? p.width : classes, columns = kTransposed ? classes : p.width;
  const int64_t padded = kTransposed ? a.padded_width : (classes + kBlock - 1) / kBlock * kBlock;
  for (int64_t r = 0; r < padded; r += 2) {
    const W* even = from + r * stride;
    char *even_row = to + r * at.row_bytes, *pair_row = to + at.pairs + r / 2 * at.pair_bytes;
    for (int64_t i = 0; i < at.columns; i += 32) {
      const __m512i x = r < rows ? load_rounded(even + i, columns - i) : _mm512_setzero_si512();
      const __m512i y =
          r + 1 < rows ? load_rounded(even + stride + i, columns - i) : _mm512_setzero_si512();
      __m512i low, high;
      interleave(x, y, &low, &high);
      _mm512_storeu_si512(even_row + 2 * i, x);
      _mm512_storeu_si512(even_row + at.row_bytes + 2 * i, y);
      _mm512_storeu_si512(pair_row + 4 * i, low);
      _mm512_storeu_si512(pair_row + 4 * i + 64, high);
    }
  }
}

// Places of the chunk's logits that are left out: the targets.
struct Holes {
  int64_t count;
  int32_t row[256], lane[256];
};

inline void find_holes(const LceBlockArgs& a, int64_t first, int64_t classes, Holes* holes) {
  holes->count = 0;
  for (int64_t n = 0; n < a.tokens; ++n) {
    const int64_t row = a.p.target[a.first_token + n] - first;
    if (row < 0 || row >= classes) continue;
    holes->row[holes->count] = static_cast<int32_t>(row);
    holes->lane[holes->count++] = static_cast<int32_t>(n);
  }
}

// What exponentiates a block of logits, [class][lane], rows of 32.
template <Mode kMode, bool kCap>
struct Exponentials {
  const LceBlockArgs& a;
  const float* row_add;  // [chunk]: bias, or kGone behind the last class
  char* pairs;           // of the chunk's probs, panels of kChunk / 2 pairs
  float* sums;
  __m512 center[2], sum[2];

  LMFAST_INLINE void start(int64_t n) {
    for (int j = 0; j < 2; ++j) {
      const __m512 unit = _mm512_set1_ps(kCap ? 1.0f : -kLog2e);
      center[j] = _mm512_mul_ps(_mm512_loadu_ps(a.center + n + 16 * j), unit);
      sum[j] = kMode == Mode::kMax ? _mm512_loadu_ps(sums + n + 16 * j) : _mm512_setzero_ps();
    }
  }
  LMFAST_INLINE void end(int64_t n) {
    for (int j = 0; j < 2; ++j) {
      float* to = sums + n + 16 * j;
      if (kMode == Mode::kSum) sum[j] = _mm512_add_ps(sum[j], _mm512_loadu_ps(to));
      _mm512_storeu_ps(to, sum[j]);
    }
  }

  // Two rows of 16 lanes at s and s + 32; e: what is kept.
  LMFAST_INLINE void two(const float* s, int64_t row, int j, __m512* e) {
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r) {
      const __m512 logit = _mm512_loadu_ps(s + r * 32), add = _mm512_set1_ps(row_add[row + r]);
      VecF ratio{}, z{_mm512_add_ps(logit, add)};
      if constexpr (kCap) z = capped(z, a.p.softcap, &ratio);
      if constexpr (kMode == Mode::kMax) {
        // A NaN logit as the second operand is what max returns.
        sum[j] = _mm512_max_ps(sum[j], z.v);
        continue;
      }
      if constexpr (kCap) {
        const __mmask16 there = _mm512_cmp_ps_mask(_mm512_add_ps(logit, add),
                                                   _mm512_set1_ps(kGone * 0.5f), _CMP_NLE_US);
        e[r] = _mm512_maskz_mov_ps(there, exp({_mm512_sub_ps(z.v, center[j])}).v);
        sum[j] = _mm512_add_ps(sum[j], e[r]);
        e[r] = _mm512_mul_ps(e[r], _mm512_fnmadd_ps(ratio.v, ratio.v, _mm512_set1_ps(1.0f)));
      } else {
        e[r] = exp2<4>({_mm512_fmadd_ps(z.v, _mm512_set1_ps(kLog2e), center[j])}).v;
        sum[j] = _mm512_add_ps(sum[j], e[r]);
      }
    }
  }

  // A block at rows `row` of the chunk, which is class `first`, and lanes n.
  LMFAST_INLINE void block(const float* s, int64_t first, int64_t row, int64_t n) {
    for (int64_t r = row; r < row + kBlock; r += 2, s += 64) {
      __m512 low[2], high[2];
      two(s, r, 0, low);
      two(s + 16, r, 1, high);
      if (kMode == Mode::kMax) continue;
      const __m512i even = to_pairs(low[0], high[0]), odd = to_pairs(low[1], high[1]);
      if (a.probs_rows != nullptr) {
        char* to = a.probs_rows + ((first + r) * a.lanes + n) * 2;
        _mm512_storeu_si512(to, even);
        _mm512_storeu_si512(to + 2 * a.lanes, odd);
      }
      if (a.dhidden_t == nullptr) continue;
      __m512i first_lanes, other_lanes;
      interleave(even, odd, &first_lanes, &other_lanes);
      char* to = pairs + (n / 16 * (kChunk / 2) + r / 2) * 64;
      _mm512_storeu_si512(to, first_lanes);
      _mm512_storeu_si512(to + kChunk / 2 * 64, other_lanes);
    }
  }
};

// The logits of a chunk and what `exp` makes of them.
template <bool kTransposed, class Exp>
void chunk_probs(const LceBlockArgs& a, const LceBf16Layout& at, const char* weight, int64_t first,
                 int64_t classes, const Holes& holes, Exp exp) {
  alignas(64) float s[kBlock * kBlock];
  const int64_t pairs = a.padded_width / 2;
  for (int64_t n = 0; n < a.lanes; n += kBlock) {
    exp.start(n);
    for (int64_t row = 0; row < classes; row += kBlock) {
      for (int i = 0; i < 4; ++i) {
        const int64_t v = row + i / 2 * 16, lane = n / 16 + i % 2;
        const DotOperand rows = kTransposed ? DotOperand{weight + at.pairs + 4 * v, at.pair_bytes}
                                            : DotOperand{weight + v * at.row_bytes, at.row_bytes};
        dots_bf16<kTransposed, false>(s + i / 2 * 16 * kBlock + i % 2 * 16, kBlock, rows,
                                      a.hidden_pairs + lane * pairs * 64, pairs);
      }
      for (int64_t i = 0; i < holes.count; ++i) {
        const int64_t r = holes.row[i] - row, lane = holes.lane[i] - n;
        if (r >= 0 && r < kBlock && lane >= 0 && lane < kBlock) s[r * kBlock + lane] = kGone;
      }
      exp.block(s, first, row, n);
    }
    exp.end(n);
  }
}

// dhidden_t[lane / 16][column][lane] = or += sum over the chunk's classes of weight * probs.
template <bool kTransposed>
void chunk_dhidden(const LceBlockArgs& a, const LceBf16Layout& at, const char* weight,
                   const char* probs, int64_t classes, float* dhidden_t, bool add) {
  const int64_t pairs = (classes + kBlock - 1) / kBlock * (kBlock / 2);
  for (int64_t n = 0; n < a.lanes; n += 16) {
    const char* b = probs + n / 16 * (kChunk / 2) * 64;
    for (int64_t e = 0; e < a.padded_width; e += 16) {
      const DotOperand columns = kTransposed ? DotOperand{weight + e * at.row_bytes, at.row_bytes}
                                             : DotOperand{weight + at.pairs + 4 * e, at.pair_bytes};
      float* c = dhidden_t + n * a.dhidden_rows + e * 16;
      add ? dots_bf16<!kTransposed, true>(c, 16, columns, b, pairs)
          : dots_bf16<!kTransposed, false>(c, 16, columns, b, pairs);
    }
  }
}

template <class W, bool kTransposed, Mode kMode>
void slices_of(const LceBlockArgs& a, int64_t begin, int64_t end) {
  const LceBf16Layout at = lce_bf16_layout(a);
  alignas(64) float row_add[kChunk];
  Holes holes{};
  for (int64_t slice = begin; slice < end; ++slice) {
    int64_t first, past;
    slice_range(a, slice, &first, &past);
    float* sums = a.sums + slice * a.lanes;
    float* dhidden_t =
        a.dhidden_t == nullptr ? nullptr : a.dhidden_t + slice * a.dhidden_rows * a.lanes;
    for (int64_t n = 0; n < a.lanes; ++n) sums[n] = kMode == Mode::kMax ? -INFINITY : 0.0f;
    for (int64_t v = first; v < past; v += kChunk) {
      const int64_t classes = smaller(kChunk, past - v);
      pack_weight<W, kTransposed>(a, at, v, classes, a.scratch);
      for (int64_t r = 0; r < kChunk; ++r) {
        row_add[r] = r >= classes ? kGone : a.p.bias != nullptr ? a.p.bias[v + r] : 0.0f;
      }
      if (kMode == Mode::kSum) find_holes(a, v, classes, &holes);
      char* probs = a.scratch + at.probs;
      const auto run = [&](auto exp) {
        chunk_probs<kTransposed>(a, at, a.scratch, v, classes, holes, exp);
      };
      a.p.softcap > 0 ? run(Exponentials<kMode, true>{a, row_add, probs, sums, {}, {}})
                      : run(Exponentials<kMode, false>{a, row_add, probs, sums, {}, {}});
      if (kMode == Mode::kSum && dhidden_t != nullptr) {
        chunk_dhidden<kTransposed>(a, at, a.scratch, probs, classes, dhidden_t, v != first);
      }
    }
  }
}

template <Mode kMode>
void slices(const LceBlockArgs& a, int64_t begin, int64_t end) {
  const bool transposed = a.p.weight_column_stride != 1;
  switch (a.p.weight_dtype) {
    case DType::kF32:
      return transposed ? slices_of<float, true, kMode>(a, begin, end)
                        : slices_of<float, false, kMode>(a, begin, end);
    case DType::kBF16:
      return transposed ? slices_of<bf16, true, kMode>(a, begin, end)
                        : slices_of<bf16, false, kMode>(a, begin, end);
    case DType::kF16:
      return transposed ? slices_of<f16, true, kMode>(a, begin, end)
                        : slices_of<f16, false, kMode>(a, begin, end);
    case DType::kF64:
      return;
  }
}

// 16 rows of dweight from the strip's probs; `rows` of them exist.
void strip_dweight(const LceBlockArgs& a, int64_t v, int64_t rows) {
  const DotOperand probs = {a.probs_rows + v * a.lanes * 2, a.lanes * 2};
  const int64_t pairs = a.lanes / 2, bytes = a.lanes * 2, panels = a.padded_width / 16;
  for (int64_t e = 0; e < a.padded_width; e += 16) {
    // Of the probs, which come from the last-level cache, 16 short rows are too little for the
    // processor to foresee.
    const int64_t panel = e / 16, lines = bytes / 64;
    for (int64_t at = lines * panel / panels * 64; at < lines * (panel + 1) / panels * 64;
         at += 64) {
      for (int64_t r = 16; r < 32; ++r) _mm_prefetch(probs.at + r * bytes + at, _MM_HINT_T0);
    }
    const char* b = a.scaled_pairs + e / 16 * pairs * 64;
    float* c = a.dweight + v * a.padded_width + e;
    alignas(64) float tile[16 * 16];
    float* to = rows == 16 ? c : tile;
    const int64_t stride = rows == 16 ? a.padded_width : 16;
    const auto copy = [&](bool back) {
      for (int64_t r = 0; rows < 16 && r < rows; ++r) {
        if (back) memcpy(c + r * a.padded_width, tile + 16 * r, 64);
        if (!back) memcpy(tile + 16 * r, c + r * a.padded_width, 64);
      }
    };
    if (a.accumulate) {
      copy(false);
      dots_bf16<false, true>(to, stride, probs, b, pairs);
    } else {
      dots_bf16<false, false>(to, stride, probs, b, pairs);
      if (a.uniform != nullptr) {
        const VecF uniform = VecF::load(a.uniform + e);
        for (int64_t r = 0; r < 16; ++r) {
          (VecF::load(to + r * stride) + uniform).store(to + r * stride);
        }
      }
    }
    copy(true);
  }
}

}  // namespace

void lce_bf16_pack(const LceBlockArgs& a, int64_t begin, int64_t end) {
  const int64_t pairs = a.padded_width / 2, width = a.p.width;
  for (int64_t k = begin * kLceGroup / 2; k < end * kLceGroup / 2; ++k) {
    const float* row = a.hidden_t + 2 * k * a.lanes;
    for (int64_t n = 0; n < a.lanes; n += 16) {
      const VecF even = 2 * k < width ? VecF::load(row + n) : VecF::zero();
      const VecF odd = 2 * k + 1 < width ? VecF::load(row + a.lanes + n) : VecF::zero();
      _mm512_storeu_si512(a.hidden_pairs + (n / 16 * pairs + k) * 64,
                          interleaved_pairs(even.v, odd.v));
    }
  }
}

void lce_bf16_max(const LceBlockArgs& a, int64_t begin, int64_t end) {
  slices<Mode::kMax>(a, begin, end);
}

void lce_bf16_forward(const LceBlockArgs& a, int64_t begin, int64_t end) {
  slices<Mode::kSum>(a, begin, end);
}

void lce_bf16_scale(const LceBlockArgs& a, int64_t begin, int64_t end) {
  const int64_t pairs = a.lanes / 2;
  for (int64_t e = begin * kLceGroup; e < end * kLceGroup; e += kLceGroup) {
    char* to = a.scaled_pairs + e / 16 * pairs * 64;
    const float* from = a.hidden_scaled + e;
    for (int64_t k = 0; k < pairs; ++k, from += 2 * a.padded_width, to += 64) {
      const VecF even = VecF::load(from), odd = VecF::load(from + a.padded_width);
      _mm512_storeu_si512(to, interleaved_pairs(even.v, odd.v));
    }
  }
}

void lce_bf16_dweight(const LceBlockArgs& a, int64_t begin, int64_t end) {
  for (int64_t slice = begin; slice < end; ++slice) {
    int64_t first, past;
    slice_range(a, slice, &first, &past);
    for (int64_t v = first; a.dbias != nullptr && v < past; ++v) {
      const bf16* probs = reinterpret_cast<const bf16*>(a.probs_rows) + v * a.lanes;
      VecF total = VecF::zero();
      for (int64_t n = 0; n < a.lanes; n += 16) {
        total = fmadd(VecF::load(probs + n), VecF::load(a.coefficient + n), total);
      }
      a.dbias[v] = sum(total) + (a.accumulate ? a.dbias[v] : a.uniform_bias);
    }
    for (int64_t v = first; a.dweight != nullptr && v < past; v += 16) {
      strip_dweight(a, v, smaller(16, past - v));
    }
    add_targets(a, first, past);
  }
}

#else

void lce_bf16_pack(const LceBlockArgs&, int64_t, int64_t) {}
void lce_bf16_max(const LceBlockArgs&, int64_t, int64_t) {}
void lce_bf16_forward(const LceBlockArgs&, int64_t, int64_t) {}
void lce_bf16_scale(const LceBlockArgs&, int64_t, int64_t) {}
void lce_bf16_dweight(const LceBlockArgs&, int64_t, int64_t) {}

#endif

}  // namespace lmfast::LMFAST_ISA
