// dense_capsules: votes and dynamic routing in one, forward and backward. caps_kernels/ops/dense_capsules has the
// mathematics. Three regimes:
//
// Rows (caps/dense_rows.h), for few samples: lanes lie along E, and û is computed once and kept, up to kVotesBudget.
//
// Quads (caps/dense_quads.h), where û of a few samples stays in cache: lanes hold four numbers of E of each of a few
// samples. One group of samples after the other goes through all iterations, with û computed once and kept. In backward
// the groups leave the coefficients c and gb, and the last pass is that of tiles.
//
// Tiles (caps/dense_tiles.h): samples lie in the SIMD lanes; û and its gradient exist for a few lower capsules and one
// tile of samples at a time. Forward: the samples of u are packed into tiles; an iteration is a pass over chunks of
// lower capsules for each tile, whose partial sums are then added in the order of the chunks. Backward: the same passes
// for t = R … 2, which keep the coefficients c and gb (or not, beyond kKeptBudget: then they are computed
// again), and one last pass that forms gû = Σ_t c^t g^t + gb^t V^{t-1} from them and contracts it at once into grad_u
// and grad_weight.
#include <caps/dense.h>

namespace caps {

// Behind each kernel, what its chunks are.
CAPS_KERNEL(tiles_pack, DenseArgs)              // tiles · chunks
CAPS_KERNEL(tiles_route, DenseArgs)             // chunks · pairs of tiles
CAPS_KERNEL(tiles_finish_iteration, DenseArgs)  // tiles · J
CAPS_KERNEL(tiles_coupling, DenseArgs)          // tiles
CAPS_KERNEL(tiles_start_backward, DenseArgs)    // tiles
CAPS_KERNEL(tiles_route_backward, DenseArgs)    // chunks · pairs of tiles
CAPS_KERNEL(tiles_finish_backward, DenseArgs)   // tiles · J
CAPS_KERNEL(tiles_gradients, DenseArgs)         // tasks of types and parts
CAPS_KERNEL(tiles_weight_parts, DenseArgs)      // types
CAPS_KERNEL(tiles_bias_gradient, DenseArgs)     // 1
CAPS_KERNEL(quads_predict, DenseArgs)           // chunks · pairs of quad tiles of the group
CAPS_KERNEL(quads_predict_backward, DenseArgs)  // chunks · pairs of quad tiles of the group
CAPS_KERNEL(quads_route, DenseArgs)             // chunks · pairs of quad tiles of the group
CAPS_KERNEL(quads_finish_iteration, DenseArgs)  // quad tiles of the group
CAPS_KERNEL(quads_coupling, DenseArgs)          // quad tiles
CAPS_KERNEL(quads_start_backward, DenseArgs)    // quad tiles
CAPS_KERNEL(quads_route_backward, DenseArgs)    // chunks · pairs of quad tiles of the group
CAPS_KERNEL(quads_finish_backward, DenseArgs)   // quad tiles of the group
CAPS_KERNEL(quads_to_tiles, DenseArgs)          // tiles
CAPS_KERNEL(rows_pack, DenseArgs)               // samples
CAPS_KERNEL(rows_predict, DenseArgs)            // chunks
CAPS_KERNEL(rows_predict_backward, DenseArgs)   // chunks
CAPS_KERNEL(rows_route, DenseArgs)              // chunks · samples
CAPS_KERNEL(rows_finish_iteration, DenseArgs)   // samples
CAPS_KERNEL(rows_coupling, DenseArgs)           // samples
CAPS_KERNEL(rows_start_backward, DenseArgs)     // samples
CAPS_KERNEL(rows_route_backward, DenseArgs)     // chunks · samples
CAPS_KERNEL(rows_finish_backward, DenseArgs)    // samples
CAPS_KERNEL(rows_gradients, DenseArgs)          // chunks
CAPS_KERNEL(rows_bias_gradient, DenseArgs)      // 1

}  // namespace caps

#ifdef CAPS_ISA

