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
    const int64_t votes = kRouted * l.tile_size;
    for_chunks(l, l.route_scratch(false), begin, end,
               [&](auto pair, const Weights<T>& weights, int64_t i0, int64_t i1, int64_t tile, const Packed<T>& u,
                   T* sums, T* memory) {
                 constexpr int tiles = decltype(pair)::size;
                 if (args.t == 0) return route_uniformly<tiles>(u.u, u.step, weights, l.z, i0, i1, l.uniform(), sums);
                 if constexpr (kCanSpread<T>) {
                   for (int n = 0; args.spread && n < tiles; ++n) {
                     route_spread<false, T>(u.u + n * u.step, weights, l.z, i0, i1, l.V(0, tile + n), nullptr,
                                            sums + n * l.tile_size, memory,
                                            args.keep ? l.kept(0, tile + n, i0) : nullptr, nullptr);
                   }
                   if (args.spread) return;
                 }
                 for_routed(args, tiles, [&](auto block, int64_t n) __attribute__((always_inline)) {
                   const int64_t c_step = (args.keep ? l.I : kRouted / block.size) * l.row;
                   T* c = args.keep ? l.kept(0, tile + n, i0) : memory + votes;
                   route<false, decltype(block)::size, T>(u.u + n * u.step, u.step, weights, l.z, i0, i1,
                                                          l.V(0, tile + n), nullptr, sums + n * l.tile_size, memory,
                                                          args.keep, c, nullptr, c_step);
                 });
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
    const int64_t votes = kRouted * l.tile_size;
    for_chunks(l, l.route_scratch(true), begin, end,
               [&](auto pair, const Weights<T>& weights, int64_t i0, int64_t i1, int64_t tile0, const Packed<T>& u,
                   T* sums, T* memory) {
                 constexpr int tiles = decltype(pair)::size;
                 if constexpr (kCanSpread<T>) {
                   for (int n = 0; args.spread && n < tiles; ++n) {
                     const int64_t tile = tile0 + n;
                     route_spread<true, T>(u.u + n * u.step, weights, l.z, i0, i1, l.V(args.t - 1, tile),
                                           l.g(args.t, tile), args.last_only ? nullptr : sums + n * l.tile_size, memory,
                                           args.keep ? l.c(args.t, tile, i0) : nullptr,
                                           args.keep ? l.gb(args.t, tile, i0) : nullptr);
                   }
                   if (args.spread) return;
                 }
                 for_routed(args, tiles, [&](auto block, int64_t n) __attribute__((always_inline)) {
                   const int64_t tile = tile0 + n, c_step = (args.keep ? l.I : kRouted / block.size) * l.row;
                   T* c = args.keep ? l.c(args.t, tile, i0) : memory + votes;
                   T* gb = args.keep ? l.gb(args.t, tile, i0) : c + kRouted * l.row;
                   route<true, decltype(block)::size, T>(
                       u.u + n * u.step, u.step, weights, l.z, i0, i1, l.V(args.t - 1, tile), l.g(args.t, tile),
                       args.last_only ? nullptr : sums + n * l.tile_size, memory, args.keep, c, gb, c_step);
                 });
               });
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
