// The functions of CUDA's device language and runtime that csrc/cuda uses, on the fibers of cuda_host.h. Asynchronous
// copies and matrix products of warps are in cuda_tensor_host.h.
#pragma once

#define threadIdx (cuda_host::current()->thread)
#define blockIdx (cuda_host::current()->index)
#define blockDim (cuda_host::launch->block)
#define gridDim (cuda_host::launch->grid)

#define CAPS_SHARED(T, name, count)                                                                  \
  static const char name##_declaration = 0;                                                          \
  T(&name)[count] = *reinterpret_cast<T(*)[count]>(cuda_host::static_shared(&name##_declaration, sizeof(T) * (count)))
#define CAPS_DYNAMIC_SHARED(name) unsigned char* const name = cuda_host::current()->block->dynamic_shared.get()

inline void __syncthreads() { cuda_host::wait(cuda_host::current()->block->barrier); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  if (mask != 0xffffffffu) cuda_host::fail("a barrier of a part of a warp");
  cuda_host::wait(cuda_host::warp().barrier);
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return cuda_host::shuffle(mask, value, lane);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return cuda_host::shuffle(mask, value, int(threadIdx.x % 32) ^ bits);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int step) {
  const int lane = int(threadIdx.x % 32);
  return cuda_host::shuffle(mask, value, lane + step < 32 ? lane + step : lane);
}

template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}
inline unsigned __float_as_uint(float x) { return bits_as<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return bits_as<float>(x); }
inline long long __double_as_longlong(double x) { return bits_as<long long>(x); }
inline double __longlong_as_double(long long x) { return bits_as<double>(x); }

namespace cuda_host {

inline float from_bfloat16(uint16_t bits) { return __uint_as_float(unsigned(bits) << 16); }
inline uint16_t to_bfloat16(float x) {
  const unsigned bits = __float_as_uint(x);
  if (x != x) return 0x7fff;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float from_float16(uint16_t bits) { return float(bits_as<_Float16>(bits)); }
inline uint16_t to_float16(float x) { return bits_as<uint16_t>(_Float16(x)); }

// The largest dynamic shared memory that a kernel was allowed.
inline std::map<void*, int> allowed_shared;
inline int last_error = 0;

}  // namespace cuda_host

using cudaStream_t = void*;
enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorCooperativeLaunchTooLarge = 720
};
enum cudaDeviceAttr : int {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrCooperativeLaunch = 95,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaFuncAttribute : int { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    default: return "too many blocks in cooperative launch";
  }
}
inline cudaError_t cudaGetLastError() { return cudaError_t(std::exchange(cuda_host::last_error, 0)); }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  const auto& settings = cuda_host::settings;
  *value = which == cudaDevAttrMultiProcessorCount ? settings.processors
           : which == cudaDevAttrCooperativeLaunch ? settings.cooperative
                                                   : settings.shared_limit;
  return cudaSuccess;
}
template <typename Args>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Args), cudaFuncAttribute, int bytes) {
  if (bytes > cuda_host::settings.shared_limit) return cudaErrorInvalidValue;
  cuda_host::allowed_shared[reinterpret_cast<void*>(kernel)] = bytes;
  return cudaSuccess;
}
template <typename Args>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(Args), int, size_t) {
  *blocks = cuda_host::settings.blocks_a_processor;
  return cudaSuccess;
}

template <typename Args>
cudaError_t cuda_host_launch(void (*kernel)(Args), dim3 grid, dim3 block, void** args, size_t shared, bool cooperative) {
  const auto& settings = cuda_host::settings;
  const auto found = cuda_host::allowed_shared.find(reinterpret_cast<void*>(kernel));
  const size_t allowed = found == cuda_host::allowed_shared.end() ? 48 * 1024 : size_t(found->second);
  if (grid.x == 0 || block.x == 0 || block.x > 1024 || shared > allowed) return cudaErrorInvalidConfiguration;
  if (cooperative && (settings.refuse != 0 || int(grid.x) > settings.processors * settings.blocks_a_processor)) {
    return cudaErrorCooperativeLaunchTooLarge;
  }
  // Whole warps only, by the conventions of caps/gpu.h.
  if (block.x % 32 != 0) cuda_host::fail("a block that is not whole warps");
  const Args copy = *static_cast<const Args*>(args[0]);
  cuda_host::run_grid(grid, block, shared, cooperative, [&] { kernel(copy); });
  return cudaSuccess;
}
template <typename Args>
cudaError_t cudaLaunchKernel(void (*kernel)(Args), dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t) {
  return cuda_host_launch(kernel, grid, block, args, shared, false);
}
template <typename Args>
cudaError_t cudaLaunchCooperativeKernel(void (*kernel)(Args), dim3 grid, dim3 block, void** args, size_t shared,
                                        cudaStream_t) {
  return cuda_host_launch(kernel, grid, block, args, shared, true);
}
