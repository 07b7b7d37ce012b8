// Recurrent weights as AMX tiles in the order the products read them. Panel, column tile, k tile:
// forward, the columns of a panel are all gates of 16 units (Elman: 64 units) and k runs over the
// state; backward, they are 64 units and k runs over the gates' gradients.
#include "recurrent_bf16_tile.h"

namespace lmfast::LMFAST_ISA {

#if defined(LMFAST_AMX)

namespace {

template <class T>
void pack_fwd(const RecurrentBf16PackArgs& a, int64_t panel) {
  const int64_t hidden = a.hidden, tiles = hidden / kTileDepth, gates = gates_of(a.cell);
  const int64_t units = recurrent_bf16_units(a.cell, false), vecs = units / 16 * gates;
  char* out = static_cast<char*>(a.packed) + panel * vecs * tiles * kTileBytes;
  for (int64_t v = 0; v < vecs; ++v) {
    const int64_t unit = panel * units + v / gates * 16;
    const int64_t rows = least(16, hidden - unit);
    const T* w = static_cast<const T*>(a.w) + ((v % gates) * hidden + unit) * hidden;
    for (int64_t k = 0; k < tiles; ++k, out += kTileBytes) {
      pack_transposed(w + k * kTileDepth, hidden, static_cast<int>(most(0, rows)), kTileDepth, out);
    }
  }
}

template <class T>
void pack_bwd(const RecurrentBf16PackArgs& a, int64_t panel) {
  const int64_t hidden = a.hidden, depth = gates_of(a.cell) * hidden, tiles = depth / kTileDepth;
  char* out = static_cast<char*>(a.packed) + panel * 4 * tiles * kTileBytes;
  for (int pair = 0; pair < 2; ++pair, out += 2 * tiles * kTileBytes) {
    const int64_t unit = panel * 64 + pair * 32;
    if (unit >= hidden) continue;  // never multiplied
    for (int64_t k = 0; k < tiles; ++k) {
      const int64_t row = weight_row(a.cell, k * kTileDepth, hidden);
      const T* w = static_cast<const T*>(a.w) + row * hidden + unit;
      pack_rows(w, hidden, kTileDepth, kTileDepth, out + k * kTileBytes, tiles * kTileBytes);
    }
  }
}

}  // namespace

void recurrent_bf16_pack(const RecurrentBf16PackArgs& a, int64_t begin, int64_t end) {
  for (int64_t p = begin; p < end; ++p) {
    if (a.dtype == DType::kF32) {
      a.backward ? pack_bwd<float>(a, p) : pack_fwd<float>(a, p);
    } else {
      a.backward ? pack_bwd<bf16>(a, p) : pack_fwd<bf16>(a, p);
    }
  }
}

#else

void recurrent_bf16_pack(const RecurrentBf16PackArgs&, int64_t, int64_t) {}

#endif

}  // namespace lmfast::LMFAST_ISA
