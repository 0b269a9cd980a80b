// What an op and its kernels share. The file of an op is compiled once for the host, where it sees torch, and once for
// each instruction set (CAPS_ISA is then its name), where it sees no torch; plain data is all that passes between them.
//
// Code compiled for an instruction set must stay in a namespace of that name: the linker keeps one of several equal
// inline functions, and one compiled for AVX-512 would crash elsewhere. So kernels use no functions of the standard
// library, and inline functions outside such a namespace are CAPS_INLINE.
#pragma once

#include <cstdint>

#define CAPS_INLINE __attribute__((always_inline)) inline

// For a function with a loop that wants all registers, and gets too few of them within the function that calls it.
#define CAPS_NOINLINE __attribute__((noinline))

// Before a loop over the vectors of an array: they are in registers only if the loop is unrolled whole.
#define CAPS_UNROLL _Pragma("GCC unroll 32")

#if defined(__x86_64__)
#define CAPS_FOR_EACH_ISA(apply, ...) \
  apply(v2 __VA_OPT__(, ) __VA_ARGS__) apply(v3 __VA_OPT__(, ) __VA_ARGS__) apply(v4 __VA_OPT__(, ) __VA_ARGS__)
#else
#define CAPS_FOR_EACH_ISA(apply, ...) apply(baseline __VA_OPT__(, ) __VA_ARGS__)
#endif

// CAPS_KERNEL(name, Args) declares the kernel void name(const Args&, int64_t begin, int64_t end), which works on the
// chunks begin … end - 1 of the work that Args describes. Each instruction set defines it in its own namespace, and the
// host calls it with caps::launch.
#define CAPS_DECLARE_KERNEL(isa, name, Args) \
  namespace isa {                            \
  void name(const Args&, int64_t, int64_t);  \
  }
#ifdef CAPS_ISA
#define CAPS_KERNEL(name, Args) CAPS_DECLARE_KERNEL(CAPS_ISA, name, Args)
#else
#define CAPS_KERNEL_OF(isa, name) isa::name,
#define CAPS_KERNEL(name, Args)                      \
  CAPS_FOR_EACH_ISA(CAPS_DECLARE_KERNEL, name, Args) \
  inline constexpr KernelTable<Args> name = {{CAPS_FOR_EACH_ISA(CAPS_KERNEL_OF, name)}};
#endif

namespace caps {

enum class DType : int32_t { float32, float64, bfloat16, float16 };

// The 16-bit types as they lie in memory; load and store convert.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// A tensor of any strides, counted in elements. What is an input must not be written.
template <int rank>
struct View {
  void* data;
  int64_t size[rank];
  int64_t stride[rank];
};

#define CAPS_COUNT(isa) +1
constexpr int kIsaCount = CAPS_FOR_EACH_ISA(CAPS_COUNT);

// One kernel for each instruction set.
template <typename Args>
struct KernelTable {
  void (*of[kIsaCount])(const Args&, int64_t begin, int64_t end);
};

// Memory that a thread keeps from call to call, for fresh memory costs a page fault every 4 KiB. It is aligned to 64
// bytes and holds whatever was left there, until the thread asks for the same slot again.
enum class Scratch : int32_t {
  call,   // for the thread that calls an op: shared by all chunks, asked for before `launch`
  chunk,  // for a kernel: its own
};
void* scratch(Scratch slot, int64_t bytes);

}  // namespace caps
