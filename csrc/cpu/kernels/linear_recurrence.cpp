// h_t = a_t h_{t-1} + b_t, column by column, and its gradients
// g_t = dy_t + a_{t+1} g_{t+1}, db_t = g_t, da_t = g_t h_{t-1}.
//
// Floor: memory traffic, three arrays forward, five backward, each touched once. A scan in order
// over time, many columns side by side, needs one multiplication per element where a parallel scan
// needs log T and passes over memory as often; on a CPU there are columns enough for its lanes.
#include "linear_recurrence.h"

#include "../simd.h"

namespace lmfast::LMFAST_ISA {
namespace {

template <class T>
struct Columns {
  int64_t row, first, count;
  LMFAST_INLINE int64_t at(int64_t t, const LinearRecurrenceArgs& a) const {
    return (row * a.steps + t) * a.width + first;
  }
};

template <class T>
Columns<T> columns_of(const LinearRecurrenceArgs& a, int64_t unit) {
  const int64_t blocks = (a.width + kScanWidth - 1) / kScanWidth;
  const int64_t first = unit % blocks * kScanWidth, left = a.width - first;
  return {unit / blocks, first, left < kScanWidth ? left : kScanWidth};
}

// The state of a block before the first step.
template <class T>
void load_state(const LinearRecurrenceArgs& a, const Columns<T>& c, T* h) {
  const T* given = static_cast<const T*>(a.state);
  for (int64_t i = 0; i < c.count; ++i) {
    h[i] = given == nullptr ? T(0) : given[c.row * a.width + c.first + i];
  }
}

template <class T>
void fwd_unit(const LinearRecurrenceArgs& a, int64_t unit) {
  using V = VecOf<T>;
  const Columns<T> c = columns_of<T>(a, unit);
  T h[kScanWidth];
  load_state(a, c, h);
  for (int64_t t = 0; t < a.steps; ++t) {
    const int64_t at = c.at(t, a);
    const T *x = static_cast<const T*>(a.a) + at, *b = static_cast<const T*>(a.b) + at;
    T* y = static_cast<T*>(a.y) + at;
    int64_t i = 0;
    for (; i + V::kWidth <= c.count; i += V::kWidth) {
      const V value = fmadd(V::load(x + i), V::load(h + i), V::load(b + i));
      value.store(h + i);
      value.store(y + i);
    }
    for (; i < c.count; ++i) y[i] = h[i] = x[i] * h[i] + b[i];
  }
}

template <class T>
void bwd_unit(const LinearRecurrenceArgs& a, int64_t unit) {
  using V = VecOf<T>;
  const Columns<T> c = columns_of<T>(a, unit);
  T carried[kScanWidth], first[kScanWidth];
  for (int64_t i = 0; i < c.count; ++i) carried[i] = T(0);
  load_state(a, c, first);
  for (int64_t t = a.steps - 1; t >= 0; --t) {
    const int64_t at = c.at(t, a);
    const T *x = static_cast<const T*>(a.a) + at, *dy = static_cast<const T*>(a.dy) + at;
    const T* before = t > 0 ? static_cast<const T*>(a.states) + c.at(t - 1, a) : first;
    T *da = static_cast<T*>(a.da) + at, *db = static_cast<T*>(a.db) + at;
    int64_t i = 0;
    for (; i + V::kWidth <= c.count; i += V::kWidth) {
      const V g = V::load(dy + i) + V::load(carried + i);
      g.store(db + i);
      (g * V::load(before + i)).store(da + i);
      (g * V::load(x + i)).store(carried + i);
    }
    for (; i < c.count; ++i) {
      const T g = dy[i] + carried[i];
      db[i] = g;
      da[i] = g * before[i];
      carried[i] = g * x[i];
    }
  }
  if (a.dstate == nullptr) return;
  T* out = static_cast<T*>(a.dstate) + c.row * a.width + c.first;
  for (int64_t i = 0; i < c.count; ++i) out[i] = carried[i];
}

}  // namespace

void linear_recurrence_fwd(const LinearRecurrenceArgs& a, int64_t begin, int64_t end) {
  for (int64_t u = begin; u < end; ++u) {
    a.dtype == DType::kF64 ? fwd_unit<double>(a, u) : fwd_unit<float>(a, u);
  }
}

void linear_recurrence_bwd(const LinearRecurrenceArgs& a, int64_t begin, int64_t end) {
  for (int64_t u = begin; u < end; ++u) {
    a.dtype == DType::kF64 ? bwd_unit<double>(a, u) : bwd_unit<float>(a, u);
  }
}

}  // namespace lmfast::LMFAST_ISA
