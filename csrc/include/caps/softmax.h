// The softmax over higher capsules and its gradient, one lower capsule in each lane. Only for code compiled with
// CAPS_ISA.
#pragma once

#include <caps/exp.h>

namespace caps::CAPS_ISA {

// A few arrays [J] at a time, `n` of them one after the other: their sums wait for one another no longer than needed.
template <int n, typename T>
CAPS_INLINE void softmax_of(T* x, int64_t J, bool leaky) {
  using V = Vec<T>;
  constexpr int lanes = kLanes<T>;
  const int64_t row = J * lanes;
  V most[n], total[n], inverse[n];
  CAPS_UNROLL
  for (int k = 0; k < n; ++k) most[k] = leaky ? V{} : load<V>(x + k * row);
  for (int64_t j = 0; j < row; j += lanes) {
    CAPS_UNROLL
    for (int k = 0; k < n; ++k) most[k] = max(load<V>(x + k * row + j), most[k]);
  }
  CAPS_UNROLL
  for (int k = 0; k < n; ++k) total[k] = leaky ? exp(-most[k]) : V{};
  for (int64_t j = 0; j < row; j += lanes) {
    CAPS_UNROLL
    for (int k = 0; k < n; ++k) {
      const V power = exp(load<V>(x + k * row + j) - most[k]);
      store(x + k * row + j, power);
      total[k] += power;
    }
  }
  CAPS_UNROLL
  for (int k = 0; k < n; ++k) inverse[k] = 1 / total[k];
  for (int64_t j = 0; j < row; j += lanes) {
    CAPS_UNROLL
    for (int k = 0; k < n; ++k) store(x + k * row + j, load<V>(x + k * row + j) * inverse[k]);
  }
}

// x[j][k] becomes its softmax over j, for each of `count` arrays one after the other.
template <typename T>
void softmax(T* x, int64_t J, bool leaky, int64_t count = 1) {
  for (; count >= 2; count -= 2, x += 2 * J * kLanes<T>) softmax_of<2>(x, J, leaky);
  if (count > 0) softmax_of<1>(x, J, leaky);
}

template <int n, typename T>
CAPS_INLINE void softmax_backward_of(const T* c, T* gc, int64_t J) {
  using V = Vec<T>;
  constexpr int lanes = kLanes<T>;
  const int64_t row = J * lanes;
  V mean[n] = {};
  for (int64_t j = 0; j < row; j += lanes) {
    CAPS_UNROLL
    for (int k = 0; k < n; ++k) mean[k] += load<V>(c + k * row + j) * load<V>(gc + k * row + j);
  }
  for (int64_t j = 0; j < row; j += lanes) {
    CAPS_UNROLL
    for (int k = 0; k < n; ++k) {
      store(gc + k * row + j, load<V>(c + k * row + j) * (load<V>(gc + k * row + j) - mean[k]));
    }
  }
}

// gc[j][k] becomes gb = c (gc - Σ_j c gc), for each of `count` arrays one after the other.
template <typename T>
void softmax_backward(const T* c, T* gc, int64_t J, int64_t count = 1) {
  const int64_t step = 2 * J * kLanes<T>;
  for (; count >= 2; count -= 2, c += step, gc += step) softmax_backward_of<2>(c, gc, J);
  if (count > 0) softmax_backward_of<1>(c, gc, J);
}

}  // namespace caps::CAPS_ISA
