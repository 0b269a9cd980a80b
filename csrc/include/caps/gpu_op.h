// What the host part of an op of csrc/cuda uses: the device of its tensors, launches, and all of caps/op.h that is not
// about CPU threads. Tests compile it too, against tests/cuda_host in place of CUDA's runtime.
#pragma once

#include <caps/gpu.h>
#include <caps/op.h>

#ifdef CAPS_ON_HOST
// Tests run the kernels on CPU tensors, under names of their own.
#define CAPS_GPU_OPS caps_kernels_cuda_host
#define CAPS_GPU_KEY CPU
#else
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#define CAPS_GPU_OPS caps_kernels_cuda
#define CAPS_GPU_KEY CUDA
#endif

namespace caps::gpu {

// Blocks of a launch, threads of a block, and bytes of a block's dynamic shared memory.
struct Grid {
  int64_t blocks;
  int threads;
  int64_t shared = 0;
};

// How many blocks a launch may have; kernels loop over what is more.
constexpr int64_t kMaxBlocks = 0x7fffffff;

// The device of a tensor: current as long as this lives, and what an op asks and tells it. Errors name the op.
class Gpu {
 public:
#ifdef CAPS_ON_HOST
  Gpu(const char* op, const Tensor&) : op_(op) {}
#else
  Gpu(const char* op, const Tensor& tensor) : op_(op), index_(tensor.get_device_index()), guard_(index_) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
#endif

  int processors() const { return attribute(cudaDevAttrMultiProcessorCount); }
  // Bytes of shared memory that a block may have.
  int64_t shared_limit() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

  // How many blocks of a cooperative launch there may be; 0 where the device has no such launches.
  template <typename Args>
  int64_t resident_blocks(void (*kernel)(Args), const Grid& grid) const {
    if (attribute(cudaDevAttrCooperativeLaunch) == 0 || grid.shared > shared_limit()) return 0;
    allow_shared(kernel, grid.shared);
    int blocks = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, grid.threads, size_t(grid.shared)));
    return int64_t(blocks) * processors();
  }

  // Launches a kernel on the current stream; cooperative ones may use grid_barrier. No blocks: nothing happens.
  template <typename Args>
  void launch(void (*kernel)(Args), const Grid& grid, const Args& args, bool cooperative = false) const {
    if (grid.blocks == 0) return;
    allow_shared(kernel, grid.shared);
    const dim3 blocks(static_cast<unsigned>(grid.blocks)), threads(static_cast<unsigned>(grid.threads));
    void* arguments[] = {const_cast<Args*>(&args)};
    const size_t shared = size_t(grid.shared);
    check(cooperative ? cudaLaunchCooperativeKernel(kernel, blocks, threads, arguments, shared, stream_)
                      : cudaLaunchKernel(kernel, blocks, threads, arguments, shared, stream_));
  }

 private:
  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, index_));
    return value;
  }

  template <typename Args>
  void allow_shared(void (*kernel)(Args), int64_t bytes) const {
    if (bytes <= 48 * 1024) return;  // what every kernel may have
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
  }

  void check(cudaError_t error) const {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // an error of a launch is told once
    STD_TORCH_CHECK(false, "caps_kernels: ", op_, " on backend \"cuda\": ", cudaGetErrorString(error));
  }

  const char* op_;
  int32_t index_ = 0;
  cudaStream_t stream_ = nullptr;
#ifndef CAPS_ON_HOST
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

}  // namespace caps::gpu
