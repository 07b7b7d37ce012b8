// Which instruction-set level the kernels run at. No torch header here.
#pragma once

namespace lmfast {

// Each level includes the ones below it. `default` is what the compiler assumes for the
// architecture (SSE2 on x86-64), so that the library starts everywhere.
enum class Isa : int { kDefault = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };

// Best level this processor and operating system allow (cpuid, xgetbv, AMX permission).
Isa best_isa();

// Level in use: best_isa(), lowered by LMFAST_CPU_ISA or set_isa().
Isa current_isa();

// Lowers (or restores) the level; returns false when `isa` is above best_isa().
bool set_isa(Isa isa);

}  // namespace lmfast
