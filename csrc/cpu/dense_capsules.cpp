// dense_capsules: votes and dynamic routing in one, forward and backward. caps_kernels/ops/dense_capsules has the
// mathematics; û and its gradient exist for a few lower capsules and one tile of samples at a time.
//
// Forward: the samples of u are packed into tiles; an iteration is a pass over chunks of lower capsules for each tile,
// whose partial sums are then added in the order of the chunks. Backward: the same passes for t = R … 2, which keep the
// coefficients c and gb (or not, beyond kCoefficientBudget: then they are computed again), and one last pass that forms
// gû = Σ_t c^t g^t + gb^t V^{t-1} from them and contracts it at once into grad_u and grad_weight.
#include <caps/kernel.h>

namespace caps {

constexpr int64_t kCoefficientBudget = int64_t{64} << 20;  // bytes
constexpr int64_t kGroup = 8;                              // tiles whose gû stay in cache together

struct DenseArgs {
  DType dtype;  // of all tensors but s
  View<3> u, v, coupling, grad_v, grad_u;
  View<4> weight, s, grad_weight;
  View<2> bias, grad_bias;  // data is null where there is none, as for coupling
  int64_t positions, iterations;
  bool leaky, last_only;  // last_only: routing_grad="last"

  int64_t tiles, chunk, chunks;        // lower capsules are cut into `chunks` of `chunk`
  int64_t types, parts, part;          // last pass: tasks of `types` types, or of `part` positions of one type
  int64_t t;                           // the iteration, from 0
  bool keep;                           // coefficients (backward), couplings (forward, last iteration)
  // Scratch, numbers of the accumulation type. A tile's size is J·E·lanes.
  void *u_tiles;                       // [tiles][I·D]
  void *partial;                       // [chunks][tiles] tiles
  void *total;                         // [tiles] tiles: forward v; backward Σ gV
  void *s_tiles, *V, *g;               // [R][tiles] tiles; forward uses one of s_tiles and V
  void *coefficients;                  // backward [R - 1][c, gb][tiles][I·J], forward [tiles][I·J]
  void *weight_parts;                  // [types][parts][J·D·E], null where parts is 1
};

CAPS_KERNEL(dense_pack, DenseArgs)              // chunks: tiles · chunks
CAPS_KERNEL(dense_route, DenseArgs)             // chunks · tiles
CAPS_KERNEL(dense_finish_iteration, DenseArgs)  // tiles
CAPS_KERNEL(dense_coupling, DenseArgs)          // tiles
CAPS_KERNEL(dense_start_backward, DenseArgs)    // tiles
CAPS_KERNEL(dense_route_backward, DenseArgs)    // chunks · tiles
CAPS_KERNEL(dense_finish_backward, DenseArgs)   // tiles
CAPS_KERNEL(dense_gradients, DenseArgs)         // ceil(types / a task's types) · parts
CAPS_KERNEL(dense_weight_parts, DenseArgs)      // types
CAPS_KERNEL(dense_bias_gradient, DenseArgs)     // 1

}  // namespace caps

#ifdef CAPS_ISA

#include <caps/tile_routing.h>

namespace caps::CAPS_ISA {
namespace {

// The sizes and the scratch of a call, for numbers of type T.
template <typename T>
struct Layout {
  static constexpr int lanes = kLanes<T>;
  const DenseArgs& a;
  Sizes z;
  int64_t I, J, D, E, row, tile_size, all;  // row: J·lanes; tile_size: J·E·lanes; all: of all tiles

  explicit Layout(const DenseArgs& args)
      : a(args),
        z{args.u.size[1], args.weight.size[1], args.u.size[2], args.weight.size[3], args.leaky},
        I(z.in_capsules), J(z.out_capsules), D(z.in_dim), E(z.out_dim), row(J * lanes), tile_size(row * E),
        all(args.tiles * tile_size) {}

