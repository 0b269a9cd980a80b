// What the kernels of csrc/cuda see: packs of numbers, conversions, sums over lanes. A .cu is compiled by nvcc, and for
// tests by a C++ compiler with CAPS_ON_HOST, where tests/cuda_host runs the threads of a GPU as fibers.
//
// Conventions that keep the two alike:
//   - a kernel takes one struct: __global__ void __launch_bounds__(n) name(const __grid_constant__ Args args), and is
//     launched by Gpu::launch (caps/gpu_op.h); blocks and grids have one dimension;
//   - shared memory is declared by CAPS_SHARED and CAPS_DYNAMIC_SHARED; its contents are undefined at first;
//   - __syncthreads, __syncwarp, shuffles and grid_barrier are reached by all threads of the block, warp or grid;
//   - sums are taken in an order that depends on the shape alone, so results are the same bits on every run.
#pragma once

#include <caps/kernel.h>

#include <type_traits>

#ifdef CAPS_ON_HOST
#include <cuda_host.h>
#else
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
// A static array of the block, and the dynamic part of its shared memory as bytes, aligned to 16.
#define CAPS_SHARED(T, name, count) __shared__ T name[count]
#define CAPS_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

#define CAPS_DEVICE __device__ __forceinline__

namespace caps::gpu {

// The type in which sums of a storage type are taken.
template <typename scalar_t>
using Acc = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

CAPS_DEVICE float widen(float x) { return x; }
CAPS_DEVICE double widen(double x) { return x; }
#ifdef CAPS_ON_HOST
CAPS_DEVICE float widen(BFloat16 x) { return cuda_host::from_bfloat16(x.bits); }
CAPS_DEVICE float widen(Float16 x) { return cuda_host::from_float16(x.bits); }
#else
CAPS_DEVICE float widen(BFloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
CAPS_DEVICE float widen(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }
#endif

// Rounds to nearest even.
template <typename scalar_t>
CAPS_DEVICE scalar_t narrow(Acc<scalar_t> x) {
#ifdef CAPS_ON_HOST
  if constexpr (std::is_same_v<scalar_t, BFloat16>) return {cuda_host::to_bfloat16(x)};
  else if constexpr (std::is_same_v<scalar_t, Float16>) return {cuda_host::to_float16(x)};
#else
  if constexpr (std::is_same_v<scalar_t, BFloat16>) return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
  else if constexpr (std::is_same_v<scalar_t, Float16>) return {__half_as_ushort(__float2half_rn(x))};
#endif
  else return x;
}

// How many numbers 16 bytes hold.
template <typename scalar_t>
constexpr int kWide = 16 / int(sizeof(scalar_t));

template <typename T, int n>
struct Pack {
  T x[n];
  CAPS_DEVICE T& operator[](int k) { return x[k]; }
  CAPS_DEVICE const T& operator[](int k) const { return x[k]; }
};

// The words in which n numbers are loaded and stored: of 4, 8 or 16 bytes, or whole multiples of 16. More than one number
// is aligned as its word is.
template <int bytes>
using Word = std::conditional_t<bytes % 16 == 0, uint4, std::conditional_t<bytes == 8, uint2, uint32_t>>;

// n numbers from memory, in the type of sums.
template <int n, typename scalar_t>
CAPS_DEVICE Pack<Acc<scalar_t>, n> load(const scalar_t* from) {
  scalar_t raw[n];
  if constexpr (n > 1) {
    using W = Word<n * sizeof(scalar_t)>;
    constexpr int bytes = n * sizeof(scalar_t), count = bytes / int(sizeof(W));
    static_assert(bytes == count * int(sizeof(W)));
    W words[count];
#pragma unroll
    for (int k = 0; k < count; ++k) words[k] = reinterpret_cast<const W*>(from)[k];
    __builtin_memcpy(raw, words, sizeof(raw));
  } else {
    raw[0] = from[0];
  }
  Pack<Acc<scalar_t>, n> result;
#pragma unroll
  for (int k = 0; k < n; ++k) result[k] = widen(raw[k]);
  return result;
}

template <typename scalar_t, int n>
CAPS_DEVICE void store(scalar_t* to, const Pack<Acc<scalar_t>, n>& value) {
  scalar_t raw[n];
#pragma unroll
  for (int k = 0; k < n; ++k) raw[k] = narrow<scalar_t>(value[k]);
  if constexpr (n > 1) {
    using W = Word<n * sizeof(scalar_t)>;
    constexpr int bytes = n * sizeof(scalar_t), count = bytes / int(sizeof(W));
    static_assert(bytes == count * int(sizeof(W)));
    W words[count];
    __builtin_memcpy(words, raw, sizeof(raw));
#pragma unroll
    for (int k = 0; k < count; ++k) reinterpret_cast<W*>(to)[k] = words[k];
  } else {
    to[0] = raw[0];
  }
}

// Sum and largest over groups of `width` neighbouring lanes, a power of 2; every lane gets the same bits. NaN is larger
// than any number. All lanes of the warp take part.
template <typename T>
CAPS_DEVICE T group_sum(T x, int width) {
  for (int step = width / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

template <typename T>
CAPS_DEVICE T larger(T a, T b) {
  return a > b || a != a ? a : b;
}

template <typename T>
CAPS_DEVICE T group_max(T x, int width) {
  for (int step = width / 2; step > 0; step /= 2) x = larger(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

// All threads of a cooperative launch wait for each other; what they wrote to global memory before is seen after.
CAPS_DEVICE void grid_barrier() {
#ifdef CAPS_ON_HOST
  cuda_host::grid_barrier();
#else
  cooperative_groups::this_grid().sync();
#endif
}

// Calls f.template operator()<scalar_t>() for a dtype.
template <typename F>
auto dispatch_floating(DType dtype, const F& f) {
  switch (dtype) {
    case DType::float64: return f.template operator()<double>();
    case DType::bfloat16: return f.template operator()<BFloat16>();
    case DType::float16: return f.template operator()<Float16>();
    default: return f.template operator()<float>();
  }
}

}  // namespace caps::gpu
