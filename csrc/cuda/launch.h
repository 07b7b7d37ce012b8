// What the CUDA bindings share: checks, the current stream, the choice of types.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <initializer_list>
#include <map>
#include <mutex>
#include <utility>

#include "../common/tensor.h"
#include "kernels/device.cuh"

namespace lmfast::gpu {

// Raises unless `t` is on the GPU of `like`, with unit stride in its last dimension.
inline void check_gpu_rows(const Tensor& t, const Tensor& like, const char* name) {
  LMFAST_CHECK(t.is_cuda() && t.get_device_index() == like.get_device_index(), name,
               " must be on the GPU of the first argument");
  LMFAST_CHECK(t.dim() >= 1, name, " must have at least one dimension");
  LMFAST_CHECK(t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1, name,
               " must have stride 1 in its last dimension, got ", t.stride(t.dim() - 1));
}

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  LMFAST_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream) == 0,
               "no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

// Raises for what a launch returned.
inline void check_launch(const char* kernel, cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();  // or the next launch of anyone reports it again
  LMFAST_CHECK(error == cudaSuccess, kernel, " did not start: ", cudaGetErrorString(error));
}

inline void check_launch(const char* kernel) { check_launch(kernel, cudaGetLastError()); }

// Multiprocessors of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  LMFAST_CHECK(cudaGetDevice(&device) == cudaSuccess, "no current CUDA device");
  LMFAST_CHECK(
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess,
      "the number of multiprocessors of device ", device, " is not known");
  return count;
}

// Lets a kernel take all the shared memory that a block of the current device can have, and says
// whether it may. Set once for each kernel and device: were it set to what each launch takes,
// threads would undo each other's setting between it and the launch.
inline bool allow_shared_memory(const void* kernel, int device) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, bool> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find({kernel, device});
  if (found != known.end()) return found->second;
  int most = 0;
  cudaFuncAttributes attributes{};
  const bool allowed =
      cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) ==
          cudaSuccess &&
      cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           most - static_cast<int>(attributes.sharedSizeBytes)) == cudaSuccess;
  if (!allowed) cudaGetLastError();  // the refusal is the answer, not an error of the next launch
  return known[{kernel, device}] = allowed;
}

// Whether rows of all these operands (null: absent) can be read in vectors of 16 bytes.
inline bool aligned(std::initializer_list<const Tensor*> operands) {
  for (const Tensor* t : operands) {
    if (t == nullptr) continue;
    const int64_t size = t->element_size();
    if (reinterpret_cast<uintptr_t>(t->const_data_ptr()) % 16 != 0) return false;
    for (int64_t d = 0; d < t->dim() - 1; ++d) {
      if (t->size(d) > 1 && t->stride(d) * size % 16 != 0) return false;
    }
  }
  return true;
}

template <typename T>
struct Type {
  using type = T;
};

// Calls function(Type<T>{}) for a floating-point type the GPU kernels have.
template <typename Function>
void with_type(DType dtype, Function function) {
  switch (dtype) {
    case DType::kF32:
      return function(Type<float>{});
    case DType::kBF16:
      return function(Type<bf16>{});
    case DType::kF16:
      return function(Type<f16>{});
    default:
      LMFAST_CHECK(false, "the CUDA kernels take float32, bfloat16 and float16");
  }
}

}  // namespace lmfast::gpu
