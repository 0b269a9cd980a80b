// CUDA on the host, for tests: enough of the language and of the runtime to compile csrc/cuda with a C++ compiler.
//
// Every thread of a launch is a fiber, and all blocks of a grid are alive at once. A fiber runs until it waits at a
// barrier or ends; the order in which fibers get their turn is chosen by `order`, and results must not depend on it. A
// barrier that some of its threads never reach is an error. Shared memory and stacks are allocations of their own, so
// that AddressSanitizer sees the ends of them; to ThreadSanitizer, fibers are threads, and barriers all that orders them.
// Shared memory starts as NaNs. Warps exchange values as whole warps only.
#pragma once

#include <math.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreReadsBegin(const char*, int);
extern "C" void AnnotateIgnoreReadsEnd(const char*, int);
extern "C" void AnnotateIgnoreWritesBegin(const char*, int);
extern "C" void AnnotateIgnoreWritesEnd(const char*, int);
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};

namespace cuda_host {

// The orders in which fibers get their turns.
enum Order : int { forward, backward, shuffled };

// What a test may set, and what it may read.
struct Settings {
  int order = forward;
  int seed = 0;                // of shuffled orders
  int processors = 3;          // of the device
  int blocks_a_processor = 2;  // that are resident at once
  int shared_limit = 99 * 1024;
  int cooperative = 1;  // whether the device has cooperative launches
  int refuse = 0;       // whether cooperative launches fail
  int launches = 0;     // counted since it was set to 0
};
inline Settings settings;

// ThreadSanitizer is told of the two phases by turns: who is first to arrive at the next one must not seem to have come
// before those who have yet to leave the last.
struct Barrier {
  int expected = 0, arrived = 0;
  uint64_t generation = 0;
  uint64_t phases[2] = {};
};

struct Block;

// An asynchronous copy of 16 bytes, or of zeros where `from` is null.
struct Copy {
  void* to;
  const void* from;
};

// The registers of a fiber that does not run. Where the processor is known they are on its stack, for swapcontext takes
// two system calls each time, and AddressSanitizer forgets what it knew of the stack.
#if defined(__x86_64__)
struct Context {
  void* stack = nullptr;
};
asm(R"(
  .text
  .type cuda_host_switch, @function
cuda_host_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov (%rsi), %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
  .size cuda_host_switch, . - cuda_host_switch
)");
extern "C" void cuda_host_switch(Context* from, Context* to) __attribute__((visibility("hidden")));

inline void switch_context(Context& from, Context& to) { cuda_host_switch(&from, &to); }
inline void make_context(Context& context, char* stack, size_t bytes, void (*function)()) {
  void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + bytes) / 16 * 16) - 8;
  std::fill(top, top + 8, nullptr);
  top[6] = reinterpret_cast<void*>(function);  // where `ret` goes, after six registers
  context.stack = top;
}
#else
using Context = ucontext_t;
inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
inline void make_context(Context& context, char* stack, size_t bytes, void (*function)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, function, 0);
}
#endif

struct Fiber {
  Context context;
  Block* block = nullptr;
  dim3 thread, index;
  Barrier* waits_at = nullptr;
  uint64_t generation = 0;
  bool ended = false;
  int exchanges = 0;  // of values with the warp, so far
  std::vector<std::vector<Copy>> copies;  // cp.async: groups not waited for yet, the last still being made
  void* tsan = nullptr;
};

struct Warp {
  Barrier barrier;
  // Two slots a lane, used in turn: one barrier an exchange is then enough.
  alignas(16) unsigned char slots[2][32][64];
};

struct Block {
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<Fiber> fibers;
  std::unique_ptr<unsigned char[]> dynamic_shared;
  std::map<const void*, std::unique_ptr<unsigned char[]>> static_shared;
};

struct Launch {
  dim3 grid, block;
  Barrier barrier;
  bool cooperative = false;
  std::function<void()> kernel;
  Context scheduler;
  void* tsan = nullptr;
};

inline Launch* launch = nullptr;