#include <caps/dense_quads.h>
#include <caps/dense_rows.h>
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
    for_chunks(l, votes + kRouted * l.row, begin, end,
               [&](auto pair, const Weights<T>& weights, int64_t i0, int64_t i1, int64_t tile, const Packed<T>& u,
                   T* sums, T* memory) {
                 constexpr int tiles = decltype(pair)::size;
                 if (args.t == 0) return route_uniformly<tiles>(u.u, u.step, weights, l.z, i0, i1, l.uniform(), sums);
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
    for_chunks(l, votes + 2 * kRouted * l.row, begin, end,
               [&](auto pair, const Weights<T>& weights, int64_t i0, int64_t i1, int64_t tile0, const Packed<T>& u,
                   T* sums, T* memory) {
                 for_routed(args, decltype(pair)::size, [&](auto block, int64_t n) __attribute__((always_inline)) {
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

// Runs body(layout, weights, memory) for rows or quads, with `memory_size(layout)` numbers of scratch.
template <template <typename> class Form, typename S, typename F>
static CAPS_INLINE void with_form(const DenseArgs& args, const S& memory_size, const F& body) {
  with_accumulation_type(args.dtype, [&]<typename T>() {
    const Form<T> l(args);
    Weights<T> weights(args.dtype, args.weight, args.positions);
    const int64_t size = (memory_size(l) + 15) / 16 * 16;
    T* memory = static_cast<T*>(scratch(Scratch::chunk, (size + weights.copy_size(args.chunk)) * int64_t(sizeof(T))));
    weights.use_memory(memory + size);
    body(l, weights, memory);
  });
}

template <typename S, typename F>
static CAPS_INLINE void with_rows(const DenseArgs& args, const S& memory_size, const F& body) {
  with_form<Rows>(args, memory_size, body);
}

template <typename F>
static CAPS_INLINE void with_quads(const DenseArgs& args, const F& body) {
  with_form<Quads>(args, [](const auto& l) { return scratch_size(l); }, body);
}

// Runs body(quads, weights, task, memory) for some tasks of a pass.
template <typename F>
static CAPS_INLINE void for_quad_tasks(const DenseArgs& args, int64_t begin, int64_t end, const F& body) {
  with_quads(args, [&](const auto& l, auto& weights, auto* memory) {
    for (int64_t task = begin; task < end; ++task) body(l, weights, QuadTask(l, task), memory);
  });
}

static constexpr auto no_memory = [](const auto&) { return int64_t{0}; };

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

void rows_pack(const DenseArgs& args, int64_t begin, int64_t end) {
  with_rows(args, no_memory, [&]<typename T>(const Rows<T>& l, const auto&, T*) {
    dispatch_floating(args.dtype, [&]<typename scalar_t>() {
      if constexpr (std::is_same_v<Acc<scalar_t>, T>) {
        const auto* u = static_cast<const scalar_t*>(args.u.data);
        for (int64_t n = begin * l.I; n < end * l.I; ++n) {
          widen_row(u + n / l.I * args.u.stride[0] + n % l.I * args.u.stride[1], args.u.stride[2], l.D, l.u(0, n));
        }
      }
    });
  });
}

void rows_predict(const DenseArgs& args, int64_t begin, int64_t end) {
  with_rows(args, no_memory, [&](const auto& l, auto& weights, auto*) {
    for (int64_t chunk = begin; chunk < end; ++chunk) predict_chunk(l, weights, chunk, true);
  });
}

// û, and while it is at hand the pass of the last iteration, for which all is known.
void rows_predict_backward(const DenseArgs& args, int64_t begin, int64_t end) {
  with_rows(args, no_memory, [&](const auto& l, auto& weights, auto*) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      if (args.iterations == 1) continue;
      predict_chunk(l, weights, chunk, false);
      for (int64_t b = 0; b < l.B; ++b) route_chunk_backward(l, chunk, b, args.iterations - 1);
    }
  });
}

void rows_route(const DenseArgs& args, int64_t begin, int64_t end) {
  with_rows(
      args, [](const auto& l) { return l.row; },
      [&](const auto& l, auto&, auto* memory) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t chunk = task / l.B, b = task % l.B, i = chunk * args.chunk;
          auto* sums = l.partial(chunk, b);
          for (int64_t n = 0; n < l.size; ++n) sums[n] = 0;
          auto* c = args.keep ? l.kept(0, b, i) : memory;
          route_rows<false>(l.votes(b, i), blocks_of(l, chunk), l.z, l.V(0, b), memory, sums, args.keep, c, memory);
        }
      });
}

void rows_finish_iteration(const DenseArgs& args, int64_t begin, int64_t end) {
  with_rows(args, no_memory, [&](const auto& l, auto&, auto*) {
    for (int64_t b = begin; b < end; ++b) finish_iteration(l, b);
  });
}

void rows_coupling(const DenseArgs& args, int64_t begin, int64_t end) {
  with_rows(args, no_memory, [&]<typename T>(const Rows<T>& l, auto&, T*) {
    dispatch_floating(args.dtype, [&]<typename scalar_t>() {
      if constexpr (std::is_same_v<Acc<scalar_t>, T>) {
        auto* out = static_cast<scalar_t*>(args.coupling.data) + begin * l.I * l.J;
        for (int64_t b = begin; b < end; ++b) {
          for (int64_t i = 0; i < l.I; ++i) {
            for (int64_t j = 0; j < l.J; ++j) {
              store_one(out++, args.iterations == 1 ? l.uniform() : l.kept(0, b, i)[j * l.lanes + i % l.lanes]);
            }
          }
        }
      }
    });
  });
}

void rows_start_backward(const DenseArgs& args, int64_t begin, int64_t end) {
  with_rows(args, no_memory, [&](const auto& l, auto&, auto*) {
    for (int64_t b = begin; b < end; ++b) start_backward(l, b);
  });
}

void rows_route_backward(const DenseArgs& args, int64_t begin, int64_t end) {
  with_rows(args, no_memory, [&](const auto& l, auto&, auto*) {
    for (int64_t task = begin; task < end; ++task) route_chunk_backward(l, task / l.B, task % l.B, args.t);
  });
}

void rows_finish_backward(const DenseArgs& args, int64_t begin, int64_t end) {
  with_rows(args, no_memory, [&](const auto& l, auto&, auto*) {
    for (int64_t b = begin; b < end; ++b) finish_backward(l, b);
  });
}

void rows_gradients(const DenseArgs& args, int64_t begin, int64_t end) {
  const auto aligned = [](int64_t size) { return (size + 15) / 16 * 16; };
  const auto matrices = [&](const auto& l) { return aligned(l.J * l.D * l.E); };
  const auto memory_size = [&](const auto& l) { return matrices(l) + aligned(l.B * l.D) + 4 * l.size; };
  with_rows(args, memory_size, [&](const auto& l, auto& weights, auto* memory) {
    auto* grad_u = memory + matrices(l);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      chunk_gradients(l, weights, chunk, memory, grad_u, grad_u + aligned(l.B * l.D));
    }
    finish_streaming();
  });
}

void rows_bias_gradient(const DenseArgs& args, int64_t, int64_t) {
  with_rows(args, no_memory, [&]<typename T>(const Rows<T>& l, auto&, T*) {
    dispatch_floating(args.dtype, [&]<typename scalar_t>() {
      if constexpr (std::is_same_v<Acc<scalar_t>, T>) {
        for (int64_t n = 0; n < l.J * l.E; ++n) {
          T sum = 0;
          for (int64_t t = args.last_only ? args.iterations - 1 : 0; t < args.iterations; ++t) {
            for (int64_t b = 0; b < l.B; ++b) sum += l.g(t, b)[n / l.E * l.width + n % l.E];
          }
          store_one(static_cast<scalar_t*>(args.grad_bias.data) + n, sum);
        }
      }
    });
  });
}

}  // namespace caps::CAPS_ISA

