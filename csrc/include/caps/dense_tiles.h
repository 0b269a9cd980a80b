// dense_capsules over tiles of samples: what its kernels do with one tile, or one group of lower capsules.
// Only for code compiled with CAPS_ISA.
#pragma once

#include <caps/dense.h>
#include <caps/dense_quads.h>
#include <caps/spread_routing.h>
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
        I(z.in_capsules),
        J(z.out_capsules),
        D(z.in_dim),
        E(z.out_dim),
        row(J * lanes),
        tile_size(row * E),
        all(args.tiles * tile_size) {}

  T* u(int64_t tile, int64_t i) const { return static_cast<T*>(a.u_tiles) + (tile * I + i) * D * lanes; }
  T* partial(int64_t chunk, int64_t tile) const { return static_cast<T*>(a.partial) + chunk * all + tile * tile_size; }
  T* total(int64_t tile) const { return static_cast<T*>(a.total) + tile * tile_size; }
  T* s(int64_t t, int64_t tile) const { return static_cast<T*>(a.s_tiles) + t * all + tile * tile_size; }
  T* V(int64_t t, int64_t tile) const { return static_cast<T*>(a.V) + t * all + tile * tile_size; }
  T* g(int64_t t, int64_t tile) const { return static_cast<T*>(a.g) + t * all + tile * tile_size; }
  T* kept(int64_t index, int64_t tile, int64_t i) const {
    return static_cast<T*>(a.coefficients) + ((index * a.tiles + tile) * I + i) * row;
  }
  T* c(int64_t t, int64_t tile, int64_t i) const { return kept(2 * (t - 1), tile, i); }
  T* gb(int64_t t, int64_t tile, int64_t i) const { return kept(2 * (t - 1) + 1, tile, i); }
  T* basis(int64_t tile, int64_t j) const {
    return static_cast<T*>(a.basis) + (tile * J + j) * E * lanes * (2 * a.iterations - 1);
  }
  T uniform() const { return T(1) / T(J + (z.leaky ? 1 : 0)); }
  // Numbers of scratch that a routing pass needs.
  int64_t route_scratch(bool backward) const {
    return a.spread ? spread_scratch<T>(z, backward) : a.routed * (tile_size + (backward ? 2 : 1) * row);
  }
  View<3> s_view(int64_t t) const {
    const View<4>& s = a.s;
    char* data = static_cast<char*>(s.data) + t * s.stride[0] * int64_t(sizeof(T));
    return {data, {s.size[1], s.size[2], s.size[3]}, {s.stride[1], s.stride[2], s.stride[3]}};
  }
  static constexpr DType sums_dtype = sizeof(T) == 8 ? DType::float64 : DType::float32;
};

// Runs f(Block<n>()) for n = `tiles` neighbouring tiles, at most kPair.
template <typename F>
CAPS_INLINE void for_pair(int64_t tiles, const F& f) {
  if (tiles == kPair) f(Block<kPair>());
  else f(Block<1>());
}

// Runs f(Block<n>(), tile) for the tiles that share a read of W where û is made.
template <typename F>
CAPS_INLINE void for_routed(const DenseArgs& a, int64_t tiles, const F& f) {
  if (a.routed_tiles == kPair) for_blocks<kPair>(tiles, f);
  else for_blocks<1>(tiles, f);
}

// u of lower capsules first … first + count - 1 in some tiles, [D] for each of them, in `tiles` a distance `step`
// apart.
template <typename T>
struct Packed {
  const T* u;
  int64_t step;

  // Where u is not kept in tiles, they are made in `memory`.
  Packed(const Layout<T>& l, int64_t tile, int64_t tiles, int64_t first, int64_t count, T* memory)
      : u(l.a.u_tiles ? l.u(tile, first) : memory), step((l.a.u_tiles ? l.I : count) * l.D * l.lanes) {
    for (int64_t n = 0; !l.a.u_tiles && n < tiles; ++n)
      pack(l.a.dtype, l.a.u, tile + n, first, count, memory + n * step);
  }
};

