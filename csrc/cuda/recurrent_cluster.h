// The recurrent layers' kernels for clusters: whether a layer can take them, and their launch.
#pragma once

#include "kernels/recurrent.h"
#include "launch.h"

namespace lmfast::gpu {

// How a layer lies in clusters of the current device; `fits` is false where it does not: no
// clusters (before compute capability 9, or no code for later ones), weights too large, too many
// rows, or LMFAST_RECURRENT_CLUSTERS=0.
RecurrentPlan cluster_plan(RecurrentCell cell, int hidden, int batch, DType dtype, bool backward);

void launch_in_clusters(const RecurrentFwd& args, const RecurrentPlan& plan, DType dtype,
                        cudaStream_t stream);
void launch_in_clusters(const RecurrentBwd& args, const RecurrentPlan& plan, DType dtype,
                        cudaStream_t stream);

}  // namespace lmfast::gpu