#else

#include <caps/dense_plan.h>

namespace caps {
namespace {

// Hands out parts of one piece of scratch: first asked for with no memory, to learn the size.
struct Shelf {
  char* memory = nullptr;
  int64_t used = 0;
  void* take(int64_t bytes) {
    void* at = memory ? memory + used : nullptr;
    used += ceil_div(bytes, 64) * 64;
    return at;
  }
};

template <typename F>
void with_scratch(const F& place) {
  Shelf shelf;
  place(shelf);
  shelf = {static_cast<char*>(scratch(Scratch::call, shelf.used + 64)), 0};
  place(shelf);
}

DenseArgs common_args(const Tensor& u, const Tensor& weight, const std::optional<Tensor>& bias, int64_t positions,
                      int64_t iterations, bool leaky, bool last_only) {
  DenseArgs a{};
  a.dtype = dtype_of(u);
  a.u = view_of<3>(u);
  a.weight = view_of<4>(weight);
  if (bias) a.bias = view_of<2>(*bias);
  a.positions = positions;
  a.iterations = iterations;
  a.leaky = leaky;
  a.last_only = last_only;
  return a;
}

// How a call would run, for whoever asks: the regimes of forward and of backward, and whether the latter computes the
// coefficients again, each a digit.
int64_t dense_capsules_regime(Tensor u, Tensor weight, int64_t positions, int64_t iterations) {
  DenseArgs a = common_args(u, weight, {}, positions, iterations, false, false);
  if (u.size(0) == 0) return 220;
  const int64_t forward = int64_t(plan(a, false).regime);
  const Plan p = plan(a, true);
  return 100 * forward + 10 * int64_t(p.regime) + (keeps_coefficients(a, p) ? 0 : 1);
}

// About how many nanoseconds the kernels take.
struct Work {
  int64_t pack;                    // a task of the packing kernels
  int64_t predict, route, finish;  // a chunk's û of one tile, an iteration over it; a tile at the end of an iteration