// Runs body(pair, weights, i0, i1, tile, u, sums, memory) for tasks begin … end - 1, each a chunk of lower capsules of
// kPair tiles, or of the last one alone. Tiles of a chunk follow each other, so that its matrices stay in cache. sums:
// the task's partial sums, zeroed.
template <typename T, typename F>
CAPS_INLINE void for_chunks(const Layout<T>& l, int64_t memory_size, int64_t begin, int64_t end, const F& body) {
  const DenseArgs& a = l.a;
  Weights<T> weights(a.dtype, a.weight, a.positions);
  const int64_t own = (memory_size + 15) / 16 * 16, packed = a.u_tiles ? 0 : kPair * a.chunk * l.D * l.lanes;
  T* memory =
      static_cast<T*>(scratch(Scratch::chunk, (own + packed + weights.copy_size(a.chunk)) * int64_t(sizeof(T))));
  weights.use_memory(memory + own + packed);
  const int64_t pairs = (a.tiles + kPair - 1) / kPair;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t chunk = task / pairs, tile = task % pairs * kPair, tiles = min_of(a.tiles - tile, kPair);
    const int64_t i0 = chunk * a.chunk, i1 = min_of(i0 + a.chunk, l.I);
    weights.prepare(i0, i1);
    T* sums = l.partial(chunk, tile);
    for (int64_t n = 0; n < tiles * l.tile_size; ++n) sums[n] = 0;
    const Packed<T> u(l, tile, tiles, i0, i1 - i0, memory + own);
    for_pair(tiles,
             [&](auto pair) __attribute__((always_inline)) { body(pair, weights, i0, i1, tile, u, sums, memory); });
  }
}

// The pass of iteration a.t over lower capsules i0 … i1 - 1 of neighbouring tiles, from `tile0` on, in the way that the
// plan chose.
template <bool backward, int tiles, typename T>
void route_chunk(const Layout<T>& l, const Weights<T>& weights, int64_t i0, int64_t i1, int64_t tile0,
                 const Packed<T>& u, T* sums, T* memory) {
  const DenseArgs& a = l.a;
  const int64_t index = backward ? 2 * (a.t - 1) : 0;
  const auto V = [&](int64_t n) { return l.V(backward ? a.t - 1 : 0, tile0 + n); };
  const auto g = [&](int64_t n) { return backward ? l.g(a.t, tile0 + n) : nullptr; };
  const auto sums_of = [&](int64_t n) { return backward && a.last_only ? nullptr : sums + n * l.tile_size; };
  const auto c = [&](int64_t n) { return a.keep ? l.kept(index, tile0 + n, i0) : nullptr; };
  const auto gb = [&](int64_t n) { return a.keep && backward ? l.kept(index + 1, tile0 + n, i0) : nullptr; };
  if constexpr (kCanSpread<T>) {
    for (int n = 0; a.spread && n < tiles; ++n) {
      route_spread<backward>(u.u + n * u.step, weights, l.z, i0, i1, V(n), g(n), sums_of(n), memory, c(n), gb(n));
    }
    if (a.spread) return;
  }
  const auto some = [&](auto block, auto capsules, int64_t n) __attribute__((always_inline)) {
    constexpr int at_once = decltype(capsules)::size, held = decltype(block)::size * at_once;
    T *own_c = memory + held * l.tile_size, *own_gb = backward ? own_c + held * l.row : nullptr;
    route<backward, decltype(block)::size, at_once>(u.u + n * u.step, u.step, weights, l.z, i0, i1, V(n), g(n),
                                                    sums_of(n), memory, a.keep, a.keep ? c(n) : own_c,
                                                    a.keep ? gb(n) : own_gb, (a.keep ? l.I : at_once) * l.row);
  };
  if (tiles == kPair && a.routed_tiles == kPair) {
    if (a.routed == kPair * kRouted) some(Block<kPair>(), Block<kRouted>(), 0);
    else some(Block<kPair>(), Block<kRouted / kPair>(), 0);
  } else {
    for (int n = 0; n < tiles; ++n) some(Block<1>(), Block<kRouted>(), n);
  }
}

