// Small kernels with known results that try the harness itself; test_harness.py calls them, and breaks them.
#include <caps/gpu_async.h>
#include <caps/gpu_mma.h>

#define PROBE extern "C" __attribute__((visibility("default")))

namespace caps::gpu {

struct ProbeArgs {
  const float* in;
  float* out;
  int size;
};

// out = in backwards, a block at a time, through a static array and through dynamic shared memory.
__global__ void reverse(const __grid_constant__ ProbeArgs args) {
  CAPS_SHARED(float, fixed, 64);
  CAPS_DYNAMIC_SHARED(memory);
  float* dynamic = reinterpret_cast<float*>(memory);
  const int n = int(blockDim.x), i = int(threadIdx.x);
  fixed[i] = args.in[blockIdx.x * n + i];
  __syncthreads();
  dynamic[i] = fixed[n - 1 - i];
  __syncthreads();
  const float other = dynamic[(i + 1) % n];
  args.out[blockIdx.x * n + i] = dynamic[i] + 0 * other;
}

// out[0] = Σ in: of lanes by shuffles, of blocks after a grid barrier.
__global__ void sum(const __grid_constant__ ProbeArgs args) {
  const float total = group_sum(args.in[blockIdx.x * 32 + threadIdx.x], 32);
  if (threadIdx.x == 0) args.out[1 + blockIdx.x] = total;
  grid_barrier();
  if (blockIdx.x != 0 || threadIdx.x != 0) return;
  float all = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) all += args.out[1 + b];
  args.out[0] = all;
}

// out = in by asynchronous copies, the second half in a group of its own; zeros beyond `size`.
__global__ void copy(const __grid_constant__ ProbeArgs args) {
  CAPS_DYNAMIC_SHARED(memory);
  float* to = reinterpret_cast<float*>(memory) + threadIdx.x * 8;
  for (int half = 0; half < 2; ++half) {
    const int at = int(threadIdx.x) * 8 + half * 4;
    async_copy(to + half * 4, at < args.size ? args.in + at : nullptr);
    async_commit();
  }
  async_wait<1>();
  for (int n = 0; n < 4; ++n) args.out[threadIdx.x * 8 + n] = to[n];
  async_wait<0>();
  for (int n = 4; n < 8; ++n) args.out[threadIdx.x * 8 + n] = to[n];
}

struct ProductArgs {
  const uint32_t *a, *b;  // [32, 2] and [32], as registers
  float* c;               // [32, 4]
};

__global__ void product(const __grid_constant__ ProductArgs args) {
  const int lane = int(threadIdx.x);
  float c[4] = {0, 0, 0, 0};
  multiply_add<BFloat16>(c, {args.a[2 * lane], args.a[2 * lane + 1]}, args.b[lane]);
  for (int n = 0; n < 4; ++n) args.c[4 * lane + n] = c[n];
}

struct TransposeArgs {
  const uint16_t* in;  // [16, 8]
  uint32_t* out;       // [32, 2]
};

__global__ void transpose(const __grid_constant__ TransposeArgs args) {
  uint32_t out[2];
  load_transposed(args.in + threadIdx.x % 16 * 8, out);
  for (int n = 0; n < 2; ++n) args.out[2 * threadIdx.x + n] = out[n];
}

template <typename Args>
int run(void (*kernel)(Args), int blocks, int threads, int shared, Args args, bool cooperative) {
  void* arguments[] = {&args};
  return cuda_host_launch(kernel, dim3(unsigned(blocks)), dim3(unsigned(threads)), arguments, size_t(shared),
                          cooperative);
}

}  // namespace caps::gpu

using namespace caps::gpu;

PROBE int probe_reverse(const float* in, float* out, int blocks, int threads) {
  return run(reverse, blocks, threads, threads * 4, ProbeArgs{in, out, 0}, false);
}
PROBE int probe_sum(const float* in, float* out, int blocks, int cooperative) {
  return run(sum, blocks, 32, 0, ProbeArgs{in, out, 0}, cooperative != 0);
}
PROBE int probe_copy(const float* in, float* out, int size) {
  return run(copy, 1, 32, 32 * 32, ProbeArgs{in, out, size}, false);
}
PROBE int probe_product(const uint32_t* a, const uint32_t* b, float* c) {
  return run(product, 1, 32, 0, ProductArgs{a, b, c}, false);
}
PROBE int probe_transpose(const uint16_t* in, uint32_t* out) {
  return run(transpose, 1, 32, 0, TransposeArgs{in, out}, false);
}
