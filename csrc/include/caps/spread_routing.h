// Passes over the lower capsules of one tile whose votes lie in quads: û of the tile's samples, kQuad numbers of E of a
// few samples in each vector. So a read of W serves kQuad vectors, and one lower capsule at a time is enough, whose û
// then stays in the innermost cache with V, g and the sums. Only for code compiled with CAPS_ISA.
//
// What a tile holds as kQuad vectors of a number each, [lanes], these passes want as kQuad vectors of kQuad numbers of
// every kQuad-th sample: the vectors of `spread` are those squares of numbers transposed within each quad of lanes. So
// arrays [J·E] keep their size, and dot products come out with a sample in each lane as they do from tiles.
#pragma once

#include <caps/quad_routing.h>

namespace caps::CAPS_ISA {

// Other vectors come with too few registers.
template <typename T>
constexpr bool kCanSpread = sizeof(Vec<T>) == 64;

// `size` numbers from a tile's order to that of these passes, or back. `from` may be `to`.
template <typename T>
CAPS_INLINE void spread(const T* from, int64_t size, T* to) {
  constexpr int lanes = kLanes<T>, quad = kQuad<T>;
  constexpr auto sequence = std::make_integer_sequence<int, lanes>();
  for (int64_t at = 0; at < size; at += quad * lanes) {
    Vec<T> rows[quad];
    CAPS_UNROLL
    for (int k = 0; k < quad; ++k) rows[k] = load<Vec<T>>(from + at + k * lanes);
    transpose_quads<T>(rows, sequence);
    CAPS_UNROLL
    for (int k = 0; k < quad; ++k) store(to + at + k * lanes, rows[k]);
  }
}

// Each number of u [D] of a lower capsule as kQuad vectors, in all lanes of its sample's quad.
template <typename T>
CAPS_INLINE void spread_input(const T* u, int64_t D, T* x) {
  constexpr int lanes = kLanes<T>, quad = kQuad<T>;
  for (int64_t d = 0; d < D; ++d, x += quad * lanes) {
    Vec<T> picked[quad];
    pick_each<T>(load<Vec<T>>(u + d * lanes), picked, std::make_integer_sequence<int, quad>());
    CAPS_UNROLL
    for (int k = 0; k < quad; ++k) store(x + k * lanes, picked[k]);
  }
}

// û [J·E] of lower capsule i, its dot products [J] with V and, in backward, with g. kept: as for votes_and_dots.
template <bool backward, typename T>
CAPS_INLINE void spread_votes_and_dots(const T* x, const Weights<T>& weights, int64_t i, Sizes z, const T* V_,
                                       const T* g, T* votes, T* with_V, T* with_g, bool kept) {
  using V = Vec<T>;
  constexpr int lanes = kLanes<T>, quad = kQuad<T>;
  const int64_t D = z.in_dim, E = z.out_dim, J = z.out_capsules, by = parents_ahead<T>(z);
  const T* matrix = weights(i);
  for (int64_t j = 0; j < J; ++j, matrix += D * E) {
    prefetch_weights(weights, z, i, i + 1, j + by);
    V dots[quad] = {}, gradient_dots[quad] = {};
    for_blocks<4>(E / quad, [&](auto block, int64_t q0) __attribute__((always_inline)) {
      constexpr int n = decltype(block)::size;
      const T *from = matrix + q0 * quad, *xd = x;
      V row[n * quad] = {};
#pragma GCC unroll 1
      for (int64_t d = 0; d < D; ++d, from += E, xd += quad * lanes) {
        V factor[quad];
        CAPS_UNROLL
        for (int k = 0; k < quad; ++k) factor[k] = load<V>(xd + k * lanes);
        CAPS_UNROLL
        for (int q = 0; q < n; ++q) {
          const V w = repeat<T>(load<QuadVec<T>>(from + q * quad));
          CAPS_UNROLL
          for (int k = 0; k < quad; ++k) row[q * quad + k] += factor[k] * w;
        }
      }
      const int64_t at = (j * E + q0 * quad) * lanes;
      CAPS_UNROLL
      for (int m = 0; m < n * quad; ++m) {
        store(votes + at + m * lanes, row[m]);
        dots[m % quad] += row[m] * load<V>(V_ + at + m * lanes);
        if constexpr (backward) gradient_dots[m % quad] += row[m] * load<V>(g + at + m * lanes);
      }
    });
    const auto sum = [](const V* rows) __attribute__((always_inline)) {
      return sums_of_rows<V, quad>([&](int64_t k) __attribute__((always_inline)) { return rows[k]; });
    };
    store(with_V + j * lanes, sum(dots));
    if constexpr (backward) store(with_g + j * lanes, sum(gradient_dots));
    if (kept) {
      __builtin_prefetch(with_V + (J + j) * lanes, 1);
      if constexpr (backward) __builtin_prefetch(with_g + (J + j) * lanes, 1);
    }
  }
}

// sums [J·E] += factors [J] · votes [J·E]
template <typename T>
CAPS_INLINE void add_weighted_spread(const T* votes, const T* factors, Sizes z, T* sums) {
  using V = Vec<T>;
  constexpr int lanes = kLanes<T>, quad = kQuad<T>;
  const int64_t size = z.out_dim * lanes;
  for (int64_t j = 0; j < z.out_capsules; ++j, votes += size, sums += size) {
    V factor[quad];
    pick_each<T>(load<V>(factors + j * lanes), factor, std::make_integer_sequence<int, quad>());
    for (int64_t at = 0; at < size; at += quad * lanes) {
      CAPS_UNROLL
      for (int k = 0; k < quad; ++k) {
        const int64_t here = at + k * lanes;
        store(sums + here, load<V>(sums + here) + factor[k] * load<V>(votes + here));
      }
    }
  }
}

// Numbers of scratch that route_spread needs.
template <typename T>
CAPS_INLINE int64_t spread_scratch(Sizes z, bool backward) {
  return ((backward ? 3 : 2) * z.out_capsules * z.out_dim + 2 * z.out_capsules + kQuad<T> * z.in_dim) * kLanes<T>;
}

// The same as `route`, for one tile and E in whole quads, with arrays in a tile's order; `sums` are those of these
// lower capsules alone, zero at first. Not kept are c and gb where they are null.
template <bool backward, typename T>
void route_spread(const T* u, const Weights<T>& weights, Sizes z, int64_t first, int64_t last, const T* V, const T* g,
                  T* sums, T* memory, T* c, T* gb) {
  constexpr int lanes = kLanes<T>;
  const int64_t row = z.out_capsules * lanes, size = row * z.out_dim;
  const bool kept = c != nullptr;
  T *votes = memory, *own_V = votes + size, *own_g = own_V + size, *x = own_g + (backward ? size : 0);
  if (!kept) c = x + kQuad<T> * z.in_dim * lanes, gb = c + row;
  spread(V, size, own_V);
  if constexpr (backward) spread(g, size, own_g);
  for (int64_t i = first; i < last; ++i, u += z.in_dim * lanes) {
    spread_input(u, z.in_dim, x);
    spread_votes_and_dots<backward>(x, weights, i, z, own_V, own_g, votes, c, gb, kept);
    softmax(c, z.out_capsules, z.leaky);
    if constexpr (backward) softmax_backward(c, gb, z.out_capsules);
    if (sums) add_weighted_spread(votes, backward ? gb : c, z, sums);
    if (kept) c += row, gb += backward ? row : 0;
  }
  if (sums) spread(sums, size, sums);
}

}  // namespace caps::CAPS_ISA
