// squash and its gradient for vectors of any scale. Only for code compiled with CAPS_ISA.
//
// With r = |s|:  v = s · r / (1 + r²)   and   grad_s = across · g + along · (s · g) · s,   where
// across = r / (1 + r²) and along = across · (1 - r²) / (1 + r²) / r².
// These hold as they stand while r² is far from overflow and underflow (`plain_scale`), and so the loops over whole
// vectors use them; `squash_any` and `squash_any_backward` do one vector of whatever scale.
#pragma once

#include <caps/across_lanes.h>

namespace caps::CAPS_ISA {

// Whether s · factor(|s|²), and the same of the gradient, neither overflow nor lose digits. V: number or vector.
template <typename V>
CAPS_INLINE auto plain_scale(V square) {
  return (square > 0x1p-40f) & (square < 0x1p40f);
}

// The factor with v = factor · s.
template <typename V>
CAPS_INLINE V squash_factor(V square) {
  return sqrt(square) / (1 + square);
}

// The two factors of the gradient.
template <typename V>
struct SquashGradient {
  V across, along;
};

template <typename V>
CAPS_INLINE SquashGradient<V> squash_gradient(V square) {
  const V root = sqrt(square), inverse = 1 / (1 + square);
  const V across = root * inverse;
  return {across, across * inverse * (1 - square) / square};
}

// A vector in polar form: s = direction · r with direction = s / scale / norm, and q = min(r, 1 / r).
template <typename T>
struct Polar {
  T scale, norm, q;
  bool inside;
};

// Lengths are taken of s / max|s_e|, between 1 and √E, so that no square leaves the range of T.
template <typename scalar_t, typename T = Acc<scalar_t>>
inline Polar<T> polar_form(const scalar_t* s, int64_t stride, int64_t size) {
  T scale = 0;
  for (int64_t e = 0; e < size; ++e) {
    const T x = load_one(s + e * stride);
    const T magnitude = x < 0 ? -x : x;
    scale = magnitude <= scale ? scale : magnitude;  // so that NaN gets in …
    if (scale != scale) break;                       // … and stays
  }
  scale = scale == 0 ? 1 : scale;
  T square = 0;
  for (int64_t e = 0; e < size; ++e) {
    const T x = load_one(s + e * stride) / scale;
    square += x * x;
  }
  const T norm = square == 0 ? T(1) : sqrt(square);
  const T length = square == 0 ? T(0) : scale * norm;
  const bool inside = length <= 1;
  return {scale, norm, inside ? length : 1 / length, inside};
}

// v from s, both of `size` numbers `stride` apart, at any scale.
template <typename scalar_t, typename out_t>
inline void squash_any(const scalar_t* s, int64_t stride, out_t* v, int64_t v_stride, int64_t size) {
  using T = Acc<scalar_t>;
  const Polar<T> p = polar_form(s, stride, size);
  const T q2 = p.q * p.q;
  const T length = (p.inside ? q2 : T(1)) / (1 + q2);
  for (int64_t e = 0; e < size; ++e) {
    store_one(v + e * v_stride, load_one(s + e * stride) / p.scale / p.norm * length);
  }
}

// grad_s from grad_v and s, at any scale.
template <typename grad_t, typename scalar_t, typename out_t>
inline void squash_any_backward(const grad_t* grad_v, int64_t grad_stride, const scalar_t* s, int64_t stride,
                                out_t* grad_s, int64_t out_stride, int64_t size) {
  using T = Acc<scalar_t>;
  const Polar<T> p = polar_form(s, stride, size);
  const T across = p.q / (1 + p.q * p.q);
  const T along = across * (1 - p.q * p.q) / (1 + p.q * p.q) * (p.inside ? 1 : -1);
  T radial = 0;
  for (int64_t e = 0; e < size; ++e) {
    radial += load_one(s + e * stride) / p.scale / p.norm * load_one(grad_v + e * grad_stride);
  }
  for (int64_t e = 0; e < size; ++e) {
    const T direction = load_one(s + e * stride) / p.scale / p.norm;
    store_one(grad_s + e * out_stride, across * load_one(grad_v + e * grad_stride) + along * radial * direction);
  }
}

// The same for consecutive numbers, `size` being a multiple of 16 bytes.
template <typename T>
inline void squash_row(const T* s, T* v, int64_t size) {
  using V = Vec<T, 16 / sizeof(T)>;
  V squares{};
  for (int64_t e = 0; e < size; e += kLanesOf<V>) {
    const V x = load<V>(s + e);
    squares += x * x;
  }
  const T square = reduce_add(squares);
  if (!plain_scale(square)) return squash_any(s, 1, v, 1, size);
  const T factor = squash_factor(square);
  for (int64_t e = 0; e < size; ++e) v[e] = s[e] * factor;
}

template <typename T>
inline void squash_row_backward(const T* grad_v, const T* s, T* grad_s, int64_t size) {
  using V = Vec<T, 16 / sizeof(T)>;
  V squares{}, dots{};
  for (int64_t e = 0; e < size; e += kLanesOf<V>) {
    const V x = load<V>(s + e);
    squares += x * x;
    dots += x * load<V>(grad_v + e);
  }
  const T square = reduce_add(squares);
  if (!plain_scale(square)) return squash_any_backward(grad_v, 1, s, 1, grad_s, 1, size);
  const auto [across, along] = squash_gradient(square);
  const T along_dot = along * reduce_add(dots);
  for (int64_t e = 0; e < size; ++e) grad_s[e] = across * grad_v[e] + along_dot * s[e];
}

}  // namespace caps::CAPS_ISA
