// How a kernel of dense_capsules over rows or quads begins.
// Only for code compiled with CAPS_ISA.
#pragma once

#include <caps/dense.h>
#include <caps/tile.h>

namespace caps::CAPS_ISA {
namespace {

// Runs body(layout, weights, memory) for rows or quads, with `memory_size(layout)` numbers of scratch.
template <template <typename> class Form, typename S, typename F>
CAPS_INLINE void with_form(const DenseArgs& args, const S& memory_size, const F& body) {
  with_accumulation_type(args.dtype, [&]<typename T>() {
    const Form<T> l(args);
    Weights<T> weights(args.dtype, args.weight, args.positions);
    const int64_t size = (memory_size(l) + 15) / 16 * 16;
    T* memory = static_cast<T*>(scratch(Scratch::chunk, (size + weights.copy_size(args.chunk)) * int64_t(sizeof(T))));
    weights.use_memory(memory + size);
    body(l, weights, memory);
  });
}

}  // namespace
}  // namespace caps::CAPS_ISA