// The partial sums of a tile and parent j [E], added to `sums` in the order of the chunks, or instead of what was
// there.
template <typename T>
CAPS_INLINE void add_chunks(const Layout<T>& l, int64_t tile, int64_t j, bool add, T* sums) {
  constexpr int lanes = kLanes<T>;
  const int64_t end = l.E * lanes, chunks = l.a.chunks;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const T* part = l.partial(chunk, tile) + j * end;
    for (int64_t n = 0; n < end; n += lanes) {
      const auto x = load<Vec<T>>(part + n);
      store(sums + n, chunk > 0 || add ? load<Vec<T>>(sums + n) + x : x);
    }
  }
}

template <typename T>
void finish_iteration(const Layout<T>& l, int64_t tile, int64_t j) {
  constexpr int lanes = kLanes<T>;
  const DenseArgs& a = l.a;
  const int64_t end = l.E * lanes, at = j * end;
  T *s = l.s(0, tile) + at, *v = l.total(tile) + at, *V = l.V(0, tile) + at;
  add_chunks(l, tile, j, false, s);
  if (a.bias.data) {
    dispatch_floating(a.dtype, [&]<typename scalar_t>() {
      if constexpr (std::is_same_v<Acc<scalar_t>, T>) {
        const auto* bias = static_cast<const scalar_t*>(a.bias.data) + j * a.bias.stride[0];
        for (int64_t e = 0; e < l.E; ++e) {
          store(s + e * lanes, load<Vec<T>>(s + e * lanes) + load_one(bias + e * a.bias.stride[1]));
        }
      }
    });
  }
  squash_lanes(s, l.E, v);
  for (int64_t n = 0; n < end; n += lanes) {
    store(V + n, a.t == 0 ? load<Vec<T>>(v + n) : load<Vec<T>>(V + n) + load<Vec<T>>(v + n));
  }
  unpack(Layout<T>::sums_dtype, l.s_view(a.t), tile, j, 1, s);
  if (a.t == a.iterations - 1) unpack(a.dtype, a.v, tile, j, 1, v);
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
void finish_backward(const Layout<T>& l, int64_t tile, int64_t j) {
  const int64_t t = l.a.t, at = j * l.E * kLanes<T>;
  T* total = l.total(tile) + at;
  add_chunks(l, tile, j, t < l.a.iterations - 1, total);
  squash_lanes_backward(total, l.s(t - 1, tile) + at, l.E, l.g(t - 1, tile) + at);
}

// The vectors whose weighted sum gû of a tile and parent is, side by side: read in as many streams as there are, they
// come late.
template <typename T>
void gather_basis(const Layout<T>& l, int64_t tile, int64_t j) {
  constexpr int lanes = kLanes<T>;
  T* to = l.basis(tile, j);
  const auto add = [&](const T* from) __attribute__((always_inline)) {
    store(to, load<Vec<T>>(from));
    to += lanes;
  };
  for (int64_t at = j * l.E * lanes; at < (j + 1) * l.E * lanes; at += lanes) {
    add(l.g(0, tile) + at);
    for (int64_t t = 1; t < l.a.iterations; ++t) {
      add(l.g(t, tile) + at);
      add(l.V(t - 1, tile) + at);
    }
  }
}

// The last pass over a few lower capsules.
template <typename T>
class Gradients {
  static constexpr int lanes = kLanes<T>;
  using V = Vec<T>;

 public:
  explicit Gradients(const Layout<T>& layout)
      : l_(layout),
        a_(layout.a),
        weights_(a_.dtype, a_.weight, a_.positions),
        group_(min_of(a_.tiles, kGroup)),
        first_(a_.last_only ? a_.iterations - 1 : 0),
        matrices_(l_.J * l_.D * l_.E),
        uniform_(l_.uniform()),
        in_place_(a_.keep && a_.quad_tiles == 0) {
    const int64_t own = in_place_ ? 0 : 2 * (a_.iterations - 1) * group_ * kShared * l_.row;
    const int64_t packed = a_.u_tiles ? 0 : kShared * group_ * l_.D * lanes;
    const int64_t sizes[] = {kShared * group_ * l_.D * lanes,      packed,
                             kShared * group_ * l_.E * lanes,      own,
                             (kShared * matrices_ + 15) / 16 * 16, (l_.D * l_.E + 15) / 16 * 16,
                             weights_.copy_size(kShared)};
    int64_t size = 0;
    for (int64_t n : sizes) size += n;
    T* memory = static_cast<T*>(scratch(Scratch::chunk, size * int64_t(sizeof(T))));
    grad_u_ = memory;
    packed_ = grad_u_ + sizes[0];
    grad_votes_ = packed_ + sizes[1];
    own_ = grad_votes_ + sizes[2];
    grad_weight_ = own_ + sizes[3];
    room_ = grad_weight_ + sizes[4];
    weights_.use_memory(room_ + sizes[5]);
  }

  // Task n: kShared types of one position each, or `part` positions of one type.
  void run(int64_t task) {
    const int64_t P = a_.positions, part = task % a_.parts;
    const int64_t t0 = P == 1 ? task * kShared : task / a_.parts;
    const int64_t types = P == 1 ? min_of(a_.types - t0, kShared) : 1;
    const int64_t i0 = t0 * P + part * a_.part, i1 = P == 1 ? i0 + types : t0 * P + min_of((part + 1) * a_.part, P);
    // Sums are taken in the result itself where it is of their type.
    const bool direct = !a_.weight_parts && a_.dtype == Layout<T>::sums_dtype;
    T* sums = direct            ? static_cast<T*>(a_.grad_weight.data) + t0 * matrices_
              : a_.weight_parts ? static_cast<T*>(a_.weight_parts) + task * matrices_
                                : grad_weight_;
    for (int64_t i = i0; i < i1; i += kShared) {
      const int64_t count = min_of(i1 - i, kShared);
      weights_.prepare(i, i + count);
      for (int64_t tile = 0; tile < a_.tiles; tile += group_) {
        const bool once = P == 1 && a_.tiles <= kPair && direct && a_.stream;
        const Write how = tile > 0 || (P > 1 && i > i0) ? Write::add : once ? Write::stream : Write::set;
        capsules(i, count, tile, min_of(a_.tiles - tile, group_), sums, how);
      }
    }
    for (int64_t t = 0; !direct && !a_.weight_parts && t < types; ++t)
      write_weight(l_, t0 + t, grad_weight_ + t * matrices_);
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
  void capsules(int64_t i, int64_t count, int64_t tile0, int64_t tiles, T* sums, Write how) {
    for (int64_t n = 0; n < count * group_ * l_.D * lanes; ++n) grad_u_[n] = 0;
    const Packed<T> u(l_, tile0, tiles, i, count, packed_);
    if (!a_.keep) compute_coefficients(u, i, count, tile0, tiles);
    else if (!in_place_) copy_coefficients(i, count, tile0, tiles);
    // gû: [count][tiles][E]
    const int64_t step = l_.E * lanes, u_step = l_.D * lanes, matrix = l_.D * l_.E, by = parents_ahead<T>(l_.z);
    for (int64_t j = 0; j < l_.J; ++j) {
      for (int64_t k = 0; k < count; ++k) prefetch_weights(weights_, l_.z, i + k, i + k + kShared, j + by);
      for (int64_t tile = 0; tile < tiles; tile += kPair) {
        const int64_t some = min_of(tiles - tile, kPair);
        T* grad_votes = grad_votes_ + tile * step;
        for (int64_t n = 0; n < some; ++n) {
          for_blocks<kVotes / 4>(count, [&](auto block, int64_t k) __attribute__((always_inline)) {
            votes_gradient<decltype(block)::size>(i, k, j, tile0, tile + n, grad_votes + (k * tiles + n) * step,
                                                  tiles * step);
          });
        }
        for (int64_t k = 0; k < count; ++k) {
          for_pair(some, [&](auto pair) __attribute__((always_inline)) {
            add_input_gradient<decltype(pair)::size>(grad_votes + k * tiles * step, step, weights_(i + k) + j * matrix,
                                                     l_.D, l_.E, grad_u_ + (tile * count + k) * u_step, count * u_step);
          });
        }
      }
      for (int64_t k = 0; k < count; ++k) {
        // Positions of one type add to the same matrices.
        const bool shared = a_.positions > 1;
        T* out = sums + (shared ? 0 : k * matrices_) + j * matrix;
        const T *uk = u.u + k * u_step, *gk = grad_votes_ + k * tiles * step;
        const Write now = shared && k > 0 ? Write::add : how;
        if (tiles <= kPair) weight_gradient_of_few(uk, u.step, gk, step, tiles, l_.D, l_.E, out, now, room_);
        else weight_gradient_of_many(uk, u.step, gk, step, tiles, l_.D, l_.E, out, now);
      }
    }
    for (int64_t tile = 0; tile < tiles; ++tile) {
      unpack(a_.dtype, a_.grad_u, tile0 + tile, i, count, grad_u_ + tile * count * u_step, a_.stream_u);
    }
  }

  // Room for c (which = 0) and gb (1) of iteration t where they were not kept, or by quads.
  T* own(int64_t t, int64_t which, int64_t tile) const {
    return own_ + ((2 * (t - 1) + which) * group_ + tile) * kShared * l_.row;
  }

  void copy_coefficients(int64_t i, int64_t count, int64_t tile0, int64_t tiles) {
    const Quads<T> quads(a_);
    for (int64_t t = first_ > 0 ? first_ : 1; t < a_.iterations; ++t) {
      for (int64_t which = 0; which < (a_.last_only ? 1 : 2); ++which) {
        for (int64_t n = 0; n < tiles; ++n) {
          coefficients_from_quads(quads, 2 * (t - 1) + which, tile0 + n, i, count, own(t, which, n));
        }
      }
    }
  }

  // û is made once for two iterations.
  void compute_coefficients(const Packed<T>& u, int64_t i, int64_t count, int64_t tile0, int64_t tiles) {
    const int64_t begin = first_ > 0 ? first_ : 1;
    for_routed(a_, tiles, [&](auto block, int64_t n) __attribute__((always_inline)) {
      for_blocks<2>(
          a_.iterations,
          [&](auto rounds, int64_t t) __attribute__((always_inline)) {
            coefficients_of_rounds<decltype(rounds)::size, decltype(block)::size>(u.u + n * u.step, u.step, i, count, t,
                                                                                  tile0, n);
          },
          begin);
    });
  }

  template <int rounds, int tiles>
  void coefficients_of_rounds(const T* u, int64_t u_step, int64_t i, int64_t count, int64_t t, int64_t tile0,
                              int64_t n) {
    const int64_t step = kShared * l_.row;
    const T *Vt[rounds], *g[rounds];
    T *c[rounds], *gb[rounds];
    for (int m = 0; m < rounds; ++m) {
      Vt[m] = l_.V(t + m - 1, tile0 + n);
      g[m] = l_.g(t + m, tile0 + n);
      c[m] = own(t + m, 0, n);
      gb[m] = own(t + m, 1, n);
    }
    dots_of_rounds<rounds, tiles>(u, u_step, weights_, i, count, l_.z, Vt, g, c, gb, step);
    for (int m = 0; m < rounds; ++m) {
      for (int k = 0; k < tiles; ++k) {
        softmax(c[m] + k * step, l_.J, l_.z.leaky, count);
        softmax_backward(c[m] + k * step, gb[m] + k * step, l_.J, count);
      }
    }
  }

  // gû [E] of lower capsules i + k … i + k + n - 1 and parent j, over iterations first_ … R - 1, to places out_step
  // apart. The usual numbers of iterations keep their coefficients in registers.
  template <int n>
  void votes_gradient(int64_t i, int64_t k, int64_t j, int64_t tile0, int64_t tile, T* out, int64_t out_step) const {
    const int64_t routed = a_.iterations - (first_ > 0 ? first_ : 1);
    if (first_ == 0 && routed == 2) return some_iterations<n, 2, true, true>(1, i, k, j, tile0, tile, out, out_step);
    if (first_ == 0 && routed == 1) return some_iterations<n, 1, true, true>(1, i, k, j, tile0, tile, out, out_step);
    if (first_ == 0) some_iterations<n, 0, true, true>(1, i, k, j, tile0, tile, out, out_step);
    for (int64_t t = first_ > 0 ? first_ : 1; t < a_.iterations; ++t) {
      if (a_.last_only) some_iterations<n, 1, true, false>(t, i, k, j, tile0, tile, out, out_step);
      else some_iterations<n, 1, false, true>(t, i, k, j, tile0, tile, out, out_step);
    }
  }

  // Iterations t … t + count - 1. begin: also set `out`, with iteration 0 unless couplings are constants (not full).
  template <int n, int count, bool begin, bool full>
  CAPS_INLINE void some_iterations(int64_t t, int64_t i, int64_t k, int64_t j, int64_t tile0, int64_t in_group, T* out,
                                   int64_t out_step) const {
    const int64_t tile = tile0 + in_group, row = l_.row, width = (2 * a_.iterations - 1) * lanes;
    V c[count + 1][n], gb[count + 1][n];
#pragma GCC unroll 2
    for (int m = 0; m < count; ++m) {
      const T* c_row = (in_place_ ? l_.c(t + m, tile, i + k) : own(t + m, 0, in_group) + k * row) + j * lanes;
      const T* gb_row = (in_place_ ? l_.gb(t + m, tile, i + k) : own(t + m, 1, in_group) + k * row) + j * lanes;
#pragma GCC unroll 4
      for (int q = 0; q < n; ++q) {
        c[m][q] = load<V>(c_row + q * row);
        gb[m][q] = load<V>(gb_row + q * row);
        if (!in_place_) continue;
        // Those of the next group of capsules: too many streams for the processor to see them coming.
        __builtin_prefetch(c_row + (kShared + q) * row, 0, 2);
        __builtin_prefetch(gb_row + (kShared + q) * row, 0, 2);
      }
    }
    const T c0 = uniform_, *g0 = l_.basis(tile, j), *basis = g0 + (2 * t - 1) * lanes;
    const int64_t end = l_.E * lanes;
    for (int64_t e = 0; e < end; e += lanes, g0 += width, basis += width) {
      const V first = begin && full ? c0 * load<V>(g0) : V{};
      V sums[n];
#pragma GCC unroll 4
      for (int q = 0; q < n; ++q) sums[q] = begin ? first : load<V>(out + q * out_step + e);
#pragma GCC unroll 2
      for (int m = 0; m < count; ++m) {
        const V g = load<V>(basis + 2 * m * lanes), Vm = full ? load<V>(basis + (2 * m + 1) * lanes) : V{};
#pragma GCC unroll 4
        for (int q = 0; q < n; ++q) {
          sums[q] += c[m][q] * g;
          if constexpr (full) sums[q] += gb[m][q] * Vm;
        }
      }
#pragma GCC unroll 4
      for (int q = 0; q < n; ++q) store(out + q * out_step + e, sums[q]);
    }
  }

  const Layout<T>& l_;
  const DenseArgs& a_;
  Weights<T> weights_;
  int64_t group_, first_, matrices_;
  T uniform_;
  bool in_place_;  // the coefficients are those kept by passes over tiles
  T *grad_u_, *packed_, *grad_votes_, *own_, *grad_weight_, *room_;
};

}  // namespace
}  // namespace caps::CAPS_ISA
