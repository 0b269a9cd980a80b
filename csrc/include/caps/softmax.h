// The softmax over higher capsules and its gradient, one lower capsule in each lane. Only for code compiled with
// CAPS_ISA.
#pragma once

#include <caps/exp.h>

namespace caps::CAPS_ISA {

// x[j][k] becomes its softmax over j, for each of `count` arrays one after the other.
template <typename T>
void softmax(T* x, int64_t J, bool leaky, int64_t count = 1) {
  using V = Vec<T>;
  for (const T* end = x + count * J * kLanes<T>; x < end; x += J * kLanes<T>) {
    V most = leaky ? V{} : load<V>(x);
    for (int64_t j = 0; j < J; ++j) most = max(load<V>(x + j * kLanes<T>), most);
    V total = leaky ? exp(-most) : V{};
    for (int64_t j = 0; j < J; ++j) {
      const V power = exp(load<V>(x + j * kLanes<T>) - most);
      store(x + j * kLanes<T>, power);
      total += power;
    }
    const V inverse = 1 / total;
    for (int64_t j = 0; j < J; ++j) store(x + j * kLanes<T>, load<V>(x + j * kLanes<T>) * inverse);
  }
}

// gc[j][k] becomes gb = c (gc - Σ_j c gc), for each of `count` arrays one after the other.
template <typename T>
void softmax_backward(const T* c, T* gc, int64_t J, int64_t count = 1) {
  using V = Vec<T>;
  for (const T* end = c + count * J * kLanes<T>; c < end; c += J * kLanes<T>, gc += J * kLanes<T>) {
    V mean{};
    for (int64_t j = 0; j < J; ++j) mean += load<V>(c + j * kLanes<T>) * load<V>(gc + j * kLanes<T>);
    for (int64_t j = 0; j < J; ++j) {
      store(gc + j * kLanes<T>, load<V>(c + j * kLanes<T>) * (load<V>(gc + j * kLanes<T>) - mean));
    }
  }
}

}  // namespace caps::CAPS_ISA
