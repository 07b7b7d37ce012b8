// The decoding engine: what a packed model is, what one step gets, and the kernel's declaration. No
// torch header.
//
// A model is two pieces of memory: `weights`, all numbers, and a program of 64-bit words, the
// structs below, whose offsets point into them. lmfast/generation/engine/program.py writes both.
#pragma once

#include "attention.h"
#include "rope_append.h"

namespace lmfast {

constexpr int64_t kEngineMagic = 0x6c6d656e67303032;  // changes with structs and layouts
constexpr int kEnginePanel = 16;                      // columns that lie together
constexpr int64_t kEngineNone = -1;                   // an offset where there is nothing

// How a matrix is stored: panels of 16 columns (rows of the weight), in blocks of four, or of what
// is left at the end; a block has its depth in order, so that a product reads one stream. A step of
// a panel is 64 bytes. Depth is padded with zeros to a multiple of kDepthStep[type] and of the
// group.
enum class EngineWeights : int64_t {
  kF32 = 0,   // [block][k][panel][16] float
  kBF16 = 1,  // [block][k / 2][panel][16][2] bf16
  kI8 = 2,    // [block][k / 4][panel][16][4] code + 128
  kI4 = 3,    // [block][k / 8][panel][16][4] (code + 8 of k = 8 i + j) | (of 8 i + 4 + j) << 4
};
constexpr int kEngineBlock = 4;
constexpr int64_t kEngineDepthStep[] = {1, 2, 4, 8};

// y = x W^T + bias.
struct EngineMatrix {
  int64_t weights;  // byte offsets, of `bias` and `scales` as of all others
  int64_t scales;   // of integers: float (columns) or, with groups, f16 [block][group][panel][16]
  int64_t bias;     // float (16 panels), or none
  int64_t panels, depth;
  int64_t type;   // EngineWeights
  int64_t group;  // depth that shares a scale; 0: all
};

// Where a panel begins, and the bytes from one step (or group) of its depth to the next.
struct EnginePlace {
  const char* at;
  int64_t stride;
};
static inline EnginePlace engine_place(const EngineMatrix& w, const char* first, int64_t panel,
                                       int64_t steps, int64_t bytes) {
  const int64_t before = panel / kEngineBlock * kEngineBlock, left = w.panels - before;
  return {first + before * steps * bytes + (panel - before) * bytes,
          (left < kEngineBlock ? left : kEngineBlock) * bytes};
}
static inline EnginePlace engine_panel(const EngineMatrix& w, const char* memory, int64_t panel) {
  return engine_place(w, memory + w.weights, panel, w.depth / kEngineDepthStep[w.type], 64);
}
static inline EnginePlace engine_scales(const EngineMatrix& w, const char* memory, int64_t panel) {
  return engine_place(w, memory + w.scales, panel, w.depth / w.group, kEnginePanel * 2);
}

enum class EngineNormKind : int64_t { kNone = 0, kRms = 1, kLayer = 2 };
struct EngineNorm {
  int64_t kind;          // EngineNormKind
  int64_t weight, bias;  // float
  double eps;
};

enum class EngineActivation : int64_t { kRelu = 0, kGelu = 1, kGeluTanh = 2, kSilu = 3 };

struct EngineLayer {
  EngineNorm attention_norm, q_norm, k_norm, attention_post_norm, mlp_norm, mlp_post_norm;
  EngineMatrix qkv;  // heads, each padded to whole panels: queries, keys, values
  EngineMatrix o;
  EngineMatrix up;  // with a gate: panels of gate and up in turn
  EngineMatrix down;
  int64_t whole_qk_norm;  // over all heads together, not over each
  int64_t rope;           // which tables, or none
  int64_t interleaved;
  int64_t window;  // 0: none
  int64_t group;   // of the cache's layers
  int64_t sinks;   // float (H), or none
  int64_t activation, gated;
  int64_t parallel;  // attention and feed-forward layer read the same x
  double scale, softcap;
};

struct EngineModel {
  int64_t magic, layers, width, heads, kv_heads, head_dim, hidden, vocab, ropes, groups;
  // Rows (V, width) of floats, bf16 or int8 with a float scale each; none: the head's own panels.
  int64_t embedding, embedding_scales, embedding_type;
  int64_t positions, position_count;  // learned ones, float (count, width)
  EngineNorm final_norm;
  EngineMatrix head;
  double embedding_factor, logit_softcap;
  // EngineLayer[layers] follow.
};

// A layer of a recurrent model. Gates come a panel of each in turn, in torch.nn's order.
enum class EngineCellKind : int64_t {
  kTanh = 0,
  kLstm = 1,
  kGru = 2,
  kGruTextbook = 3,  // resets before the product: `state` has r and z, `candidate` n
  kMinGru = 4,       // no products with states; what comes out is added to x
  kMinLstm = 5,
};
struct EngineCell {
  EngineMatrix input, state, candidate;
  int64_t kind;
};
constexpr int64_t kEngineCellMagic = 0x6c6d656e67433032;  // of programs with EngineCell[layers]
constexpr int64_t kEngineInputGates[] = {1, 4, 3, 3, 2, 3};
constexpr int64_t kEngineStateGates[] = {1, 4, 3, 2, 0, 0};

// Memory with room between counters that different threads write.
struct EngineCounter {
  alignas(64) int64_t value;
};
// Progress of the threads through the phases (engine_phases.h).
struct EngineProgress {
  static constexpr int kMaxChunks = 256;
  EngineCounter arrived, done;
  EngineCounter next[kMaxChunks];
  int64_t participants;
};

// One row of the cache in one group of layers: T new tokens, which are rows `first` ... of x.
struct EngineRow {
  int64_t first, length;
  int64_t offset, keys;  // position of the first token, keys after the last, from column 0 on
  int64_t storage_row;
  int64_t ranges, splits, keys_per_split;
  bool decoding;
  int64_t unit;     // its first unit of attention
  int64_t partial;  // its first float in `partial`, when there are splits
  int64_t combine;  // its first unit of adding splits
};
struct EngineGroup {
  const EngineRow* rows;
  int64_t units, combines, partial;  // of attention; floats of splits
  const int64_t* slots;              // of every token
  const int32_t* table;              // (B, table_row), or null
  int64_t table_row, columns;
};
struct EngineStorage {
  Stored type;
  CacheStorage keys, values;
};
struct EngineTables {
  const float *cos, *sin;
  int64_t rotary;
};

struct EngineArgs {
  const EngineModel* model;
  const EngineLayer* layers;
  const char* weights;
  int64_t batch, tokens;     // rows of the cache, and of x
  int64_t* ids;              // (steps, tokens)
  const int64_t* positions;  // (steps, tokens)
  const int64_t* wanted;     // rows of x whose logits are wanted
  int64_t outputs;
  float* logits;              // (outputs, V)
  const EngineGroup* groups;  // of every step
  // Steps of one token per row, each the likeliest after the one before, which `chosen` (steps,
  // tokens) gets; until one of `stops` comes. Of a single step nothing is chosen.
  int64_t steps;
  int64_t* chosen;
  const int64_t* stops;
  int64_t stop_count;
  int64_t* best;                 // (tokens, V / kEngineSegment): the likeliest of each segment
  const EngineStorage* storage;  // of every layer
  const EngineTables* tables;
  // Instructions that the processor has, whatever the level was compiled for.
  bool vnni;  // AVX512-VNNI
  bool bf16;  // products of bf16: AMX at its level, else AVX512-BF16
  // Whether products with narrower weights, and that of the output layer, may round rows to bf16.
  bool rounded, rounded_head;

