// Whether bf16 and int8 can be multiplied without AMX. No torch header here.
#pragma once

namespace lmfast {

// AVX512-BF16, VBMI and VNNI, which the avx512 level does not imply: tiles_avx512.h needs the first
// two, decoding on int8 the third.
bool has_bf16_products();

}  // namespace lmfast
