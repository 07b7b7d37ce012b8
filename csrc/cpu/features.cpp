#include "features.h"

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#include "bf16_products.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace lmfast {
namespace {

constexpr const char* kNames[] = {"default", "avx2", "avx512", "amx"};
constexpr int kLevels = 4;

struct Feature {
  const char* name;
  bool present;
};

struct Probe {
  Isa best = Isa::kDefault;
  bool bf16_products = false, byte_products = false;
  std::string features;
};

#if defined(__x86_64__)

#if defined(LMFAST_EMULATE_AMX)
constexpr bool kEmulateAmx = true;  // amx_emulated.h
#else
constexpr bool kEmulateAmx = false;
#endif

uint64_t xcr0() {
  uint32_t lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (static_cast<uint64_t>(hi) << 32) | lo;
}

// Linux gives a process the AMX tile state only on request; a kernel or sandbox may refuse.
bool request_amx_permission() {
#if defined(__linux__)
  constexpr int kArchReqXcompPerm = 0x1023;
  constexpr int kXfeatureTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
#else
  return false;
#endif
}

Probe probe() {
  Probe result;
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return result;
  const uint32_t ecx1 = c;
  const bool osxsave = ecx1 & bit_OSXSAVE;
  const uint64_t os = osxsave ? xcr0() : 0;
  const bool os_ymm = (os & 0x6) == 0x6;
  const bool os_zmm = (os & 0xe6) == 0xe6;
  const bool os_tile = kEmulateAmx || (os & 0x60000) == 0x60000;
  uint32_t b7 = 0, c7 = 0, d7 = 0, a71 = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    b7 = b;
    c7 = c;
    d7 = d;
    if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) a71 = a;
  }
  const auto bit = [](uint32_t reg, int n) { return ((reg >> n) & 1u) != 0; };
  const bool fma = bit(ecx1, 12), f16c = bit(ecx1, 29), avx2 = bit(b7, 5);
  const bool bmi = bit(b7, 3) && bit(b7, 8);
  const bool avx512 = bit(b7, 16) && bit(b7, 17) && bit(b7, 28) && bit(b7, 30) && bit(b7, 31);
  const bool vbmi = bit(c7, 1), vnni = bit(c7, 11), bf16 = bit(a71, 5);
  const bool amx = kEmulateAmx || (bit(d7, 24) && bit(d7, 22) && bit(d7, 25));
  const Feature seen[] = {{"avx2", avx2},        {"fma", fma},          {"f16c", f16c},
                          {"bmi2", bmi},         {"avx512", avx512},    {"avx512_vbmi", vbmi},
                          {"avx512_vnni", vnni}, {"avx512_bf16", bf16}, {"amx", amx}};
  for (const Feature& f : seen) {
    if (f.present) result.features += (result.features.empty() ? "" : " ") + std::string(f.name);
  }
  if (!(os_ymm && avx2 && fma && f16c && bmi)) return result;
  result.best = Isa::kAvx2;
  if (!(os_zmm && avx512)) return result;
  result.best = Isa::kAvx512;
  result.bf16_products = bf16 && vbmi;
  result.byte_products = vnni;
  if (!(os_tile && amx && bf16 && vnni && vbmi)) return result;
  if (!kEmulateAmx && !request_amx_permission()) {
    result.features += " (amx: permission refused by the operating system)";
    return result;
  }
  result.best = Isa::kAmx;
  return result;
}

#else

Probe probe() { return {}; }

#endif

const Probe& probed() {
  static const Probe result = probe();
  return result;
}

int parse(const char* name) {
  for (int i = 0; i < kLevels; ++i) {
    if (std::strcmp(name, kNames[i]) == 0) return i;
  }
  return -1;
}

int initial() {
  const int best = static_cast<int>(best_isa());
  const char* wanted = std::getenv("LMFAST_CPU_ISA");
  const int level = wanted != nullptr ? parse(wanted) : -1;
  return level >= 0 && level < best ? level : best;
}

std::atomic<int>& level() {
  static std::atomic<int> value{initial()};
  return value;
}

}  // namespace

Isa best_isa() { return probed().best; }

Isa current_isa() { return static_cast<Isa>(level().load(std::memory_order_relaxed)); }

bool has_bf16_products() { return probed().bf16_products; }

bool has_byte_products() { return current_isa() >= Isa::kAvx512 && probed().byte_products; }

bool set_isa(Isa isa) {
  if (static_cast<int>(isa) > static_cast<int>(best_isa())) return false;
  level().store(static_cast<int>(isa), std::memory_order_relaxed);
  return true;
}

}  // namespace lmfast

// Read by lmfast/_extension.py through ctypes: no torch type crosses this border.
#define LMFAST_EXPORT __attribute__((visibility("default")))

extern "C" {

LMFAST_EXPORT const char* lmfast_cpu_isa() {
  return lmfast::kNames[static_cast<int>(lmfast::current_isa())];
}

LMFAST_EXPORT const char* lmfast_cpu_best_isa() {
  return lmfast::kNames[static_cast<int>(lmfast::best_isa())];
}

LMFAST_EXPORT const char* lmfast_cpu_features() { return lmfast::probed().features.c_str(); }

// Whether kernels of bf16 tiles run at the current level.
LMFAST_EXPORT int lmfast_has_bf16_tiles() {
  const lmfast::Isa isa = lmfast::current_isa();
  return isa == lmfast::Isa::kAmx || (isa == lmfast::Isa::kAvx512 && lmfast::has_bf16_products());
}

// 0 on success, 1 for an unknown name, 2 for a level this machine does not have.
LMFAST_EXPORT int lmfast_set_cpu_isa(const char* name) {
  const int wanted = lmfast::parse(name);
  if (wanted < 0) return 1;
  return lmfast::set_isa(static_cast<lmfast::Isa>(wanted)) ? 0 : 2;
}

}  // extern "C"
