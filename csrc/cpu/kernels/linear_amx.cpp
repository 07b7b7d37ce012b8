// out = act(a b^T + bias) on AMX tiles, for operands in fp32 by rows or by columns: the
// forward of a linear layer and both products of its backward.
//
// Floor: the tiles' 2.4 to 2.7 TF/s per core with operands from L1 or L2, a sixth of it where fp32
// is split into three parts, and reading a and b and writing out once.
//
// Measured on two cores, forward, ms (PyTorch's product in the same precision in brackets):
//   rows x depth x columns    one part ("medium")    three parts (fp32)
//   3712 x 128 x 512          0.52 (0.60 to 0.82)    0.96 (1.36)
//   3712 x 512 x 128          0.43 (0.57)            1.09 (1.57)
//   2048 x 768 x 3072         5.2 (8.4)              18.7 (25.8)
//   512 x 2048 x 8192         13.4 (19.7)            48 (49.6)
// The errors of three parts are half of PyTorch's fp32. bf16 operands gain nothing (0.40 to 0.33
// ms, 5.4 to 4.4): they stay with PyTorch. Of 5.2 ms packing b takes 0.4, packing a 0.1, finishing
// 0.9; keeping 8 steps of a panel of b in L1 gains 5 to 10 %, and blocks of 512 rows lose 40 % at a
// depth of 2048. A ReLU on its own costs 0.16 ms at 3712 x 512 and is free here; fusing GELU as
// well would save 5 % of a layer.
//
// With AVX512-BF16 alone, one part, one thread of a Zen 4 EPYC, the first three rows: 2.9, 2.9 and
// 51 ms of 2.1, 2.1 and 41 at the peak of vdpbf16ps; PyTorch, whose fp32 products gain 10 % from
// "medium" there, takes 5.2, 5.0 and 97 in fp32.
#include "linear_amx.h"

#include "../amx.h"

