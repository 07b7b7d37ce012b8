// Random operands and comparisons for the kernels that run on the host.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "csrc/cuda/kernels/device.cuh"

namespace lmfast::gpu {

template <typename T>
constexpr double kHalfUnit = 6e-8;  // largest relative error of one rounding to T
template <>
inline constexpr double kHalfUnit<bf16> = 1.0 / 256;
template <>
inline constexpr double kHalfUnit<f16> = 1.0 / 2048;

template <>
inline constexpr double kHalfUnit<e4m3> = 1.0 / 16;

// Values in (-2, 2), exactly representable in every type of 16 bits or more.
template <typename T>
std::vector<T> random_values(size_t count, unsigned seed) {
  std::vector<T> values(count);
  unsigned state = seed * 2654435761u + 12345u;
  for (T& v : values) {
    state = state * 1664525u + 1013904223u;
    v = from_float<T>((static_cast<int>(state >> 24) - 128) / 64.0f);
  }
  return values;
}

// Within one rounding to T, and the rounding of fp32 sums of terms of size `scale`.
template <typename T>
void expect(T found, double expected, double scale, const std::string& what) {
  const double value = to_float(found);
  const double allowed = 1.01 * kHalfUnit<T> * std::fabs(expected) + 1e-5 * scale;
  if (std::fabs(value - expected) <= allowed) return;
  std::fprintf(stderr, "%s: %.9g instead of %.9g\n", what.c_str(), value, expected);
  std::exit(1);
}

}  // namespace lmfast::gpu
