// Products of small matrices by a warp on tensor cores. Registers hold what the PTX manual says ("Matrix Fragments for
// mma.m16n8k8", "ldmatrix"); tests/cuda_host has the same as loops. All lanes of the warp take part.
#pragma once

#include <caps/gpu.h>

namespace caps::gpu {

// c [16, 8] += a [16, 8] · b [8, 8] for BFloat16 or Float16, sums in float32. With g = lane / 4 and q = lane % 4:
//   a[0] holds A[g][2q], A[g][2q + 1];  a[1] the same of row g + 8;  b holds B[2q][g], B[2q + 1][g];
//   c[0], c[1] are C[g][2q], C[g][2q + 1];  c[2], c[3] the same of row g + 8.
template <typename scalar_t>
CAPS_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[2], uint32_t b) {
#ifdef CAPS_ON_HOST
  cuda_host::multiply_add(c, a, b, [](uint16_t bits) { return widen(scalar_t{bits}); });
#else
  if constexpr (std::is_same_v<scalar_t, BFloat16>) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
  } else {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
  }
#endif
}

// Two 8 × 8 matrices M of 16-bit numbers from shared memory, transposed: with g and q as above, out[n] holds M_n[2q][g]
// and M_n[2q + 1][g]. Lane 8n + r gives the address of row r of M_n, 16 bytes aligned to 16; the other lanes' are unused.
CAPS_DEVICE void load_transposed(const void* row, uint32_t (&out)[2]) {
#ifdef CAPS_ON_HOST
  cuda_host::load_transposed(row, out);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(out[0]), "=r"(out[1])
               : "r"(unsigned(__cvta_generic_to_shared(row)))
               : "memory");
#endif
}

}  // namespace caps::gpu
