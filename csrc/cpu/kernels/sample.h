// Arguments and declaration of the kernel that draws tokens (sample.cpp). No torch header.
#pragma once

#include "../dispatch.h"
#include "../dtype.h"

namespace lmfast {

// Columns of the settings.
enum SampleSetting : int {
  kTemperature,
  kTopK,
  kTopP,
  kMinP,
  kTypicalP,
  kFrequencyPenalty,
  kPresencePenalty,
  kRepetitionPenalty,
  kSampleSettings
};

struct SampleArgs {
  DType dtype;              // of logits
  int64_t classes, stride;  // of logits' rows
  const void* logits;
  const double* settings;  // kSampleSettings numbers per row
  int64_t settings_stride;
  const double* uniform;       // per row, in [0, 1)
  const int32_t* counts;       // (rows, classes) or null
  const uint8_t* prompt_mask;  // (rows, classes) or null
  const void* bias;            // float, double for double logits; or null
  int64_t bias_stride;         // 0: one for all rows
  const int64_t* suppress;
  int64_t suppress_count;
  int64_t* ids;     // -1: the row has no distribution
  void* log_probs;  // float, double for double logits; or null
  void* scratch;    // sample_scratch_bytes() for the thread
};

// Scores, weights, two pairs of selection buffers, keys, ids: with room for a vector behind each.
inline int64_t sample_scratch_bytes(int64_t classes) {
  return (classes + 64) * (7 * static_cast<int64_t>(sizeof(double)) + 4);
}

LMFAST_DECLARE_KERNEL(sample_rows, SampleArgs)  // range: rows

}  // namespace lmfast
