// Arguments of the single step of a recurrent layer, for streams and generation. No torch header.
#pragma once

#include "recurrent.h"

namespace lmfast {

// Weights of one product, W[row][column] as the textbook's left factor: rows are gates * units.
struct RecurrentStepWeights {
  const float* w;
  int64_t stride;     // floats between rows, or between columns where `by_columns`
  bool by_columns;    // the units of a column are neighbours in memory (x W with W (D, G*H))
  const float* bias;  // (G*H); null: none
};

struct RecurrentStepArgs {
  Cell cell;
  int64_t batch, width, hidden;
  const float* x;  // (B, D)
  const float* h;  // (B, H); null: zeros
  const float* c;  // (B, H): LSTM; null: zeros
  RecurrentStepWeights input, state;
  float* h_out;  // (B, H), not h: other units still read it
  float* c_out;  // (B, H): LSTM; may be c
  // kGruTextbook: (2, B, H), r h' and z, between the two passes; `second` is the pass that uses it.
  float* between;
  bool second;
};

LMFAST_DECLARE_KERNEL(recurrent_step_units, RecurrentPanelsArgs)  // range: unused
LMFAST_DECLARE_KERNEL(recurrent_step, RecurrentStepArgs)  // range: blocks of that many units

}  // namespace lmfast