  T* u(int64_t tile) const { return static_cast<T*>(a.u_tiles) + tile * I * D * lanes; }
  T* partial(int64_t chunk, int64_t tile) const {
    return static_cast<T*>(a.partial) + chunk * all + tile * tile_size;
  }
  T* total(int64_t tile) const { return static_cast<T*>(a.total) + tile * tile_size; }
  T* s(int64_t t, int64_t tile) const { return static_cast<T*>(a.s_tiles) + t * all + tile * tile_size; }
  T* V(int64_t t, int64_t tile) const { return static_cast<T*>(a.V) + t * all + tile * tile_size; }
  T* g(int64_t t, int64_t tile) const { return static_cast<T*>(a.g) + t * all + tile * tile_size; }
  T* kept(int64_t index, int64_t tile, int64_t i) const {
    return static_cast<T*>(a.coefficients) + ((index * a.tiles + tile) * I + i) * row;
  }
  T* c(int64_t t, int64_t tile, int64_t i) const { return kept(2 * (t - 1), tile, i); }
  T* gb(int64_t t, int64_t tile, int64_t i) const { return kept(2 * (t - 1) + 1, tile, i); }
  T uniform() const { return T(1) / T(J + (z.leaky ? 1 : 0)); }
  View<3> s_view(int64_t t) const {
    const View<4>& s = a.s;
    char* data = static_cast<char*>(s.data) + t * s.stride[0] * int64_t(sizeof(T));
    return {data, {s.size[1], s.size[2], s.size[3]}, {s.stride[1], s.stride[2], s.stride[3]}};
  }
  static constexpr DType sums_dtype = sizeof(T) == 8 ? DType::float64 : DType::float32;
};

template <typename F>
CAPS_INLINE void with_accumulation_type(DType dtype, const F& f) {
  if (dtype == DType::float64) f.template operator()<double>();
  else f.template operator()<float>();
}

// Runs body(weights, i0, i1, tile, sums, memory) for tasks begin … end - 1, each a chunk of lower capsules of a tile.
// Tiles of a chunk follow each other, so that its matrices stay in cache. sums: the task's partial sums, zeroed.
template <typename T, typename F>
CAPS_INLINE void for_chunks(const Layout<T>& l, int64_t memory_size, int64_t begin, int64_t end, const F& body) {
  const DenseArgs& a = l.a;
  Weights<T> weights(a.dtype, a.weight, a.positions);
  memory_size = (memory_size + 15) / 16 * 16;
  T* memory = static_cast<T*>(
      scratch(Scratch::chunk, (memory_size + weights.copy_size(a.chunk)) * int64_t(sizeof(T))));
  weights.use_memory(memory + memory_size);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t chunk = task / a.tiles, tile = task % a.tiles;
    const int64_t i0 = chunk * a.chunk, i1 = min_of(i0 + a.chunk, l.I);
    weights.prepare(i0, i1);
    T* sums = l.partial(chunk, tile);
    for (int64_t n = 0; n < l.tile_size; ++n) sums[n] = 0;
    body(weights, i0, i1, tile, sums, memory);
  }
}

// One number of the partial sums of a tile, added in the order of the chunks.
template <typename T>
CAPS_INLINE Vec<T> sum_of_chunks(const Layout<T>& l, int64_t tile, int64_t n) {
  auto sum = load<Vec<T>>(l.partial(0, tile) + n);
  for (int64_t chunk = 1; chunk < l.a.chunks; ++chunk) sum += load<Vec<T>>(l.partial(chunk, tile) + n);
  return sum;
}

template <typename T>
void finish_iteration(const Layout<T>& l, int64_t tile) {
  constexpr int lanes = kLanes<T>;
  const DenseArgs& a = l.a;
  T *s = l.s(0, tile), *v = l.total(tile), *V = l.V(0, tile);
  for (int64_t n = 0; n < l.tile_size; n += lanes) store(s + n, sum_of_chunks(l, tile, n));
  if (a.bias.data) {
    dispatch_floating(a.dtype, [&]<typename scalar_t>() {
      if constexpr (std::is_same_v<Acc<scalar_t>, T>) {
        for (int64_t n = 0; n < l.J * l.E; ++n) {
          const auto* bias = static_cast<const scalar_t*>(a.bias.data) + n / l.E * a.bias.stride[0] + n % l.E * a.bias.stride[1];
          store(s + n * lanes, load<Vec<T>>(s + n * lanes) + load_one(bias));
        }
      }
    });
  }
  for (int64_t j = 0; j < l.J; ++j) squash_lanes(s + j * l.E * lanes, l.E, v + j * l.E * lanes);
  for (int64_t n = 0; n < l.tile_size; n += lanes) {
    store(V + n, a.t == 0 ? load<Vec<T>>(v + n) : load<Vec<T>>(V + n) + load<Vec<T>>(v + n));
  }
  unpack(Layout<T>::sums_dtype, l.s_view(a.t), tile, 0, l.J, s);
  if (a.t == a.iterations - 1) unpack(a.dtype, a.v, tile, 0, l.J, v);
}

template <typename T>
void start_backward(const Layout<T>& l, int64_t tile) {
  constexpr int lanes = kLanes<T>;
  const int64_t R = l.a.iterations;
  for (int64_t t = 0; t < R; ++t) {
    pack(Layout<T>::sums_dtype, l.s_view(t), tile, 0, l.J, l.s(t, tile));
    for (int64_t n = 0; n < l.tile_size; n += l.E * lanes) squash_lanes(l.s(t, tile) + n, l.E, l.V(t, tile) + n);
    for (int64_t n = 0; t > 0 && n < l.tile_size; n += lanes) {
      store(l.V(t, tile) + n, load<Vec<T>>(l.V(t, tile) + n) + load<Vec<T>>(l.V(t - 1, tile) + n));
    }
  }
  T* grad_v = l.partial(0, tile);
  pack(l.a.dtype, l.a.grad_v, tile, 0, l.J, grad_v);
  for (int64_t n = 0; n < l.tile_size; n += l.E * lanes) {
    squash_lanes_backward(grad_v + n, l.s(R - 1, tile) + n, l.E, l.g(R - 1, tile) + n);
  }
}

// From the partial sums of gV^{t-1}: Σ gV so far, and g^{t-1}.
template <typename T>
void finish_backward(const Layout<T>& l, int64_t tile) {
  constexpr int lanes = kLanes<T>;
  const int64_t t = l.a.t;
  T* total = l.total(tile);
  for (int64_t n = 0; n < l.tile_size; n += lanes) {
    const Vec<T> sum = sum_of_chunks(l, tile, n);
    store(total + n, t == l.a.iterations - 1 ? sum : load<Vec<T>>(total + n) + sum);
  }
  for (int64_t n = 0; n < l.tile_size; n += l.E * lanes) {
    squash_lanes_backward(total + n, l.s(t - 1, tile) + n, l.E, l.g(t - 1, tile) + n);
  }
}

// The last pass over a few lower capsules.
template <typename T>
class Gradients {
  static constexpr int lanes = kLanes<T>;
  using V = Vec<T>;

