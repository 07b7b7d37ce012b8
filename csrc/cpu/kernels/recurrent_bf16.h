// Arguments of the recurrent loops in bf16: weights, states that enter products and what is
// kept for the backward are bf16, sums, gates and the state itself float. No torch header.
//
// Rows, cells and gate order as in recurrent.h; hidden is a multiple of 32, the depth of a tile.
#pragma once

#include "../dtype.h"
#include "recurrent.h"

namespace lmfast {

struct RecurrentBf16FwdArgs {
  RecurrentShape shape;
  const bf16* projected;     // (N, G*H): input products without biases
  const void* packed;        // by recurrent_bf16_pack
  const float* bias;         // (G*H), added to projected; null: none
  const float* hidden_bias;  // (H): GRU, added to the hidden part of n; null: none
  const bf16* h0;            // (B, H): the initial state as an operand; null: zeros
  float* h;                  // (B, H): initial state in, final out
  float* c;                  // (B, H): LSTM, initial cell state in, final out
  bf16* y;                   // (N, H)
  float* y_wide;             // (N, H), the same unrounded; null: not wanted
  bf16* gates;               // (N, kept_gates_of * H); null: no backward will follow
  bf16* cells;               // (N, H): LSTM
  RecurrentProgress* progress;
};

struct RecurrentBf16BwdArgs {
  RecurrentShape shape;
  const void* packed;
  const void* dy;  // (N, H); null: zeros
  DType dy_dtype;
  const float* dh_n;  // (B, H); null: zeros
  const bf16* h0;
  const bf16* c0;
  const bf16* y;
  const bf16* gates;
  const bf16* cells;
  float* carry;  // as in RecurrentBwdArgs
  bf16* dgates;  // (N, gate_gradients_of * H)
  RecurrentProgress* progress;
};

struct RecurrentBf16PackArgs {
  Cell cell;
  bool backward;
  int64_t hidden;
  DType dtype;    // of w: float or bf16
  const void* w;  // (G*H, H), contiguous
  void* packed;   // recurrent_bf16_pack_bytes
};

// Units (columns of the state) per panel of packed weights.
constexpr int64_t recurrent_bf16_units(Cell cell, bool backward) {
  return backward || gates_of(cell) == 1 ? 64 : 16;
}
inline int64_t recurrent_bf16_panels(Cell cell, bool backward, int64_t hidden) {
  const int64_t units = recurrent_bf16_units(cell, backward);
  return (hidden + units - 1) / units;
}
inline int64_t recurrent_bf16_pack_bytes(Cell cell, bool backward, int64_t hidden) {
  const int64_t units = recurrent_bf16_units(cell, backward);
  return recurrent_bf16_panels(cell, backward, hidden) * units * gates_of(cell) * hidden * 2;
}

LMFAST_DECLARE_KERNEL(recurrent_bf16_pack, RecurrentBf16PackArgs)         // range: panels
LMFAST_DECLARE_KERNEL(recurrent_bf16_fwd_rows, RecurrentBf16FwdArgs)      // range: sequences
LMFAST_DECLARE_KERNEL(recurrent_bf16_fwd_together, RecurrentBf16FwdArgs)  // range: participants
LMFAST_DECLARE_KERNEL(recurrent_bf16_bwd_rows, RecurrentBf16BwdArgs)      // range: sequences
LMFAST_DECLARE_KERNEL(recurrent_bf16_bwd_together, RecurrentBf16BwdArgs)  // range: participants

}  // namespace lmfast
