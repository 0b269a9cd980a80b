// The exponential function of a vector, to about 1 ulp. Only for code compiled with CAPS_ISA.
#pragma once

#include <caps/simd.h>

namespace caps::CAPS_ISA {

// x · 2^n for a whole number n, whose distance from the `rounding` added to it lies in the low bits of `shifted`.
// Without an instruction for it, as a product of two powers so that subnormal results are met.
template <typename V>
CAPS_INLINE V times_power_of_two(V x, [[maybe_unused]] V n, [[maybe_unused]] V shifted,
                                 [[maybe_unused]] Element<V> rounding) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, Vec<float>>) return V(_mm512_scalef_ps(__m512(x), __m512(n)));
  if constexpr (std::is_same_v<V, Vec<double>>) return V(_mm512_scalef_pd(__m512d(x), __m512d(n)));
#endif
  using I = IntsOf<V>;
  const I whole = bit_cast<I>(shifted) - bit_cast<Element<I>>(rounding);
  constexpr int bits = sizeof(Element<V>) == 8 ? 52 : 23;
  constexpr int bias = sizeof(Element<V>) == 8 ? 1023 : 127;
  const I half = whole >> 1;
  return x * bit_cast<V>((half + bias) << bits) * bit_cast<V>((whole - half + bias) << bits);
}

// e^x: 0 below the smallest subnormal number, inf above the largest, NaN for NaN. With n = round(x / ln 2) and
// r = x - n ln 2, it is 2^n times a polynomial interpolating e^r at Chebyshev's nodes of |r| ≤ ln 2 / 2.
CAPS_INLINE Vec<float> exp(Vec<float> x) {
  using V = Vec<float>;
  x = max(splat<V>(-104.0f), x);
  x = min(splat<V>(89.0f), x);
  // Adding 1.5 · 2^23 rounds to an integer and leaves it in the low bits.
  const V shifted = x * 0x1.715476p+0f + 0x1.8p23f;
  const V n = shifted - 0x1.8p23f;
  const V r = (x - n * 0x1.62ep-1f) - n * 0x1.0bfbe8p-15f;
  V p = r * 0x1.6d110ap-10f + 0x1.120b6ep-7f;
  p = p * r + 0x1.55551ap-5f;
  p = p * r + 0x1.5554dcp-3f;
  p = p * r + 0.5f;
  p = (p * r) * r + r + 1.0f;
  return times_power_of_two(p, n, shifted, 0x1.8p23f);
}

CAPS_INLINE Vec<double> exp(Vec<double> x) {
  using V = Vec<double>;
  x = max(splat<V>(-746.0), x);
  x = min(splat<V>(710.0), x);
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
  return times_power_of_two(p, n, shifted, 0x1.8p52);
}

}  // namespace caps::CAPS_ISA
