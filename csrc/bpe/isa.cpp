// Which kernels this machine runs.
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "kernels.h"
#if defined(LMFAST_BPE_X86)
#include <cpuid.h>
#endif

namespace lmfast::bpe {
namespace {

enum Level { kLevelDefault, kLevelAvx2, kLevelAvx512 };

#if defined(LMFAST_BPE_X86)
uint64_t enabled_state() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

Level machine_level() {
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return kLevelDefault;
  const bool base = (c >> 27 & 1) && (c >> 28 & 1) && (c >> 12 & 1) && (c >> 23 & 1) &&
                    (c >> 29 & 1);  // OSXSAVE, AVX, FMA, POPCNT, F16C
  const bool aes = c >> 25 & 1;
  if (!base || (enabled_state() & 0x6) != 0x6) return kLevelDefault;
  uint32_t extended_c = 0;
  if (!__get_cpuid(0x80000001u, &a, &b, &extended_c, &d)) return kLevelDefault;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return kLevelDefault;
  const bool avx2 = (b >> 3 & 1) && (b >> 5 & 1) && (b >> 8 & 1) &&
                    (extended_c >> 5 & 1);  // BMI1, AVX2, BMI2, LZCNT
  if (!avx2) return kLevelDefault;
  const bool avx512 = (b >> 16 & 1) && (b >> 17 & 1) && (b >> 28 & 1) && (b >> 30 & 1) &&
                      (b >> 31 & 1) && (c >> 1 & 1) && (c >> 6 & 1) &&
                      (c >> 9 & 1);  // F DQ CD BW VL VBMI VBMI2 VAES
  return avx512 && aes && (enabled_state() & 0xE6) == 0xE6 ? kLevelAvx512 : kLevelAvx2;
}
#else
Level machine_level() { return kLevelDefault; }
#endif

const Kernels* kernels_of(Level level) {
#if defined(LMFAST_BPE_X86)
  if (level >= kLevelAvx512) return &kAvx512Kernels;
  if (level >= kLevelAvx2) return &kAvx2Kernels;
#endif
  (void)level;
  return &kDefaultKernels;
}

const Kernels* choose() {
  Level level = machine_level();
  if (const char* wanted = std::getenv("LMFAST_CPU_ISA")) {
    if (std::strcmp(wanted, "default") == 0) level = kLevelDefault;
    if (std::strcmp(wanted, "avx2") == 0 && level > kLevelAvx2) level = kLevelAvx2;
  }
  return kernels_of(level);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* const chosen = choose();
  return *chosen;
}

const Kernels* kernels_by_name(const char* name) {
  const Level most = machine_level();
  for (const Level level : {kLevelDefault, kLevelAvx2, kLevelAvx512}) {
    const Kernels* found = kernels_of(level);
    if (level <= most && std::strcmp(found->name, name) == 0) return found;
  }
  return nullptr;
}

}  // namespace lmfast::bpe