 public:
  explicit Gradients(const Layout<T>& layout)
      : l_(layout), a_(layout.a), weights_(a_.dtype, a_.weight, a_.positions), group_(min_of(a_.tiles, kGroup)),
        first_(a_.last_only ? a_.iterations - 1 : 0), matrices_(l_.J * l_.D * l_.E) {
    const int64_t own = a_.keep ? 0 : kShared * (l_.tile_size + 2 * (a_.iterations - 1) * group_ * l_.row);
    const int64_t sizes[] = {kShared * group_ * l_.D * lanes, group_ * l_.E * lanes, own,
                             (kShared * matrices_ + 15) / 16 * 16, weights_.copy_size(kShared)};
    int64_t size = 0;
    for (int64_t n : sizes) size += n;
    T* memory = static_cast<T*>(scratch(Scratch::chunk, size * int64_t(sizeof(T))));
    grad_u_ = memory;
    grad_votes_ = grad_u_ + sizes[0];
    own_ = grad_votes_ + sizes[1];
    grad_weight_ = own_ + sizes[2];
    weights_.use_memory(grad_weight_ + sizes[3]);
  }

  // Task n: kShared types of one position each, or `part` positions of one type.
  void run(int64_t task) {
    const int64_t P = a_.positions, part = task % a_.parts;
    const int64_t t0 = P == 1 ? task * kShared : task / a_.parts;
    const int64_t types = P == 1 ? min_of(a_.types - t0, kShared) : 1;
    const int64_t i0 = t0 * P + part * a_.part, i1 = P == 1 ? i0 + types : t0 * P + min_of((part + 1) * a_.part, P);
    T* sums = a_.weight_parts ? static_cast<T*>(a_.weight_parts) + task * matrices_ : grad_weight_;
    for (int64_t n = 0; n < types * matrices_; ++n) sums[n] = 0;
    for (int64_t i = i0; i < i1; i += kShared) {
      const int64_t count = min_of(i1 - i, kShared);
      weights_.prepare(i, i + count);
      for (int64_t tile = 0; tile < a_.tiles; tile += group_) capsules(i, count, tile, min_of(a_.tiles - tile, group_), sums);
    }
    if (!a_.weight_parts) {
      for (int64_t t = 0; t < types; ++t) write_weight(l_, t0 + t, grad_weight_ + t * matrices_);
    }
  }