// What ThreadSanitizer is told of fibers, and what it must not see: the harness's own records, which the one real thread
// keeps in order. Nothing without it.
#if defined(__SANITIZE_THREAD__)
#define CUDA_HOST_UNSEEN __attribute__((noinline, no_sanitize("thread")))
inline void* tsan_here() { return __tsan_get_current_fiber(); }
inline void* tsan_create() { return __tsan_create_fiber(0); }
inline void tsan_destroy(void* fiber) { __tsan_destroy_fiber(fiber); }
inline void tsan_release(void* at) { __tsan_release(at); }
inline void tsan_acquire(void* at) { __tsan_acquire(at); }
#define CUDA_HOST_TSAN_SWITCH(fiber) __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync)
struct Unseen {
  Unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};
#else
#define CUDA_HOST_UNSEEN
inline void* tsan_here() { return nullptr; }
inline void* tsan_create() { return nullptr; }
inline void tsan_destroy(void*) {}
inline void tsan_release(void*) {}
inline void tsan_acquire(void*) {}
#define CUDA_HOST_TSAN_SWITCH(fiber)
struct Unseen {
  Unseen() {}
  ~Unseen() {}
};
#endif

// A fiber that ended left what AddressSanitizer knows of its last frames.
#if defined(__SANITIZE_ADDRESS__)
inline void asan_clear(void* at, size_t bytes) { __asan_unpoison_memory_region(at, bytes); }
#else
inline void asan_clear(void*, size_t) {}
#endif

inline Fiber* running = nullptr;
CUDA_HOST_UNSEEN inline Fiber* current() { return running; }

[[noreturn]] inline void fail(const char* what) {
  const Fiber* at = current();
  std::fprintf(stderr, "cuda_host: %s (block %u, thread %u)\n", what, at ? at->index.x : 0, at ? at->thread.x : 0);
  std::fflush(stderr);
  std::_Exit(70);
}

CUDA_HOST_UNSEEN inline void switch_to_scheduler() {
  Fiber* self = running;
  CUDA_HOST_TSAN_SWITCH(launch->tsan);
  switch_context(self->context, launch->scheduler);
}

CUDA_HOST_UNSEEN inline void arrive(Barrier& barrier) {
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  running->waits_at = &barrier;
  running->generation = barrier.generation;
  switch_to_scheduler();
  running->waits_at = nullptr;
}

CUDA_HOST_UNSEEN inline void* phase_of(Barrier& barrier) { return &barrier.phases[barrier.generation % 2]; }

// All threads of the barrier wait for each other; what each wrote before is seen by all after.
inline void wait(Barrier& barrier) {
  void* phase = phase_of(barrier);
  tsan_release(phase);
  arrive(barrier);
  tsan_acquire(phase);
}

inline Warp& warp() { return current()->block->warps[current()->thread.x / 32]; }

inline void grid_barrier() {
  if (!launch->cooperative) fail("grid_barrier in a launch that is not cooperative");
  wait(launch->barrier);
}

// Puts a value of `bytes` into this lane's slot and, after all lanes have, copies those of lanes first … first + count - 1.
// It orders no other memory, for CUDA's exchanges do not.
inline void exchange(const void* value, size_t bytes, int first, int count, void* values) {
  const Unseen unseen;
  Warp& own = warp();
  auto& slots = own.slots[current()->exchanges++ % 2];
  std::memcpy(slots[current()->thread.x % 32], value, bytes);
  arrive(own.barrier);
  for (int n = 0; n < count; ++n) std::memcpy(static_cast<char*>(values) + n * bytes, slots[first + n], bytes);
}

template <typename T>
T shuffle(unsigned mask, T value, int lane) {
  if (mask != 0xffffffffu) fail("a shuffle of a part of a warp");
  T result;
  exchange(&value, sizeof(T), lane & 31, 1, &result);
  return result;
}

// Memory of the block that belongs to one declaration.
inline unsigned char* static_shared(const void* declaration, size_t bytes) {
  const Unseen unseen;
  auto& memory = current()->block->static_shared[declaration];
  if (memory == nullptr) {
    memory.reset(new unsigned char[bytes]);
    std::memset(memory.get(), 0xff, bytes);
  }
  return memory.get();
}

