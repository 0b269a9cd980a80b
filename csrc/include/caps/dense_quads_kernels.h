// The kernels of dense_capsules over groups of quad tiles.
// Only for code compiled with CAPS_ISA.
#pragma once

#include <caps/dense_form.h>
#include <caps/dense_quads.h>

namespace caps::CAPS_ISA {
namespace {

template <typename F>
CAPS_INLINE void with_quads(const DenseArgs& args, const F& body) {
  with_form<Quads>(args, [](const auto& l) { return scratch_size(l); }, body);
}

// Runs body(quads, weights, task, memory) for some tasks of a pass.
template <typename F>
CAPS_INLINE void for_quad_tasks(const DenseArgs& args, int64_t begin, int64_t end, const F& body) {
  with_quads(args, [&](const auto& l, auto& weights, auto* memory) {
    for (int64_t task = begin; task < end; ++task) body(l, weights, QuadTask(l, task), memory);
  });
}

}  // namespace

void quads_predict(const DenseArgs& args, int64_t begin, int64_t end) {
  for_quad_tasks(args, begin, end, [](const auto& l, auto& weights, const QuadTask& task, auto* memory) {
    predict_task<false>(l, weights, task, memory);
  });
}

void quads_predict_backward(const DenseArgs& args, int64_t begin, int64_t end) {
  for_quad_tasks(args, begin, end, [](const auto& l, auto& weights, const QuadTask& task, auto* memory) {
    predict_task<true>(l, weights, task, memory);
  });
}

void quads_route(const DenseArgs& args, int64_t begin, int64_t end) {
  for_quad_tasks(args, begin, end,
                 [](const auto& l, auto&, const QuadTask& task, auto* memory) { route_task<false>(l, task, memory); });
}

void quads_finish_iteration(const DenseArgs& args, int64_t begin, int64_t end) {
  with_quads(args, [&](const auto& l, auto&, auto* memory) {
    for (int64_t n = begin; n < end; ++n) finish_iteration(l, n, memory);
  });
}

void quads_coupling(const DenseArgs& args, int64_t begin, int64_t end) {
  with_quads(args, [&]<typename T>(const Quads<T>& l, auto&, T*) {
    dispatch_floating(args.dtype, [&]<typename scalar_t>() {
      if constexpr (std::is_same_v<Acc<scalar_t>, T>) {
        for (int64_t tile = begin; tile < end; ++tile) {
          auto* out = static_cast<scalar_t*>(args.coupling.data) + tile * l.samples * l.I * l.J;
          for (int64_t sample = 0; sample < l.count(tile); ++sample) {
            for (int64_t i = 0; i < l.I; ++i) {
              const T* c = l.kept(0, tile, i) + sample * l.quad + i % l.quad;
              for (int64_t j = 0; j < l.J; ++j) {
                store_one(out++, args.iterations == 1 ? l.uniform() : c[j * l.lanes]);
              }
            }
          }
        }
      }
    });
  });
}

void quads_start_backward(const DenseArgs& args, int64_t begin, int64_t end) {
  with_quads(args, [&](const auto& l, auto&, auto* memory) {
    for (int64_t tile = begin; tile < end; ++tile) start_backward(l, tile, memory);
  });
}

void quads_route_backward(const DenseArgs& args, int64_t begin, int64_t end) {
  for_quad_tasks(args, begin, end,
                 [](const auto& l, auto&, const QuadTask& task, auto* memory) { route_task<true>(l, task, memory); });
}

void quads_finish_backward(const DenseArgs& args, int64_t begin, int64_t end) {
  with_quads(args, [&](const auto& l, auto&, auto* memory) {
    for (int64_t n = begin; n < end; ++n) finish_backward(l, n, memory);
  });
}

void quads_to_tiles(const DenseArgs& args, int64_t begin, int64_t end) {
  with_accumulation_type(args.dtype, [&]<typename T>() {
    const Quads<T> l(args);
    const int64_t size = l.J * l.E * l.lanes;
    for (int64_t tile = begin; tile < end; ++tile) {
      for (int64_t t = 0; t < args.iterations; ++t) {
        const int64_t to = (t * args.tiles + tile) * size;
        tile_from_quads(l, tile, l.V(t, 0), static_cast<T*>(args.V_in_tiles) + to);
        tile_from_quads(l, tile, l.g(t, 0), static_cast<T*>(args.g_in_tiles) + to);
      }
    }
  });
}

}  // namespace caps::CAPS_ISA