namespace lmfast::LMFAST_ISA {

#if defined(LMFAST_AMX)

namespace {

LMFAST_INLINE int at_most(int64_t n, int limit) {
  return static_cast<int>(n < 0 ? 0 : n > limit ? limit : n);
}

// 32 neighbours in memory as parts; of the last, n exist.
template <int kParts>
LMFAST_INLINE void load_parts(const float* p, int n, __m512i* parts) {
  if constexpr (kParts == 1) {
    parts[0] = n >= 32 ? load_pairs(p) : load_pairs(p, n);
  } else {
    const VecF low = n >= 16 ? VecF::load(p) : VecF::load(p, n);
    const VecF high = n >= 32 ? VecF::load(p + 16) : VecF::load(p + 16, n > 16 ? n - 16 : 0);
    split_floats<kParts>(low.v, high.v, parts);
  }
}

// 16 rows of 32 numbers: parts[part][row].
template <int kParts>
LMFAST_INLINE void load_rows(const float* p, int64_t stride, int rows, int n, __m512i (*r)[16]) {
  for (int i = 0; i < 16; ++i) {
    __m512i parts[kParts];
    load_parts<kParts>(p + i * stride, i < rows ? n : 0, parts);
    for (int part = 0; part < kParts; ++part) r[part][i] = parts[part];
  }
}

LMFAST_INLINE void store_tile(const __m512i* r, char* tile) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(tile + 64 * i, r[i]);
}

// One step of 32 rows of an operand: per part, two tiles of 16 rows. As A the rows lie as they are;
// as B they are columns in pairs.
template <int kParts, bool kIsB>
LMFAST_INLINE void pack_step(const LinearOperand& m, int64_t row, int64_t rows, int64_t k,
                             int64_t depth, char* to) {
  const float* p = m.data;
  const int count = at_most(depth - k, 32);
  if (!m.by_columns) {
    for (int half = 0; half < 2; ++half) {
      __m512i r[kParts][16];
      const int64_t first = row + 16 * half;
      load_rows<kParts>(p + first * m.stride + k, m.stride, at_most(rows - first, 16), count, r);
      for (int part = 0; part < kParts; ++part) {
        if constexpr (kIsB) transpose_words(r[part]);
        store_tile(r[part], to + part * kPanelStep + half * kTileBytes);
      }
    }
    return;
  }
  // Vectors run along the rows of the operand: rows k and k + 1 become pairs.
  const int n = at_most(rows - row, 32);
  __m512i low[kParts][16], high[kParts][16];
  for (int i = 0; i < 16; ++i) {
    __m512i even[kParts], odd[kParts];
    const float* q = p + (k + 2 * i) * m.stride + row;
    load_parts<kParts>(q, 2 * i < count ? n : 0, even);
    load_parts<kParts>(q + m.stride, 2 * i + 1 < count ? n : 0, odd);
    for (int part = 0; part < kParts; ++part) {
      interleave(even[part], odd[part], &low[part][i], &high[part][i]);
    }
  }
  for (int part = 0; part < kParts; ++part) {
    if constexpr (!kIsB) {
      transpose_words(low[part]);
      transpose_words(high[part]);
    }
    store_tile(low[part], to + part * kPanelStep);
    store_tile(high[part], to + part * kPanelStep + kTileBytes);
  }
}

template <int kParts, bool kIsB>
void pack_panel(const LinearAmxArgs& a, const LinearOperand& m, int64_t row, int64_t rows,
                char* to) {
  for (int64_t s = 0; s < a.steps; ++s, to += kParts * kPanelStep) {
    const int64_t k = a.first + 32 * s;
    pack_step<kParts, kIsB>(m, row, rows, k, a.depth, to);
  }
}

#if defined(__AMX_TILE__)

template <int kParts, int i>
LMFAST_INLINE void dot_pair(const char* a, const char* b) {
  using P = Pairs<kParts>;
  constexpr bool kFresh = i == 0 || i == P::kSmall;
  constexpr int before = i == 0 ? 0 : i - 1;
  if constexpr (kFresh || P::a[i] != P::a[before]) {
    tile_load<4>(a + P::a[i] * kPanelStep, 64);
    tile_load<5>(a + P::a[i] * kPanelStep + kTileBytes, 64);
  }
  if constexpr (kFresh || P::b[i] != P::b[before]) {
    tile_load<6>(b + P::b[i] * kPanelStep, 64);
    tile_load<7>(b + P::b[i] * kPanelStep + kTileBytes, 64);
  }
  tile_dot<0, 4, 6>();
  tile_dot<2, 5, 6>();
  tile_dot<1, 4, 7>();
  tile_dot<3, 5, 7>();
}

// 32 x 32 numbers of a b^T over some steps, to c with rows of 32 or added to what is there.
template <int kParts>
LMFAST_INLINE void multiply_panels(const char* a, const char* b, int64_t steps, bool add,
                                   float* c) {
  constexpr int kSmall = Pairs<kParts>::kSmall;
  constexpr int64_t kStep = kParts * kPanelStep;
  if (add) {
    tile_load<0>(c, 128);
    tile_load<1>(c + 16, 128);
    tile_load<2>(c + 16 * 32, 128);
    tile_load<3>(c + 16 * 32 + 16, 128);
  } else {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
  }
  if constexpr (kSmall > 0) {
    for (int64_t s = 0; s < steps; ++s) {
      dot_pair<kParts, 0>(a + s * kStep, b + s * kStep);
      dot_pair<kParts, 1>(a + s * kStep, b + s * kStep);
      dot_pair<kParts, 2>(a + s * kStep, b + s * kStep);
      dot_pair<kParts, 3>(a + s * kStep, b + s * kStep);
      dot_pair<kParts, 4>(a + s * kStep, b + s * kStep);
    }
  }
  for (int64_t s = 0; s < steps; ++s) dot_pair<kParts, kSmall>(a + s * kStep, b + s * kStep);
  tile_store<0>(c, 128);
  tile_store<1>(c + 16, 128);
  tile_store<2>(c + 16 * 32, 128);
  tile_store<3>(c + 16 * 32 + 16, 128);
}

#else

// The same on tiles_avx512.h, for one part alone (the binding asks for no more): sums stay in
// registers from the first step to the last.
template <int kParts>
LMFAST_INLINE void multiply_panels(const char* a, const char* b, int64_t steps, bool add,
                                   float* c) {
  constexpr int64_t kStep = kParts * kPanelStep;
  for (int i = 0; i < 4; ++i) {
    const SoftOperand rows = {a + i / 2 * kTileBytes, 64, kStep};
    const SoftOperand columns = {b + i % 2 * kTileBytes, 64, kStep};
    float* to = c + i / 2 * 16 * 32 + i % 2 * 16;
    add ? soft_dots<true>(to, 32, rows, columns, steps)
        : soft_dots<false>(to, 32, rows, columns, steps);
  }
}

#endif

// Adds what chunks before gave, then the bias, applies the activation and writes to out.
LMFAST_INLINE void finish(const LinearAmxArgs& a, int64_t row, int64_t column, const float* c) {
  const int rows = at_most(a.rows - row, 32);
  const VecF zero = VecF::zero();
  for (int half = 0; half < 2; ++half) {
    const int64_t first = column + 16 * half;
    const int n = at_most(a.columns - first, 16);
    if (n == 0) return;
    const VecF bias = a.is_last && a.bias != nullptr ? VecF::load(a.bias + first, n) : VecF::zero();
    for (int r = 0; r < rows; ++r) {
      const int64_t at = (row + r) * a.columns + first;
      VecF v = VecF::load(c + 32 * r + 16 * half);
      if (!a.is_first) v = v + VecF::load(a.out + at, n);
      if (!a.is_last) {
        v.store(a.out + at, n);
        continue;
      }
      v = v + bias;
      if (a.relu) v = max(zero, v);  // the second operand, NaN too
      v.store(a.out + at, n);
    }
  }
}

template <int kParts>
void multiply_block(const LinearAmxArgs& a, int64_t block, char* scratch) {
  const int64_t first = block * a.block, panel = kParts * kPanelStep * a.steps;
  const int64_t past = first + a.block < a.rows ? first + a.block : a.rows;
  float* c = reinterpret_cast<float*>(scratch);
  char* packed = scratch + a.block / 32 * kLinearTileBytes;
  for (int64_t row = first; row < past; row += 32) {
    pack_panel<kParts, false>(a, a.a, row, a.rows, packed + (row - first) / 32 * panel);
  }
  const int64_t groups = (past - first + 31) / 32;
  for (int64_t column = 0; column < a.columns; column += 32) {
    const char* b = a.packed_b + column / 32 * panel;
    for (int64_t s = 0; s < a.steps; s += a.hot_steps) {
      const int64_t left = a.steps - s, steps = left < a.hot_steps ? left : a.hot_steps;
      const int64_t at = s * kParts * kPanelStep;
      for (int64_t g = 0; g < groups; ++g) {
        float* product = c + g * 1024;
        multiply_panels<kParts>(packed + g * panel + at, b + at, steps, s > 0, product);
        if (left > a.hot_steps) continue;
        finish(a, first + 32 * g, column, product);
      }
    }
  }
}

}  // namespace

void linear_amx_pack(const LinearAmxArgs& a, int64_t begin, int64_t end) {
  const int64_t panel = a.parts * kPanelStep * a.steps;
  for (int64_t i = begin; i < end; ++i) {
    char* to = a.packed_b + i * panel;
    if (a.parts == 1) {
      pack_panel<1, true>(a, a.b, 32 * i, a.columns, to);
    } else {
      pack_panel<3, true>(a, a.b, 32 * i, a.columns, to);
    }
  }
}

void linear_amx_multiply(const LinearAmxArgs& a, int64_t begin, int64_t end) {
  const TileSession session;
  for (int64_t block = begin; block < end; ++block) {
    char* scratch = static_cast<char*>(a.scratch);
    a.parts == 1 ? multiply_block<1>(a, block, scratch) : multiply_block<3>(a, block, scratch);
  }
}

#else

void linear_amx_pack(const LinearAmxArgs&, int64_t, int64_t) {}
void linear_amx_multiply(const LinearAmxArgs&, int64_t, int64_t) {}

#endif

}  // namespace lmfast::LMFAST_ISA
