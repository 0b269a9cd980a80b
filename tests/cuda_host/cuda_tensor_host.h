// cp.async, mma and ldmatrix as loops: caps/gpu_async.h and caps/gpu_mma.h say what they do.
#pragma once

namespace cuda_host {

inline void aligned_to_16(const void* at) {
  if (reinterpret_cast<uintptr_t>(at) % 16 != 0) fail("an address is not aligned to 16 bytes");
}

// The copy is done when it is waited for. Until then there are NaNs: for whoever reads too early, and for whoever still
// reads what was there before. They are written word by word, for g++ hides a memset of 16 bytes from ThreadSanitizer.
inline void async_copy(void* to, const void* from) {
  aligned_to_16(to);
  aligned_to_16(from);
  *static_cast<uint4*>(to) = {~0u, ~0u, ~0u, ~0u};
  auto& groups = current()->copies;
  if (groups.empty()) groups.emplace_back();
  groups.back().push_back({to, from});
}

inline void async_commit() {
  auto& groups = current()->copies;
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();
}

inline void async_wait(int left) {
  auto& groups = current()->copies;
  while (int(groups.size()) - 1 > left) {
    for (const Copy& copy : groups.front()) {
      *static_cast<uint4*>(copy.to) = copy.from == nullptr ? uint4{} : *static_cast<const uint4*>(copy.from);
    }
    groups.erase(groups.begin());
  }
  if (groups.size() == 1 && groups[0].empty()) groups.clear();
}

inline uint16_t half_of(uint32_t pair, int which) { return uint16_t(which == 0 ? pair : pair >> 16); }

template <typename F>
void multiply_add(float (&c)[4], const uint32_t (&a)[2], uint32_t b, const F& widen) {
  struct Registers {
    uint32_t a[2], b;
  } own{{a[0], a[1]}, b}, all[32];
  exchange(&own, sizeof(own), 0, 32, all);
  const int g = int(threadIdx.x % 32) / 4, q = int(threadIdx.x % 32) % 4;
  for (int n = 0; n < 4; ++n) {
    for (int k = 0; k < 8; ++k) {
      const float left = widen(half_of(all[g * 4 + k / 2].a[n / 2], k % 2));
      c[n] += left * widen(half_of(all[(2 * q + n % 2) * 4 + k / 2].b, k % 2));
    }
  }
}

inline void load_transposed(const void* row, uint32_t (&out)[2]) {
  if (threadIdx.x % 32 < 16) aligned_to_16(row);
  const void* rows[16];
  exchange(&row, sizeof(row), 0, 16, rows);
  const int g = int(threadIdx.x % 32) / 4, q = int(threadIdx.x % 32) % 4;
  for (int n = 0; n < 2; ++n) {
    uint16_t pair[2];
    for (int half = 0; half < 2; ++half) pair[half] = static_cast<const uint16_t*>(rows[8 * n + 2 * q + half])[g];
    out[n] = pair[0] | uint32_t(pair[1]) << 16;
  }
  arrive(warp().barrier);  // the rows are read at once, by all lanes
}

}  // namespace cuda_host
