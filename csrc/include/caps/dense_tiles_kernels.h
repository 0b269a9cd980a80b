// The kernels of dense_capsules over tiles.
// Only for code compiled with CAPS_ISA.
#pragma once

#include <caps/dense_tiles.h>

namespace caps::CAPS_ISA {

void tiles_pack(const DenseArgs& args, int64_t begin, int64_t end) {
  with_accumulation_type(args.dtype, [&]<typename T>() {
    const Layout<T> l(args);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t tile = task / args.chunks, i = task % args.chunks * args.chunk;
      pack(args.dtype, args.u, tile, i, min_of(args.chunk, l.I - i), l.u(tile, i));
    }
  });
}

void tiles_route(const DenseArgs& args, int64_t begin, int64_t end) {
  with_accumulation_type(args.dtype, [&]<typename T>() {
    const Layout<T> l(args);
    for_chunks(l, l.route_scratch(false), begin, end,
               [&](auto pair, const Weights<T>& weights, int64_t i0, int64_t i1, int64_t tile, const Packed<T>& u,
                   T* sums, T* memory) {
                 constexpr int tiles = decltype(pair)::size;
                 if (args.t == 0) route_uniformly<tiles>(u.u, u.step, weights, l.z, i0, i1, l.uniform(), sums);
                 else route_chunk<false, tiles>(l, weights, i0, i1, tile, u, sums, memory);
               });
  });
}

void tiles_finish_iteration(const DenseArgs& args, int64_t begin, int64_t end) {
  with_accumulation_type(args.dtype, [&]<typename T>() {
    const Layout<T> l(args);
    for (int64_t task = begin; task < end; ++task) finish_iteration(l, task / l.J, task % l.J);
  });
}

void tiles_coupling(const DenseArgs& args, int64_t begin, int64_t end) {
  with_accumulation_type(args.dtype, [&]<typename T>() {
    const Layout<T> l(args);
    for (int64_t tile = begin; tile < end; ++tile) {
      if (args.iterations == 1) {
        T* c = l.kept(0, tile, 0);
        for (int64_t n = 0; n < l.I * l.row; ++n) c[n] = l.uniform();
      }
      unpack(args.dtype, args.coupling, tile, 0, l.I, l.kept(0, tile, 0));
    }
  });
}

void tiles_start_backward(const DenseArgs& args, int64_t begin, int64_t end) {
  with_accumulation_type(args.dtype, [&]<typename T>() {
    const Layout<T> l(args);
    for (int64_t tile = begin; tile < end; ++tile) start_backward(l, tile);
  });
}

void tiles_route_backward(const DenseArgs& args, int64_t begin, int64_t end) {
  with_accumulation_type(args.dtype, [&]<typename T>() {
    const Layout<T> l(args);
    for_chunks(
        l, l.route_scratch(true), begin, end,
        [&](auto pair, const Weights<T>& weights, int64_t i0, int64_t i1, int64_t tile, const Packed<T>& u, T* sums,
            T* memory) { route_chunk<true, decltype(pair)::size>(l, weights, i0, i1, tile, u, sums, memory); });
  });
}

void tiles_finish_backward(const DenseArgs& args, int64_t begin, int64_t end) {
  with_accumulation_type(args.dtype, [&]<typename T>() {
    const Layout<T> l(args);
    for (int64_t task = begin; task < end; ++task) finish_backward(l, task / l.J, task % l.J);
  });
}

void tiles_basis(const DenseArgs& args, int64_t begin, int64_t end) {
  with_accumulation_type(args.dtype, [&]<typename T>() {
    const Layout<T> l(args);
    for (int64_t task = begin; task < end; ++task) gather_basis(l, task / l.J, task % l.J);
  });
}

void tiles_gradients(const DenseArgs& args, int64_t begin, int64_t end) {
  with_accumulation_type(args.dtype, [&]<typename T>() {
    const Layout<T> l(args);
    Gradients<T> gradients(l);
    for (int64_t task = begin; task < end; ++task) gradients.run(task);
    finish_streaming();
  });
}

void tiles_weight_parts(const DenseArgs& args, int64_t begin, int64_t end) {
  with_accumulation_type(args.dtype, [&]<typename T>() {
    const Layout<T> l(args);
    const int64_t size = l.J * l.D * l.E;
    for (int64_t type = begin; type < end; ++type) {
      T* sums = static_cast<T*>(args.weight_parts) + type * args.parts * size;
      for (int64_t part = 1; part < args.parts; ++part) {
        for (int64_t n = 0; n < size; ++n) sums[n] += sums[part * size + n];
      }
      Gradients<T>::write_weight(l, type, sums);
    }
  });
}

void tiles_bias_gradient(const DenseArgs& args, int64_t, int64_t) {
  with_accumulation_type(args.dtype, [&]<typename T>() {
    const Layout<T> l(args);
    for (int64_t n = 0; n < l.J * l.E; ++n) {
      Vec<T> sum{};
      for (int64_t t = args.last_only ? args.iterations - 1 : 0; t < args.iterations; ++t) {
        for (int64_t tile = 0; tile < args.tiles; ++tile) sum += load<Vec<T>>(l.g(t, tile) + n * kLanes<T>);
      }
      dispatch_floating(args.dtype, [&]<typename scalar_t>() {
        if constexpr (std::is_same_v<Acc<scalar_t>, T>) {
          store_one(static_cast<scalar_t*>(args.grad_bias.data) + n, T(reduce_add(sum)));
        }
      });
    }
  });
}

}  // namespace caps::CAPS_ISA