  static void write_weight(const Layout<T>& l, int64_t type, const T* sums) {
    const int64_t size = l.J * l.D * l.E;
    dispatch_floating(l.a.dtype, [&]<typename scalar_t>() {
      if constexpr (std::is_same_v<Acc<scalar_t>, T>) {
        auto* out = static_cast<scalar_t*>(l.a.grad_weight.data) + type * size;
        for (int64_t n = 0; n < size; n += lanes) {
          const int64_t some = min_of(size - n, lanes);
          store_some(out + n, load_some<V>(sums + n, some), some);
        }
      }
    });
  }

 private:
  void capsules(int64_t i, int64_t count, int64_t tile0, int64_t tiles, T* sums) {
    for (int64_t n = 0; n < count * group_ * l_.D * lanes; ++n) grad_u_[n] = 0;
    if (!a_.keep) compute_coefficients(i, count, tile0, tiles);
    const int64_t step = l_.E * lanes, matrix = l_.D * l_.E;
    for (int64_t j = 0; j < l_.J; ++j) {
      for (int64_t k = 0; k < count; ++k) {
        for (int64_t tile = 0; tile < tiles; ++tile) {
          T* grad_votes = grad_votes_ + tile * step;
          votes_gradient(i, k, j, tile0, tile, grad_votes);
          add_input_gradient(grad_votes, weights_(i + k) + j * matrix, l_.D, l_.E,
                             grad_u_ + (k * group_ + tile) * l_.D * lanes);
        }
        T* out = sums + (a_.positions == 1 ? k * matrices_ : 0) + j * matrix;
        add_weight_gradient(l_.u(tile0) + (i + k) * l_.D * lanes, l_.I * l_.D * lanes, grad_votes_, step, tiles, l_.D,
                            l_.E, out);
      }
    }
    for (int64_t k = 0; k < count; ++k) {
      for (int64_t tile = 0; tile < tiles; ++tile) {
        unpack(a_.dtype, a_.grad_u, tile0 + tile, i + k, 1, grad_u_ + (k * group_ + tile) * l_.D * lanes);
      }
    }
  }

  // Room for c (which = 0) and gb (1) of iteration t where they were not kept.
  T* own(int64_t t, int64_t which, int64_t tile) const {
    return own_ + kShared * l_.tile_size + ((2 * (t - 1) + which) * group_ + tile) * kShared * l_.row;
  }
  void compute_coefficients(int64_t i, int64_t count, int64_t tile0, int64_t tiles) {
    for (int64_t t = first_ > 0 ? first_ : 1; t < a_.iterations; ++t) {
      for (int64_t n = 0; n < tiles; ++n) {
        route<true, T>(l_.u(tile0 + n), weights_, l_.z, i, i + count, l_.V(t - 1, tile0 + n), l_.g(t, tile0 + n),
                       nullptr, own_, true, own(t, 0, n), own(t, 1, n));
      }
    }
  }