  // Of a recurrent model: tokens are those of the first step, row by row, then of the next.
  const EngineCell* cells;
  int64_t length;             // steps
  const int64_t* firsts;      // (length + 1): the first token of each step
  const int64_t* token_rows;  // row of every token
  const int64_t* lengths;     // (B): steps of every row
  float* state;               // (L, B, E), twice that for an LSTM, cell states last; is changed
  float* states;              // (2, L, B) rows of x_stride: before and after a step

  // Rows of floats, each `*_stride` apart; zeros behind their ends, which products read.
  int64_t x_stride, qkv_stride, joined_stride, hidden_stride, operand_stride;
  float *x, *qkv, *joined, *hidden, *update;
  char* operand;  // shared operand rows (engine_operand.h), when there are many
  float* partial;
  char* scratch;  // of every participant
  int64_t scratch_bytes, attention_scratch;
  EngineProgress* progress;
};

constexpr int64_t kEngineFewRows = 8;       // that every thread prepares for itself
constexpr int64_t kEngineRoundedRows = 32;  // of the cache, whose single tokens may be rounded
// Bytes of an operand: rows as floats, as int16, as two int8, sums and steps.
static inline int64_t engine_operand_bytes(int64_t rows, int64_t stride) {
  return rows * (stride * 8 + round_up(stride, 128) / 8 * 4 + 64) + 256;
}
// Floats of sums of a thread: 64 for each row, and for what fills up the last tile.
static inline int64_t engine_sums(int64_t rows) { return (rows + 32) * 64; }
// Bytes of a thread's own operand, or of the panels it widens when there are many rows.
static inline int64_t engine_private_bytes(int64_t rows, int64_t stride, bool shared) {
  return shared ? 128 * stride : engine_operand_bytes(rows, stride);
}
constexpr int64_t kEngineSegment = 4096;  // logits that one thread looks through

// Ranges: participants.
LMFAST_DECLARE_KERNEL(engine_run, EngineArgs)
LMFAST_DECLARE_KERNEL(engine_run_cells, EngineArgs)

}  // namespace lmfast