  Work(const DenseArgs& a, const Plan& p) {
    const int64_t multiplications = a.chunk * p.J * p.E / (p.regime == Regime::tiles ? 1 : p.lanes);
    pack = (p.regime == Regime::rows ? p.I : a.chunk) * p.D * 8;
    predict = multiplications * p.D / 4;
    route = 2 * multiplications;
    finish = p.J * p.E * (a.chunks + 16);
    if (p.regime == Regime::quads) finish /= 4;
  }
};

// Pairs of tiles, or of the quad tiles of a group.
int64_t pairs_of(const DenseArgs& a, const Plan& p, int64_t group) {
  return p.regime == Regime::quads ? ceil_div(group, kQuadPair) : ceil_div(a.tiles, kPair);
}

void forward_passes(DenseArgs& a, const Plan& p, bool return_coupling) {
  const Work work(a, p);
  for (a.first = 0; a.first == 0 || a.first < a.quad_tiles; a.first += std::max<int64_t>(a.group, 1)) {
    const int64_t group = std::min(a.group, a.quad_tiles - a.first), pairs = pairs_of(a, p, group);
    for (a.t = 0; a.t < a.iterations; ++a.t) {
      a.keep = return_coupling && a.t == a.iterations - 1;
      switch (p.regime) {
        case Regime::rows:
          if (a.t == 0) launch(rows_predict, a, a.chunks, work.predict * p.B);
          else launch(rows_route, a, a.chunks * p.B, work.route);
          launch(rows_finish_iteration, a, a.tiles, work.finish);
          break;
        case Regime::quads:
          if (a.t == 0) launch(quads_predict, a, a.chunks * pairs, kQuadPair * work.predict);
          else launch(quads_route, a, a.chunks * pairs, kQuadPair * work.route);
          launch(quads_finish_iteration, a, group, work.finish);
          break;
        case Regime::tiles:
          launch(tiles_route, a, a.chunks * pairs, 2 * work.predict + work.route);
          launch(tiles_finish_iteration, a, a.tiles * p.J, work.finish / p.J);
          break;
      }
    }
  }
}

// The passes of iterations R … 2, which leave the coefficients.
void backward_passes(DenseArgs& a, const Plan& p) {
  const Work work(a, p);
  const int64_t last = a.iterations - 1;
  for (a.first = 0; a.first == 0 || a.first < a.quad_tiles; a.first += std::max<int64_t>(a.group, 1)) {
    const int64_t group = std::min(a.group, a.quad_tiles - a.first), pairs = pairs_of(a, p, group);
    if (p.regime == Regime::rows) {
      a.t = last;
      launch(rows_predict_backward, a, a.chunks, (work.predict + 2 * work.route) * p.B);
    }
    for (a.t = last; a.t >= 1; --a.t) {
      // Couplings that are constants have no gradient: only those of the last iteration are needed, if they are kept.
      if (a.last_only && (!a.keep || a.t < last)) break;
      switch (p.regime) {
        case Regime::rows:
          if (a.t < last) launch(rows_route_backward, a, a.chunks * p.B, 2 * work.route);
          if (!a.last_only) launch(rows_finish_backward, a, a.tiles, work.finish);
          break;
        case Regime::quads:
          if (a.t == last)
            launch(quads_predict_backward, a, a.chunks * pairs, kQuadPair * (work.predict + 2 * work.route));
          else launch(quads_route_backward, a, a.chunks * pairs, kQuadPair * 2 * work.route);
          if (!a.last_only) launch(quads_finish_backward, a, group, work.finish);
          break;
        case Regime::tiles:
          launch(tiles_route_backward, a, a.chunks * pairs, 2 * work.predict + work.route);
          if (!a.last_only) launch(tiles_finish_backward, a, a.tiles * p.J, work.finish / p.J);
          break;
      }
    }
  }
}

using Forward = std::tuple<Tensor, Tensor, Tensor>;

Forward dense_capsules_fwd(Tensor u, Tensor weight, std::optional<Tensor> bias, int64_t positions, int64_t iterations,
                           bool leaky, bool return_coupling) {
  const int64_t B = u.size(0), I = u.size(1), J = weight.size(1), D = u.size(2), E = weight.size(3);
  Tensor v = empty(u, {B, J, E}), s = empty(u, {iterations, B, J, E}, accumulation_type(u));
  Tensor coupling = empty(u, {B, return_coupling ? I : 0, J});
  if (B == 0) return {v, s, coupling};
  DenseArgs a = common_args(u, weight, bias, positions, iterations, leaky, false);
  a.v = view_of<3>(v);
  a.s = view_of<4>(s);
  if (return_coupling) a.coupling = view_of<3>(coupling);
  const Plan p = plan(a, false);
  const bool rows = p.regime == Regime::rows, quads = p.regime == Regime::quads;
  const int64_t tiles = quads ? a.group : p.tiles, at_work = tiles * p.tile;
  const bool pack = !quads && packs(a, p) && !takes_u_as_it_is(a, p);
  with_scratch([&](Shelf& shelf) {
    a.u_tiles = pack ? shelf.take(packed_bytes(a, p)) : nullptr;
    a.u_step = I * D;
    a.votes = p.regime == Regime::tiles ? nullptr : shelf.take(votes_bytes(p, tiles));
    a.partial = shelf.take(a.chunks * at_work);
    a.total = shelf.take(at_work);
    a.s_tiles = shelf.take(at_work);
    a.V = shelf.take(at_work);
    a.coefficients = return_coupling ? shelf.take(coefficient_bytes(p)) : nullptr;
  });
  if (rows && !pack) a.u_tiles = a.u.data, a.u_step = a.u.stride[0];
  if (pack) launch(rows ? rows_pack : tiles_pack, a, rows ? B : a.tiles * a.chunks, Work(a, p).pack);
  forward_passes(a, p, return_coupling);
  if (return_coupling) launch(rows ? rows_coupling : quads ? quads_coupling : tiles_coupling, a, p.tiles, I * J * 8);
  return {v, s, coupling};
}

using Backward = std::tuple<Tensor, Tensor, Tensor>;

Backward dense_capsules_bwd(Tensor grad_v, Tensor u, Tensor weight, std::optional<Tensor> bias, Tensor s,
                            int64_t positions, int64_t iterations, bool leaky, bool last_only) {
  const int64_t B = u.size(0), I = u.size(1), J = weight.size(1), D = u.size(2), E = weight.size(3);
  Tensor grad_u = empty(u, {B, I, D}), grad_weight = empty(u, {weight.size(0), J, D, E});
  Tensor grad_bias = bias ? empty(u, {J, E}) : empty(u, {0});
  if (B == 0) {
    torch::stable::zero_(grad_weight);
    torch::stable::zero_(grad_bias);
    return {grad_u, grad_weight, grad_bias};
  }
  DenseArgs a = common_args(u, weight, bias, positions, iterations, leaky, last_only);
  a.grad_v = view_of<3>(grad_v);
  a.s = view_of<4>(s);
  a.grad_u = view_of<3>(grad_u);
  a.grad_weight = view_of<4>(grad_weight);
  a.stream_u = grad_u.numel() * int64_t(grad_u.element_size()) >= kStreamedBytes;
  a.stream = worth_streaming(grad_weight) && E * int64_t(grad_weight.element_size()) % 64 == 0;
  if (bias) a.grad_bias = view_of<2>(grad_bias);
  const Plan p = plan(a, true);
  const bool rows = p.regime == Regime::rows, quads = p.regime == Regime::quads;
  const int64_t all = p.tiles * p.tile, in_tiles = quads ? a.tiles * J * E * p.lanes * p.item : 0;
  a.keep = keeps_coefficients(a, p);
  const bool pack = packs(a, p) && !takes_u_as_it_is(a, p);
  void* packed = nullptr;
  with_scratch([&](Shelf& shelf) {
    a.partial = shelf.take(a.chunks * (quads ? a.group * p.tile : all));
    a.total = shelf.take(all);
    a.s_tiles = shelf.take(iterations * all);
    a.V = shelf.take(iterations * all);
    a.g = shelf.take(iterations * all);
    a.V_in_tiles = shelf.take(iterations * in_tiles);
    a.g_in_tiles = shelf.take(iterations * in_tiles);
    a.coefficients = a.keep ? shelf.take(2 * (iterations - 1) * coefficient_bytes(p)) : nullptr;
    a.weight_parts = a.parts > 1 ? shelf.take(a.types * a.parts * J * D * E * p.item) : nullptr;
    // û of quads is needed before u in tiles.
    Shelf end = shelf;
    packed = pack ? shelf.take(packed_bytes(a, p)) : nullptr;
    Shelf& votes = quads ? end : shelf;
    a.votes = p.regime == Regime::tiles ? nullptr : votes.take(votes_bytes(p, quads ? a.group : p.tiles));
    shelf.used = std::max(shelf.used, votes.used);
  });
  a.u_tiles = rows && !pack ? a.u.data : packed;
  a.u_step = rows && !pack ? a.u.stride[0] : I * D;
  const Work work(a, p);
  const auto pack_u = [&] {
    if (pack) launch(rows ? rows_pack : tiles_pack, a, rows ? B : a.tiles * a.chunks, work.pack);
  };
  if (!quads) pack_u();
  launch(rows    ? rows_start_backward
         : quads ? quads_start_backward
                 : tiles_start_backward,
         a, p.tiles, J * E * 16 * iterations);
  backward_passes(a, p);
  if (quads) {
    launch(quads_to_tiles, a, a.tiles, J * E * 16 * iterations);
    a.V = a.V_in_tiles;
    a.g = a.g_in_tiles;
    pack_u();
  }
  if (rows) {
    launch(rows_gradients, a, a.chunks, 3 * work.predict * B);
  } else {
    const int64_t tasks = positions == 1 ? ceil_div(a.types, 4) : a.types * a.parts;
    const int64_t capsules = positions == 1 ? 4 : a.part;
    launch(tiles_gradients, a, tasks, capsules * a.tiles * J * E * (2 * D + 5) / 4);
    if (a.weight_parts) launch(tiles_weight_parts, a, a.types, a.parts * J * D * E / 8);
  }
  if (bias) launch(rows ? rows_bias_gradient : tiles_bias_gradient, a, 1, 1);
  return {grad_u, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(caps_kernels_cpp, m) {
  m.def(
      "dense_capsules_fwd(Tensor u, Tensor weight, Tensor? bias, int positions, int iterations, bool leaky, "
      "bool return_coupling) -> (Tensor, Tensor, Tensor)");
  m.def(
      "dense_capsules_bwd(Tensor grad_v, Tensor u, Tensor weight, Tensor? bias, Tensor s, int positions, "
      "int iterations, bool leaky, bool last_only) -> (Tensor, Tensor, Tensor)");
  m.def("dense_capsules_regime(Tensor u, Tensor weight, int positions, int iterations) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(caps_kernels_cpp, CPU, m) {
  m.impl("dense_capsules_regime", TORCH_BOX(&dense_capsules_regime));
  m.impl("dense_capsules_fwd", TORCH_BOX(&dense_capsules_fwd));
  m.impl("dense_capsules_bwd", TORCH_BOX(&dense_capsules_bwd));
}

}  // namespace caps

#endif