CUDA_HOST_UNSEEN inline void end() {
  running->ended = true;
  switch_to_scheduler();
}

CUDA_HOST_UNSEEN inline void fiber_main() {
  tsan_acquire(launch);
  launch->kernel();
  if (!current()->copies.empty()) fail("a thread ended before its asynchronous copies");
  tsan_release(launch);
  end();
}

// What the first fibers of a launch leave to those of the next: to make it anew takes sanitizers longer than small kernels
// run. ThreadSanitizer has room for 8128 fibers, of all libraries together.
struct Home {
  static constexpr size_t bytes = 64 * 1024;
  std::unique_ptr<char[]> stack{new char[bytes]};
  void* tsan = tsan_create();
};
inline std::vector<Home> homes;
constexpr size_t kept_homes = 320;

inline void start(Fiber& fiber, size_t number) {
  if (number == homes.size()) homes.emplace_back();
  Home& home = homes[number];
  asan_clear(home.stack.get(), Home::bytes);
  make_context(fiber.context, home.stack.get(), Home::bytes, fiber_main);
  fiber.tsan = home.tsan;
}

CUDA_HOST_UNSEEN inline bool can_run(const Fiber& fiber) {
  return !fiber.ended && (fiber.waits_at == nullptr || fiber.waits_at->generation != fiber.generation);
}
CUDA_HOST_UNSEEN inline bool has_ended(const Fiber* fiber) { return fiber->ended; }

CUDA_HOST_UNSEEN inline void resume(Fiber& fiber) {
  running = &fiber;
  CUDA_HOST_TSAN_SWITCH(fiber.tsan);
  switch_context(launch->scheduler, fiber.context);
  running = nullptr;
}

// Gives every fiber its turn, over and over, until all have ended.
inline void run(std::vector<Fiber*>& fibers) {
  std::mt19937 random(static_cast<unsigned>(settings.seed));
  if (settings.order == backward) std::reverse(fibers.begin(), fibers.end());
  while (!fibers.empty()) {
    bool moved = false;
    if (settings.order == shuffled) std::shuffle(fibers.begin(), fibers.end(), random);
    for (Fiber* fiber : fibers) {
      if (!can_run(*fiber)) continue;
      resume(*fiber);
      moved = true;
    }
    if (!moved) fail("threads wait at a barrier that others never reach");
    fibers.erase(std::remove_if(fibers.begin(), fibers.end(), has_ended), fibers.end());
  }
}

inline void run_grid(dim3 grid, dim3 threads, size_t shared, bool cooperative, std::function<void()> kernel) {
  Launch own{grid, threads, {}, cooperative, std::move(kernel), {}, tsan_here()};
  own.barrier.expected = int(grid.x * threads.x);
  launch = &own;
  ++settings.launches;
  std::vector<Block> blocks(grid.x);
  std::vector<Fiber*> fibers;
  for (unsigned b = 0; b < grid.x; ++b) {
    Block& block = blocks[b];
    block.barrier.expected = int(threads.x);
    block.warps = std::vector<Warp>(threads.x / 32);
    for (Warp& warp : block.warps) warp.barrier.expected = 32;
    block.dynamic_shared.reset(new unsigned char[shared]);
    std::memset(block.dynamic_shared.get(), 0xff, shared);
    block.fibers = std::vector<Fiber>(threads.x);
    for (unsigned t = 0; t < threads.x; ++t) {
      Fiber& fiber = block.fibers[t];
      fiber.block = &block;
      fiber.thread = dim3(t, 0, 0);
      fiber.index = dim3(b, 0, 0);
      start(fiber, fibers.size());
      fibers.push_back(&fiber);
    }
  }
  tsan_release(&own);
  run(fibers);
  tsan_acquire(&own);
  for (; homes.size() > kept_homes; homes.pop_back()) tsan_destroy(homes.back().tsan);
  launch = nullptr;
}

}  // namespace cuda_host

#include "cuda_runtime_host.h"
#include "cuda_tensor_host.h"
