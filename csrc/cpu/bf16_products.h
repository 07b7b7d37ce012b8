// Whether bf16 tiles can be multiplied without AMX. No torch header here.
#pragma once

namespace lmfast {

// AVX512-BF16 and VBMI, which the avx512 level does not imply and tiles_avx512.h needs.
bool has_bf16_products();

// AVX512-VNNI at the current level.
bool has_byte_products();

}  // namespace lmfast
