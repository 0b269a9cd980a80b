// squash and its gradient for vectors of any scale, spread over lanes or not.
//
// Squares are taken of s · scale, where scale is the power of 2 that brings max|s_e| to [1, 2) (less where s is
// subnormal): it rounds nothing, and no square overflows, nor all of them underflow. With r = |s| and q = min(r, 1/r):
//   v      = factor · (s scale)                                        factor = |v| / |s scale|
//   grad_s = across · g + along · ((s scale) · g) · (s scale)          across = q / (1 + q²)
#pragma once

#include <caps/gpu.h>

namespace caps::gpu {

// 2^-e for 2^e ≤ largest < 2^(e+1), as far as that is a normal number; NaN for inf and NaN.
CAPS_DEVICE float squash_scale(float largest) {
  const uint32_t exponent = __float_as_uint(largest) >> 23 & 255;
  if (exponent == 255) return __uint_as_float(0x7fc00000u);
  return __uint_as_float((exponent == 0 ? 253u : exponent > 253 ? 1u : 254u - exponent) << 23);
}

CAPS_DEVICE double squash_scale(double largest) {
  const uint64_t exponent = uint64_t(__double_as_longlong(largest)) >> 52 & 2047;
  if (exponent == 2047) return __longlong_as_double(0x7ff8000000000000ll);
  return __longlong_as_double((long long)(exponent == 0 ? 2045u : exponent > 2045 ? 1u : 2046u - exponent) << 52);
}

template <typename T>
struct SquashFactors {
  T factor, across, along;
};

// square: |s scale|²
template <typename T>
CAPS_DEVICE SquashFactors<T> squash_factors(T square, T scale) {
  if (square == 0) return {0, 0, 0};
  const T norm = sqrt(square), length = norm / scale;
  const bool inside = length <= 1;
  const T q = inside ? length : scale / norm, q2 = q * q, inverse = 1 / (1 + q2);
  const T across = q * inverse, along = across * (1 - q2) * inverse / square;
  return {(inside ? q2 : T(1)) * inverse / norm, across, inside ? along : -along};
}

// The factors of a vector whose numbers are spread over groups of `width` lanes. All lanes of the warp take part.
//   s(e): number e in the type of sums;   first, step: the numbers of this lane
template <typename T, typename F>
CAPS_DEVICE SquashFactors<T> squash_of_lanes(const F& s, int64_t first, int64_t step, int64_t size, int width, T& scale) {
  T largest = 0;
  for (int64_t e = first; e < size; e += step) largest = larger(T(s(e) < 0 ? -s(e) : s(e)), largest);
  scale = squash_scale(group_max(largest, width));
  T square = 0;
  for (int64_t e = first; e < size; e += step) square += s(e) * scale * (s(e) * scale);
  return squash_factors(group_sum(square, width), scale);
}

}  // namespace caps::gpu
