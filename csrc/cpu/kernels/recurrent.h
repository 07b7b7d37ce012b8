// Arguments and declarations of the recurrent kernels: one layer, one direction, all time steps.
// No torch header.
//
// Rows are in time-major order: step t owns the rows offsets[t] .. offsets[t] + sizes[t] of every
// (N, ...) operand, and sizes never grow with t (the order of a PackedSequence; a padded batch has
// equal sizes). Row b of a step belongs to sequence b. All operands are contiguous float.
#pragma once

#include "../dispatch.h"

namespace lmfast {

// kGru is torch's form (reset gate after the product), kGruTextbook resets before it. Gate order in
// every (N, G*H) operand is torch's: i, f, g, o and r, z, n.
enum class Cell : int { kTanh = 0, kRelu = 1, kLstm = 2, kGru = 3, kGruTextbook = 4 };

constexpr int64_t gates_of(Cell cell) {
  return cell == Cell::kLstm ? 4 : cell == Cell::kGru || cell == Cell::kGruTextbook ? 3 : 1;
}
// Vectors of H per row that the forward keeps for the backward, besides y: the activated gates, and
// for GRU the hidden part of n.
constexpr int64_t kept_gates_of(Cell cell) {
  return cell == Cell::kLstm || cell == Cell::kGru ? 4 : cell == Cell::kGruTextbook ? 3 : 0;
}
// A second (N, H) the backward needs: LSTM the cell states, textbook GRU r h', the operand of n.
constexpr bool keeps_cells(Cell cell) { return cell == Cell::kLstm || cell == Cell::kGruTextbook; }
// Vectors of H per row of the gradients of the gates. GRU: (n before the reset, r, z, n after it),
// so that both products read one contiguous piece.
constexpr int64_t gate_gradients_of(Cell cell) { return cell == Cell::kGru ? 4 : gates_of(cell); }
// Rounds of a time step, each of which needs all units of the one before it.
constexpr int64_t rounds_of(Cell cell) { return cell == Cell::kGruTextbook ? 2 : 1; }

// One round at a time, its units divided into chunks of panels that any thread may run. Lives in
// zeroed memory of the binding; only recurrent_rounds.h touches it.
struct RecurrentProgress {
  static constexpr int kMaxChunks = 16;
  struct alignas(64) Counter {
    int64_t value;
  };
  int64_t chunks, participants;  // set by the binding
  Counter arrived;               // threads that came
  Counter done;                  // chunks finished, over all rounds
  Counter next[kMaxChunks];      // the round each chunk takes next
};

struct RecurrentShape {
  Cell cell;
  bool reverse;
  int64_t steps, batch, hidden;
  const int64_t* sizes;
  const int64_t* offsets;
};

// The steps to run, counted in the order of the loop: what they continue is in y, c and the like.
// Operands of the part alone begin with row `row`.
struct RecurrentPart {
  int64_t first, past, row;
};

struct RecurrentFwdArgs {
  RecurrentShape shape;
  RecurrentPart part;
  const float* projected;    // (.., G*H): input products with the biases added, rows of the part
  const float* packed;       // recurrent weights, by recurrent_pack_fwd
  const float* hidden_bias;  // (H): GRU, added to the hidden part of n; null: none
  const float* h0;           // (B, H); null: zeros
  float* c;                  // (B, H): LSTM, initial cell state in, final out
  float* y;                  // (N, H)
  float* gates;              // (N, kept_gates_of * H); null: no backward will follow
  float* cells;              // (N, H): see keeps_cells; null: no backward will follow
  float* between;            // (B, 2, H): textbook GRU, r h' and z between its two rounds
  RecurrentProgress* progress;
};

struct RecurrentBwdArgs {
  RecurrentShape shape;
  RecurrentPart part;
  const float* packed;  // by recurrent_pack_bwd
  const float* dy;      // (.., H), rows of the part; null: zeros
  const float* dh_n;    // (B, H); null: zeros
  const float* h0;
  const float* c0;
  const float* y;
  const float* gates;
  const float* cells;
  // (B, H): what reaches the state past the gates' product. LSTM: gradient of the final cell state
  // in, of c0 out. GRU: zeros in, the part of h0's gradient that the product does not cover out.
  float* carry;
  float* dgates;  // (N, gate_gradients_of * H)
  RecurrentProgress* progress;
};

// Units (columns of the state) per panel of packed weights at this level.
struct RecurrentPanels {
  int64_t fwd, bwd;
};
struct RecurrentPanelsArgs {
  Cell cell;
  RecurrentPanels* out;
};

// W_hh[row][column] is at w[row * row_stride + column * column_stride].
struct RecurrentPackArgs {
  Cell cell;
  int64_t hidden;
  const float* w;
  int64_t row_stride, column_stride;
  float* packed;  // panels * (fwd: H * G, bwd: G * H) * units per panel
};

LMFAST_DECLARE_KERNEL(recurrent_panels, RecurrentPanelsArgs)     // range: unused
LMFAST_DECLARE_KERNEL(recurrent_pack_fwd, RecurrentPackArgs)     // range: panels
LMFAST_DECLARE_KERNEL(recurrent_pack_bwd, RecurrentPackArgs)     // range: panels
LMFAST_DECLARE_KERNEL(recurrent_fwd_rows, RecurrentFwdArgs)      // range: sequences
LMFAST_DECLARE_KERNEL(recurrent_fwd_together, RecurrentFwdArgs)  // range: participants
LMFAST_DECLARE_KERNEL(recurrent_bwd_rows, RecurrentBwdArgs)      // range: sequences
LMFAST_DECLARE_KERNEL(recurrent_bwd_together, RecurrentBwdArgs)  // range: participants

}  // namespace lmfast