  // gû [E] of lower capsule i + k and parent j, over iterations first_ … R - 1. The usual numbers of iterations keep
  // their coefficients in registers.
  void votes_gradient(int64_t i, int64_t k, int64_t j, int64_t tile0, int64_t n, T* out) const {
    const int64_t routed = a_.iterations - (first_ > 0 ? first_ : 1);
    if (first_ == 0 && routed == 2) return some_iterations<2, true, true>(1, i, k, j, tile0, n, out);
    if (first_ == 0 && routed == 1) return some_iterations<1, true, true>(1, i, k, j, tile0, n, out);
    if (first_ == 0) some_iterations<0, true, true>(1, i, k, j, tile0, n, out);
    for (int64_t t = first_ > 0 ? first_ : 1; t < a_.iterations; ++t) {
      if (a_.last_only) some_iterations<1, true, false>(t, i, k, j, tile0, n, out);
      else some_iterations<1, false, true>(t, i, k, j, tile0, n, out);
    }
  }

  // Iterations t … t + count - 1. begin: also set `out`, with iteration 0 unless couplings are constants (not full).
  template <int count, bool begin, bool full>
  CAPS_INLINE void some_iterations(int64_t t, int64_t i, int64_t k, int64_t j, int64_t tile0, int64_t n, T* out) const {
    const int64_t at = j * l_.E * lanes, tile = tile0 + n;
    V c[count + 1], gb[count + 1];
    const T *g[count + 1], *Vt[count + 1];
    for (int m = 0; m < count; ++m) {
      const T* c_row = (a_.keep ? l_.c(t + m, tile, i + k) : own(t + m, 0, n) + k * l_.row) + j * lanes;
      const T* gb_row = (a_.keep ? l_.gb(t + m, tile, i + k) : own(t + m, 1, n) + k * l_.row) + j * lanes;
      c[m] = load<V>(c_row);
      gb[m] = load<V>(gb_row);
      // Those of the next group of capsules: too many streams for the processor to see them coming.
      __builtin_prefetch(c_row + kShared * l_.row);
      __builtin_prefetch(gb_row + kShared * l_.row);
      g[m] = l_.g(t + m, tile) + at;
      Vt[m] = l_.V(t + m - 1, tile) + at;
    }
    const T *g0 = l_.g(0, tile) + at, c0 = l_.uniform();
    for (int64_t e = 0; e < l_.E * lanes; e += lanes) {
      V sum = begin ? (full ? c0 * load<V>(g0 + e) : V{}) : load<V>(out + e);
#pragma GCC unroll 4
      for (int m = 0; m < count; ++m) {
        sum += c[m] * load<V>(g[m] + e);
        if constexpr (full) sum += gb[m] * load<V>(Vt[m] + e);
      }
      store(out + e, sum);
    }
  }

  const Layout<T>& l_;
  const DenseArgs& a_;
  Weights<T> weights_;
  int64_t group_, first_, matrices_;
  T *grad_u_, *grad_votes_, *own_, *grad_weight_;
};

}  // namespace

void dense_pack(const DenseArgs& args, int64_t begin, int64_t end) {
  with_accumulation_type(args.dtype, [&]<typename T>() {
    const Layout<T> l(args);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t tile = task / args.chunks, i = task % args.chunks * args.chunk;
      pack(args.dtype, args.u, tile, i, min_of(args.chunk, l.I - i), l.u(tile) + i * l.D * kLanes<T>);
    }
  });
}

