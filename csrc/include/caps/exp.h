// The exponential function of a vector, to about 1 ulp. Only for code compiled with CAPS_ISA.
#pragma once

#include <caps/simd.h>

namespace caps::CAPS_ISA {

// 2^n for an integer n held in the low bits of `shifted`, as a product of two powers so that subnormal results are met.
template <typename V>
CAPS_INLINE V times_power_of_two(V x, IntsOf<V> n) {
  constexpr int bits = sizeof(Element<V>) == 8 ? 52 : 23;
  constexpr int bias = sizeof(Element<V>) == 8 ? 1023 : 127;
  const IntsOf<V> half = n >> 1;
  return x * bit_cast<V>((half + bias) << bits) * bit_cast<V>((n - half + bias) << bits);
}

// e^x: 0 below the smallest subnormal number, inf above the largest, NaN for NaN. With n = round(x / ln 2) and
// r = x - n ln 2, it is 2^n times a polynomial interpolating e^r at Chebyshev's nodes of |r| ≤ ln 2 / 2.
CAPS_INLINE Vec<float> exp(Vec<float> x) {
  using V = Vec<float>;
  x = x < -104.0f ? splat<V>(-104.0f) : x;
  x = x > 89.0f ? splat<V>(89.0f) : x;
  // Adding 1.5 · 2^23 rounds to an integer and leaves it in the low bits.
  const V shifted = x * 0x1.715476p+0f + 0x1.8p23f;
  const V n = shifted - 0x1.8p23f;
  const V r = (x - n * 0x1.62ep-1f) - n * 0x1.0bfbe8p-15f;
  V p = r * 0x1.6d110ap-10f + 0x1.120b6ep-7f;
  p = p * r + 0x1.55551ap-5f;
  p = p * r + 0x1.5554dcp-3f;
  p = p * r + 0.5f;
  p = (p * r) * r + r + 1.0f;
  return times_power_of_two(p, bit_cast<IntsOf<V>>(shifted) - bit_cast<int32_t>(0x1.8p23f));
}

CAPS_INLINE Vec<double> exp(Vec<double> x) {
  using V = Vec<double>;
  x = x < -746.0 ? splat<V>(-746.0) : x;
  x = x > 710.0 ? splat<V>(710.0) : x;
  const V shifted = x * 0x1.71547652b82fep+0 + 0x1.8p52;
  const V n = shifted - 0x1.8p52;
  const V r = (x - n * 0x1.62e42fefa0000p-1) - n * 0x1.cf79abc9e3b3ap-40;
  V p = r * 0x1.af38a9b0ec855p-26 + 0x1.289185613a3d6p-22;
  p = p * r + 0x1.71de0dae63bb3p-19;
  p = p * r + 0x1.a019b90d2ae7ap-16;
  p = p * r + 0x1.a01a01a7c41d5p-13;
  p = p * r + 0x1.6c16c1788bd90p-10;
  p = p * r + 0x1.11111111109b3p-7;
  p = p * r + 0x1.5555555553d63p-5;
  p = p * r + 0x1.5555555555556p-3;
  p = p * r + 0.5;
  p = (p * r) * r + r + 1.0;
  return times_power_of_two(p, bit_cast<IntsOf<V>>(shifted) - bit_cast<int64_t>(0x1.8p52));
}

}  // namespace caps::CAPS_ISA
