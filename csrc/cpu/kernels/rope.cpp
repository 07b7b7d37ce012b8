// Rotary position embedding of q and k in one pass.
//
// Floor: memory traffic, one read and one write of q and k; the tables (length * rotary/2 * 8
// bytes, 256 KB at 1024 x 64) stay in the second-level cache while one head after the other uses
// them. Vectors of D elements are walked in the order in which they lie in memory, so both
// (B,H,T,D) and a (B,T,H,D) projection seen as (B,H,T,D) are read in place at full speed. The
// backward is the rotation by the negative angle, the same kernel with the sine's sign turned.
//
// Formula: Su et al. 2021, https://arxiv.org/abs/2104.09864.
#include "rope.h"

#include "rope_rows.h"

namespace lmfast::LMFAST_ISA {
namespace {

// Asks for the cache lines of the vector kAhead bytes further on, which the walk in memory order is
// about to reach: the hardware's own prefetch stops at every 4 KB page. Never faults.
template <class T>
LMFAST_INLINE void prefetch_row(const T* x, int64_t head_dim) {
  constexpr int64_t kAhead = 2048, kLine = 64;
  const char* p = reinterpret_cast<const char*>(x) + kAhead;
  const int64_t bytes = head_dim * static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(p + i);
}

// Where a vector of the flat range lies: token `t` of row `b`, head `h` of q and k together.
struct Place {
  int64_t b, h, t;
};

LMFAST_INLINE Place place_of(const RopeArgs& a, int64_t heads, int64_t index) {
  const int64_t inner = a.heads_innermost ? heads : a.length;
  const int64_t middle = a.heads_innermost ? a.length : heads;
  const int64_t i = index % inner, rest = index / inner;
  const int64_t m = rest % middle, b = rest / middle;
  return a.heads_innermost ? Place{b, i, m} : Place{b, m, i};
}

LMFAST_INLINE void advance(const RopeArgs& a, int64_t heads, Place& p) {
  if (a.heads_innermost) {
    if (++p.h < heads) return;
    p.h = 0;
    if (++p.t < a.length) return;
    p.t = 0;
  } else {
    if (++p.t < a.length) return;
    p.t = 0;
    if (++p.h < heads) return;
    p.h = 0;
  }
  ++p.b;
}

LMFAST_INLINE int64_t position_of(const RopeArgs& a, const Place& p) {
  if (a.positions != nullptr) return a.positions[p.b * a.length + p.t];
  return (a.starts != nullptr ? a.starts[p.b] : a.offset) + p.t;
}

template <class T, class Table, bool kInterleaved>
void rope_typed(const RopeArgs& a, int64_t begin, int64_t end) {
  const int64_t half = a.rotary / 2, heads = a.q.heads + a.k.heads;
  const size_t rest = sizeof(T) * static_cast<size_t>(a.head_dim - a.rotary);
  const float sign = a.inverse ? -1.0f : 1.0f;
  Place p = place_of(a, heads, begin);
  for (int64_t index = begin; index < end; ++index, advance(a, heads, p)) {
    const bool is_q = p.h < a.q.heads;
    const RopeTensor& tensor = is_q ? a.q : a.k;
    const int64_t h = is_q ? p.h : p.h - a.q.heads;
    const int64_t* si = tensor.in_stride;
    const int64_t* so = tensor.out_stride;
    const T* x = static_cast<const T*>(tensor.in) + p.b * si[0] + h * si[1] + p.t * si[2];
    T* y = static_cast<T*>(tensor.out) + p.b * so[0] + h * so[1] + p.t * so[2];
    prefetch_row(x, a.head_dim);
    const int64_t row = position_of(a, p) * half;
    const Table* c = static_cast<const Table*>(a.cos) + row;
    const Table* s = static_cast<const Table*>(a.sin) + row;
    if constexpr (sizeof(T) == sizeof(double)) {
      rotate_double(x, y, c, s, half, kInterleaved, static_cast<double>(sign));
    } else if constexpr (kInterleaved) {
      rotate_interleaved(x, y, c, s, half, VecF::set1(sign));
    } else {
      rotate_half(x, y, c, s, half, VecF::set1(sign));
    }
    if (rest != 0 && x != y) memcpy(y + a.rotary, x + a.rotary, rest);
  }
}

template <class T, class Table>
void rope_pairing(const RopeArgs& a, int64_t begin, int64_t end) {
  if (a.interleaved) {
    rope_typed<T, Table, true>(a, begin, end);
  } else {
    rope_typed<T, Table, false>(a, begin, end);
  }
}

}  // namespace

void rope(const RopeArgs& a, int64_t begin, int64_t end) {
  LMFAST_DISPATCH_DTYPE(a.dtype, scalar_t, {
    if constexpr (sizeof(scalar_t) == sizeof(double)) {
      if (a.fp64_tables) {
        rope_pairing<double, double>(a, begin, end);
      } else {
        rope_pairing<double, float>(a, begin, end);
      }
    } else {
      rope_pairing<scalar_t, float>(a, begin, end);
    }
  })
}

}  // namespace lmfast::LMFAST_ISA