void dense_route(const DenseArgs& args, int64_t begin, int64_t end) {
  with_accumulation_type(args.dtype, [&]<typename T>() {
    const Layout<T> l(args);
    const int64_t memory_size = kShared * (l.tile_size + l.row);
    for_chunks(l, memory_size, begin, end,
               [&](const Weights<T>& weights, int64_t i0, int64_t i1, int64_t tile, T* sums, T* memory) {
                 if (args.t == 0) return route_uniformly(l.u(tile), weights, l.z, i0, i1, l.uniform(), sums);
                 T* c = args.keep ? l.kept(0, tile, i0) : memory + kShared * l.tile_size;
                 route<false, T>(l.u(tile), weights, l.z, i0, i1, l.V(0, tile), nullptr, sums, memory, args.keep, c, nullptr);
               });
  });
}

void dense_finish_iteration(const DenseArgs& args, int64_t begin, int64_t end) {
  with_accumulation_type(args.dtype, [&]<typename T>() {
    const Layout<T> l(args);
    for (int64_t tile = begin; tile < end; ++tile) finish_iteration(l, tile);
  });
}

void dense_coupling(const DenseArgs& args, int64_t begin, int64_t end) {
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

void dense_start_backward(const DenseArgs& args, int64_t begin, int64_t end) {
  with_accumulation_type(args.dtype, [&]<typename T>() {
    const Layout<T> l(args);
    for (int64_t tile = begin; tile < end; ++tile) start_backward(l, tile);
  });
}

void dense_route_backward(const DenseArgs& args, int64_t begin, int64_t end) {
  with_accumulation_type(args.dtype, [&]<typename T>() {
    const Layout<T> l(args);
    const int64_t memory_size = kShared * (l.tile_size + 2 * l.row);
    for_chunks(l, memory_size, begin, end,
               [&](const Weights<T>& weights, int64_t i0, int64_t i1, int64_t tile, T* sums, T* memory) {
                 T* c = args.keep ? l.c(args.t, tile, i0) : memory + kShared * l.tile_size;
                 T* gb = args.keep ? l.gb(args.t, tile, i0) : c + kShared * l.row;
                 route<true, T>(l.u(tile), weights, l.z, i0, i1, l.V(args.t - 1, tile), l.g(args.t, tile),
                                args.last_only ? nullptr : sums, memory, args.keep, c, gb);
               });
  });
}

void dense_finish_backward(const DenseArgs& args, int64_t begin, int64_t end) {
  with_accumulation_type(args.dtype, [&]<typename T>() {
    const Layout<T> l(args);
    for (int64_t tile = begin; tile < end; ++tile) finish_backward(l, tile);
  });
}

void dense_gradients(const DenseArgs& args, int64_t begin, int64_t end) {
  with_accumulation_type(args.dtype, [&]<typename T>() {
    const Layout<T> l(args);
    Gradients<T> gradients(l);
    for (int64_t task = begin; task < end; ++task) gradients.run(task);
  });
}

void dense_weight_parts(const DenseArgs& args, int64_t begin, int64_t end) {
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

void dense_bias_gradient(const DenseArgs& args, int64_t, int64_t) {
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

#else

#include <caps/op.h>

namespace caps {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Cuts the work, by the shapes alone.
void plan(DenseArgs& a, int64_t item) {
  const int64_t I = a.u.size[1], J = a.weight.size[1], D = a.u.size[2], E = a.weight.size[3];
  const int64_t lanes = vector_bytes() / item, shared = 4;
  a.tiles = ceil_div(a.u.size[0], lanes);
  // At least 32 tasks; the matrices of a chunk in half of a level 2 cache; at most 16 MiB of partial sums.
  const int64_t enough = std::max(ceil_div(32, a.tiles), ceil_div(I * J * D * E * item, 512 << 10));
  const int64_t most = std::max<int64_t>(1, (16 << 20) / (J * E * lanes * item * a.tiles));
  const int64_t chunks = std::min({enough, most, ceil_div(I, shared)});
  a.chunk = ceil_div(ceil_div(I, chunks), shared) * shared;
  a.chunks = ceil_div(I, a.chunk);
  a.types = I / a.positions;
  a.parts = a.positions == 1 ? 1 : std::clamp<int64_t>(32 / a.types, 1, ceil_div(a.positions, shared));
  a.part = ceil_div(ceil_div(a.positions, a.parts), shared) * shared;
  a.parts = ceil_div(a.positions, a.part);
}

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
  const int64_t item = a.dtype == DType::float64 ? 8 : 4, lanes = vector_bytes() / item;
  plan(a, item);
  const int64_t all = a.tiles * J * E * lanes * item;
  with_scratch([&](Shelf& shelf) {
    a.u_tiles = shelf.take(a.tiles * I * D * lanes * item);
    a.partial = shelf.take(a.chunks * all);
    a.total = shelf.take(all);
    a.s_tiles = shelf.take(all);
    a.V = shelf.take(all);
    a.coefficients = return_coupling ? shelf.take(a.tiles * I * J * lanes * item) : nullptr;
  });
  const int64_t work = a.chunk * J * E * (D + 4) / 4;
  launch(dense_pack, a, a.tiles * a.chunks, a.chunk * D * 8);
  for (a.t = 0; a.t < iterations; ++a.t) {
    a.keep = return_coupling && a.t == iterations - 1;
    launch(dense_route, a, a.chunks * a.tiles, work);
    launch(dense_finish_iteration, a, a.tiles, J * E * (a.chunks + lanes));
  }
  if (return_coupling) launch(dense_coupling, a, a.tiles, I * J * lanes);
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
  if (bias) a.grad_bias = view_of<2>(grad_bias);
  const int64_t item = a.dtype == DType::float64 ? 8 : 4, lanes = vector_bytes() / item;
  plan(a, item);
  const int64_t all = a.tiles * J * E * lanes * item;
  const int64_t coefficients = 2 * (iterations - 1) * a.tiles * I * J * lanes * item;
  a.keep = coefficients <= kCoefficientBudget;
  with_scratch([&](Shelf& shelf) {
    a.u_tiles = shelf.take(a.tiles * I * D * lanes * item);
    a.partial = shelf.take(a.chunks * all);
    a.total = shelf.take(all);
    a.s_tiles = shelf.take(iterations * all);
    a.V = shelf.take(iterations * all);
    a.g = shelf.take(iterations * all);
    a.coefficients = a.keep ? shelf.take(coefficients) : nullptr;
    a.weight_parts = a.parts > 1 ? shelf.take(a.types * a.parts * J * D * E * item) : nullptr;
  });
  const int64_t work = a.chunk * J * E * (D + 6) / 4;
  launch(dense_pack, a, a.tiles * a.chunks, a.chunk * D * 8);
  launch(dense_start_backward, a, a.tiles, J * E * lanes * iterations);
  for (a.t = iterations - 1; a.t >= 1; --a.t) {
    // Couplings that are constants have no gradient: only those of the last iteration are needed, if they are kept.
    if (last_only && (!a.keep || a.t < iterations - 1)) break;
    launch(dense_route_backward, a, a.chunks * a.tiles, work);
    if (!last_only) launch(dense_finish_backward, a, a.tiles, J * E * (a.chunks + lanes));
  }
  const int64_t tasks = positions == 1 ? ceil_div(a.types, 4) : a.types * a.parts;
  const int64_t capsules = positions == 1 ? 4 : a.part;
  launch(dense_gradients, a, tasks, capsules * a.tiles * J * E * (2 * D + 5) / 4);
  if (a.weight_parts) launch(dense_weight_parts, a, a.types, a.parts * J * D * E / 8);
  if (bias) launch(dense_bias_gradient, a, 1, 1);
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
}

STABLE_TORCH_LIBRARY_IMPL(caps_kernels_cpp, CPU, m) {
  m.impl("dense_capsules_fwd", TORCH_BOX(&dense_capsules_fwd));
  m.impl("dense_capsules_bwd", TORCH_BOX(&dense_capsules_bwd));
}

}  // namespace caps

#endif
