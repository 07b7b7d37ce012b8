// Plans and launches of the recurrent layers' kernels for clusters.
#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <tuple>

#include "kernels/recurrent_cluster.cuh"
#include "recurrent_cluster.h"

namespace lmfast::gpu {
namespace {

template <typename Args>
using Kernel = void (*)(Args);

template <typename T>
Kernel<RecurrentFwd> kernel_of(const RecurrentPlan& plan, RecurrentFwd) {
  if constexpr (sizeof(T) == 2) {
    constexpr const RecurrentTile(&tiles)[2] = kHalfClusterForward;
    if (plan.tile_rows == tiles[0].rows) {
      return recurrent_cluster_fwd_kernel<T, tiles[0].rows, tiles[0].depth>;
    }
    return recurrent_cluster_fwd_kernel<T, tiles[1].rows, tiles[1].depth>;
  } else {
    return recurrent_cluster_fwd_kernel<T, kFloatCluster[0].rows, kFloatCluster[0].depth>;
  }
}

template <typename T>
Kernel<RecurrentBwd> kernel_of(const RecurrentPlan& plan, RecurrentBwd) {
  if constexpr (sizeof(T) == 2) {
    constexpr const RecurrentTile(&tiles)[2] = kHalfClusterBackward;
    if (plan.tile_rows == tiles[0].rows) {
      return recurrent_cluster_bwd_kernel<T, tiles[0].rows, tiles[0].depth>;
    }
    return recurrent_cluster_bwd_kernel<T, tiles[1].rows, tiles[1].depth>;
  } else {
    return recurrent_cluster_bwd_kernel<T, kFloatCluster[0].rows, kFloatCluster[0].depth>;
  }
}

template <typename Args>
Kernel<Args> kernel_of(const RecurrentPlan& plan, DType dtype) {
  Kernel<Args> kernel = nullptr;
  with_type(dtype, [&](auto t) { kernel = kernel_of<typename decltype(t)::type>(plan, Args{}); });
  return kernel;
}

// The launch of a plan; keeps the attribute that the configuration points to.
struct Launch {
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};

  Launch(const RecurrentPlan& plan, cudaStream_t stream) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = plan.unit_blocks;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.gridDim = dim3(plan.unit_blocks, plan.groups);
    config.blockDim = dim3(plan.warps * 32);
    config.dynamicSmemBytes = plan.shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;
};

// Clusters of the plan that the device runs at once: a part of a GPU may have too few neighbouring
// multiprocessors. 0 also where there is only code for GPUs without clusters, which a later GPU
// translates, and which has nothing in it. Asked, and the kernel prepared, once for each kind of
// launch.
int clusters_at_once(const RecurrentPlan& plan, const void* kernel, int device) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int, int, int>, int> known;
  const auto key = std::make_tuple(kernel, device, plan.unit_blocks, plan.warps, plan.shared_bytes);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  cudaFuncAttributes attributes{};
  int clusters = 0;
  const Launch launch(plan, nullptr);
  const bool there =
      cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90 &&
      allow_shared_memory(kernel, device) &&
      (plan.unit_blocks <= 8 ||
       cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) ==
           cudaSuccess) &&
      cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config) == cudaSuccess;
  if (!there) {
    clusters = 0;
    cudaGetLastError();  // the refusal is the answer, not an error of the next launch
  }
  known[key] = clusters;
  return clusters;
}

template <typename Args>
void launch_on(const Args& args, const RecurrentPlan& plan, DType dtype, cudaStream_t stream,
               const char* name) {
  const Kernel<Args> kernel = kernel_of<Args>(plan, dtype);
  const Launch launch(plan, stream);
  check_launch(name, cudaLaunchKernelEx(&launch.config, kernel, args));
}

}  // namespace

RecurrentPlan cluster_plan(RecurrentCell cell, int hidden, int batch, DType dtype, bool backward) {
  const char* given = std::getenv("LMFAST_RECURRENT_CLUSTERS");
  if (given != nullptr && std::string(given) == "0") return {};
  int device = 0, major = 0, clusters = 0, shared = 0;
  LMFAST_CHECK(cudaGetDevice(&device) == cudaSuccess, "no current CUDA device");
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device);
  if (major < 9 || clusters == 0) return {};
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return recurrent_cluster_plan_with_room(
      cell, backward, hidden, batch, dtype != DType::kF32, multiprocessors(),
      std::min(shared, kRecurrentMaxShared), [&](const RecurrentPlan& plan) {
        const void* kernel =
            backward ? reinterpret_cast<const void*>(kernel_of<RecurrentBwd>(plan, dtype))
                     : reinterpret_cast<const void*>(kernel_of<RecurrentFwd>(plan, dtype));
        return clusters_at_once(plan, kernel, device);
      });
}

void launch_in_clusters(const RecurrentFwd& args, const RecurrentPlan& plan, DType dtype,
                        cudaStream_t stream) {
  launch_on(args, plan, dtype, stream, "recurrent_cluster_fwd_kernel");
}

void launch_in_clusters(const RecurrentBwd& args, const RecurrentPlan& plan, DType dtype,
                        cudaStream_t stream) {
  launch_on(args, plan, dtype, stream, "recurrent_cluster_bwd_kernel");
}

}  // namespace lmfast::gpu
