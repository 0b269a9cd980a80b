// Copies from global to shared memory that a thread starts and does not wait for (cp.async). Copies are collected until
// async_commit makes a group of them; async_wait waits for groups of the calling thread, the oldest first. Other threads
// see what was copied after a barrier that follows. A thread waits for all of its groups before it ends.
#pragma once

#include <caps/gpu.h>

namespace caps::gpu {

// 16 bytes, both sides aligned to them; zeros where `from` is null.
CAPS_DEVICE void async_copy(void* to, const void* from) {
#ifdef CAPS_ON_HOST
  cuda_host::async_copy(to, from);
#else
  // With a source size of 0 nothing is read, but the address must be one.
  const unsigned target = unsigned(__cvta_generic_to_shared(to)), size = from == nullptr ? 0 : 16;
  const void* source = from == nullptr ? to : from;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(size) : "memory");
#endif
}

CAPS_DEVICE void async_commit() {
#ifdef CAPS_ON_HOST
  cuda_host::async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `left` of the thread's groups are under way.
template <int left>
CAPS_DEVICE void async_wait() {
#ifdef CAPS_ON_HOST
  cuda_host::async_wait(left);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
#endif
}

}  // namespace caps::gpu
