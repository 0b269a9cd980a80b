// Quads: four numbers of E of each of a few samples side by side in the SIMD lanes, û kept in memory. Few enough
// samples that their û stays in a cache, and yet enough to share one read of W.
//
// A vote is `quads_of` vectors of [kQuadSamples][kQuad], zeros behind E. Lower capsules are taken kQuad at a time, a
// block, so that the logits of a block lie in the same lanes, [J] vectors of [kQuadSamples][kQuad]. The votes of a
// block are [J][kQuad], which a pass reads in order; those of lower capsules beyond the last are 0.
//
// Only for code compiled with CAPS_ISA.
#pragma once

#include <caps/tile_routing.h>

namespace caps::CAPS_ISA {

template <typename T>
constexpr int kQuad = kLanes<T> < 4 ? kLanes<T> : 4;
template <typename T>
constexpr int kQuadSamples = kLanes<T> / kQuad<T>;
constexpr int kQuadBlocks = 2;  // blocks whose softmax a routing pass takes at once

template <typename T>
using QuadVec = Vec<T, kQuad<T>>;

template <typename T>
CAPS_INLINE int64_t quads_of(int64_t E) {
  return (E + kQuad<T> - 1) / kQuad<T>;
}

// The same numbers for every sample.
template <typename T>
CAPS_INLINE Vec<T> repeat(QuadVec<T> x) {
  if constexpr (kQuadSamples<T> == 1) {
    return bit_cast<Vec<T>>(x);
  } else {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_broadcast_f32x4((__m128)x);
    else return (Vec<T>)_mm512_broadcast_f64x4((__m256d)x);
#elif defined(__AVX2__)
    return (Vec<T>)_mm256_set_m128((__m128)x, (__m128)x);
#endif
  }
}

// Number k of each sample, in all of its lanes.
template <typename T, int k, int... e>
CAPS_INLINE Vec<T> pick(Vec<T> x, std::integer_sequence<int, e...>) {
  return __builtin_shufflevector(x, x, (e / kQuad<T> * kQuad<T> + k)...);
}

template <typename T, int... k>
CAPS_INLINE void pick_each(Vec<T> x, Vec<T>* picked, std::integer_sequence<int, k...>) {
  ((picked[k] = pick<T, k>(x, std::make_integer_sequence<int, kLanes<T>>())), ...);
}

// x with the numbers of sample `sample` exchanged for those given.
template <typename T, int sample, int... e>
CAPS_INLINE Vec<T> place(Vec<T> x, QuadVec<T> numbers, std::integer_sequence<int, e...>) {
  return __builtin_shufflevector(x, repeat<T>(numbers), (e / kQuad<T> == sample ? kLanes<T> + e : e)...);
}

template <typename T, int... sample>
CAPS_INLINE Vec<T> quads_of_samples(const QuadVec<T>* numbers, std::integer_sequence<int, sample...>) {
  Vec<T> x = repeat<T>(numbers[0]);
  ((x = place<T, sample>(x, numbers[sample], std::make_integer_sequence<int, kLanes<T>>())), ...);
  return x;
}

// The sum over a sample's lanes, in all of them.
template <int h = 1, typename T, int... e>
CAPS_INLINE Vec<T> sum_of_quad(Vec<T> x, std::integer_sequence<int, e...> lanes) {
  if constexpr (h == kQuad<T>) return x;
  else return sum_of_quad<2 * h, T>(x + __builtin_shufflevector(x, x, (e ^ h)...), lanes);
}

template <typename T>
CAPS_INLINE Vec<T> sum_of_quad(Vec<T> x) {
  return sum_of_quad<1, T>(x, std::make_integer_sequence<int, kLanes<T>>());
}

// Number e of quad q of rows[k] becomes number k of quad q of rows[e], for kQuad rows.
template <typename T, int... e>
CAPS_INLINE void transpose_quads(Vec<T>* rows, std::integer_sequence<int, e...> lanes) {
  constexpr int n = kQuad<T>;
  CAPS_UNROLL
  for (int h = 1; h < n; h *= 2) {
    CAPS_UNROLL
    for (int i = 0; i < n; ++i) {
      if (i & h) continue;
      if (h == 1) exchange<1>(rows[i], rows[i | h], lanes);
      else exchange<2>(rows[i], rows[i | h], lanes);
    }
  }
}

// Between quad tiles and tiles: from vectors [kQuadSamples][kQuad] of the kQuad quad tiles of a tile to the kQuad
// vectors of a number each, in whose lanes lie all samples of the tile.
template <typename T, int... e>
CAPS_INLINE void quads_to_lanes(Vec<T>* rows, std::integer_sequence<int, e...> lanes) {
  constexpr int n = kQuad<T>, samples = kQuadSamples<T>;
  transpose_quads<T>(rows, lanes);
  CAPS_UNROLL
  for (int i = 0; i < n; ++i) rows[i] = __builtin_shufflevector(rows[i], rows[i], (e % samples * n + e / samples)...);
}

// û of up to kQuad lower capsules from i on for neighbouring quad tiles, whose û lie votes_step and sums sums_step
// numbers apart; with `sum` adds the votes to the sums too. x: u_d of each tile in all lanes of its sample, a vector
// after the other, [count][D] of x_step numbers.
template <int tiles, bool sum, typename T>
CAPS_NOINLINE void predict_quads(const T* x, int64_t x_step, const Weights<T>& weights, int64_t i, int64_t count,
                                 Sizes z, T* votes, int64_t votes_step, T* sums, int64_t sums_step) {
  using V = Vec<T>;
  constexpr int lanes = kLanes<T>, quad = kQuad<T>, most = tiles == 4 ? 2 : 4;
  const int64_t D = z.in_dim, E = z.out_dim, quads = quads_of<T>(E), matrix = D * E;
  const T *matrices[quad], *ahead[quad];
  for (int64_t m = 0; m < count; ++m) {
    matrices[m] = weights(i + m);
    ahead[m] = weights.ahead(i + count + m);
  }
  for (int64_t j = 0; j < z.out_capsules; ++j) {
    for (int64_t m = 0; m < count; ++m) prefetch(ahead[m], j * matrix, matrix);
    const auto some = [&](auto block, int64_t q0, auto whole) __attribute__((always_inline)) {
      constexpr int n = decltype(block)::size;
      T *out = votes + (j * quad * quads + q0) * lanes, *to = sums + (j * quads + q0) * lanes;
      const T* xd = x;
      V total[tiles * n];
      CAPS_UNROLL
      for (int k = 0; k < tiles * n; ++k) {
        total[k] = sum ? load<V>(to + k / n * sums_step + k % n * lanes) : V{};
      }
      // Unrolled, the addresses of a block alone take more registers than there are.
#pragma GCC unroll 1
      for (int64_t m = 0; m < count; ++m, out += quads * lanes) {
        const T* from = matrices[m] + j * matrix + q0 * quad;
        V row[tiles * n] = {};
#pragma GCC unroll 1
        for (int64_t d = 0; d < D; ++d, xd += x_step, from += E) {
          V factor[tiles];
          CAPS_UNROLL
          for (int k = 0; k < tiles; ++k) factor[k] = in_register(load<V>(xd + k * lanes));
          CAPS_UNROLL
          for (int q = 0; q < n; ++q) {
            const V w = repeat<T>(whole ? load<QuadVec<T>>(from + q * quad) : load_some<QuadVec<T>>(from, E % quad));
            CAPS_UNROLL
            for (int k = 0; k < tiles; ++k) row[k * n + q] += factor[k] * w;
          }
        }
        CAPS_UNROLL
        for (int k = 0; k < tiles; ++k) {
          T* to_tile = out + k * votes_step;
          CAPS_UNROLL
          for (int q = 0; q < n; ++q) {
            store(to_tile + q * lanes, row[k * n + q]);
            if constexpr (sum) total[k * n + q] += row[k * n + q];
          }
        }
      }
      CAPS_UNROLL
      for (int k = 0; k < tiles * n && sum; ++k) store(to + k / n * sums_step + k % n * lanes, total[k]);
    };
    for_blocks<most>(E / quad,
                     [&](auto block, int64_t q0) __attribute__((always_inline)) { some(block, q0, std::true_type()); });
    if (E % quad != 0) some(Block<1>(), E / quad, std::false_type());
  }
}

// The dot products of a block's votes with V and, in backward, with g, for every parent.
template <bool backward, typename T>
CAPS_INLINE void quad_dots(const T* votes, Sizes z, const T* V_, const T* g, T* with_V, T* with_g) {
  using V = Vec<T>;
  constexpr int lanes = kLanes<T>, quad = kQuad<T>;
  const int64_t width = quads_of<T>(z.out_dim) * lanes;
  for (int64_t j = 0; j < z.out_capsules; ++j, votes += quad * width, V_ += width, g += backward ? width : 0) {
    V dots[quad] = {}, gradient_dots[quad] = {};
    for_blocks<4>(width / lanes, [&](auto block, int64_t q0) __attribute__((always_inline)) {
      constexpr int n = decltype(block)::size;
      CAPS_UNROLL
      for (int q = 0; q < n; ++q) {
        const int64_t at = (q0 + q) * lanes;
        const V along = load<V>(V_ + at), across = backward ? load<V>(g + at) : V{};
        CAPS_UNROLL
        for (int k = 0; k < quad; ++k) {
          const V vote = load<V>(votes + k * width + at);
          dots[k] += vote * along;
          if constexpr (backward) gradient_dots[k] += vote * across;
        }
      }
    });
    const auto sum = [](const V* rows) __attribute__((always_inline)) {
      return sums_of_rows<V, quad>([&](int64_t k) __attribute__((always_inline)) { return rows[k]; });
    };
    store(with_V + j * lanes, sum(dots));
    if constexpr (backward) store(with_g + j * lanes, sum(gradient_dots));
  }
}

// sums [J] += Σ_k factors_k [J] · votes_k [J] over a block.
template <typename T>
CAPS_INLINE void add_weighted_quads(const T* votes, const T* factors, Sizes z, T* sums) {
  using V = Vec<T>;
  constexpr int lanes = kLanes<T>, quad = kQuad<T>;
  const int64_t width = quads_of<T>(z.out_dim) * lanes;
  for (int64_t j = 0; j < z.out_capsules; ++j, votes += quad * width, sums += width) {
    V factor[quad];
    pick_each<T>(load<V>(factors + j * lanes), factor, std::make_integer_sequence<int, quad>());
    for_blocks<4>(width / lanes, [&](auto block, int64_t q0) __attribute__((always_inline)) {
      constexpr int n = decltype(block)::size;
      const int64_t at = q0 * lanes;
      V total[n];
      CAPS_UNROLL
      for (int q = 0; q < n; ++q) total[q] = load<V>(sums + at + q * lanes);
      CAPS_UNROLL
      for (int k = 0; k < quad; ++k) {
        CAPS_UNROLL
        for (int q = 0; q < n; ++q) total[q] += factor[k] * load<V>(votes + k * width + at + q * lanes);
      }
      CAPS_UNROLL
      for (int q = 0; q < n; ++q) store(sums + at + q * lanes, total[q]);
    });
  }
}

// One iteration over `blocks` blocks of one quad tile; the same as `route` of tiles. c, gb: [blocks][J] vectors.
template <bool backward, typename T>
CAPS_INLINE void route_quads(const T* votes, int64_t blocks, Sizes z, const T* V, const T* g, T* sums, T* c, T* gb) {
  const int64_t row = z.out_capsules * kLanes<T>, size = kQuad<T> * row * quads_of<T>(z.out_dim);
  for (int64_t n = 0; n < blocks; ++n) {
    quad_dots<backward>(votes + n * size, z, V, g, c + n * row, backward ? gb + n * row : nullptr);
  }
  softmax(c, z.out_capsules, z.leaky, blocks);
  if constexpr (backward) softmax_backward(c, gb, z.out_capsules, blocks);
  for (int64_t n = 0; n < blocks && sums; ++n) {
    add_weighted_quads(votes + n * size, (backward ? gb : c) + n * row, z, sums);
  }
}

// One sample's vote as a row [E], and back; behind E come zeros.
template <typename T>
CAPS_INLINE void row_from_quads(const T* quads, int64_t sample, int64_t E, T* row) {
  for (int64_t e = 0; e < E; ++e) row[e] = quads[e / kQuad<T> * kLanes<T> + sample * kQuad<T> + e % kQuad<T>];
}

template <typename T>
CAPS_INLINE void quads_from_row(const T* row, int64_t sample, int64_t E, T* quads) {
  for (int64_t e = 0; e < quads_of<T>(E) * kQuad<T>; ++e) {
    quads[e / kQuad<T> * kLanes<T> + sample * kQuad<T> + e % kQuad<T>] = e < E ? row[e] : T(0);
  }
}

// v from s, one parent of a quad tile. room: [2][E].
template <typename T>
void squash_quads(const T* s, int64_t E, T* v, T* room) {
  using V = Vec<T>;
  constexpr int lanes = kLanes<T>;
  const int64_t end = quads_of<T>(E) * lanes;
  V squares{};
  for (int64_t n = 0; n < end; n += lanes) squares += load<V>(s + n) * load<V>(s + n);
  const V square = sum_of_quad<T>(squares), factor = squash_factor(square);
  for (int64_t n = 0; n < end; n += lanes) store(v + n, factor * load<V>(s + n));
  const auto plain = plain_scale(square);
  for (int sample = 0; sample < kQuadSamples<T>; ++sample) {
    if (plain[sample * kQuad<T>]) continue;
    row_from_quads(s, sample, E, room);
    squash_any(room, 1, room + E, 1, E);
    quads_from_row(room + E, sample, E, v);
  }
}

// grad_s from grad_v and s; grad_s may not be one of them. room: [3][E].
template <typename T>
void squash_quads_backward(const T* grad_v, const T* s, int64_t E, T* grad_s, T* room) {
  using V = Vec<T>;
  constexpr int lanes = kLanes<T>;
  const int64_t end = quads_of<T>(E) * lanes;
  V squares{}, dots{};
  for (int64_t n = 0; n < end; n += lanes) {
    const V x = load<V>(s + n);
    squares += x * x;
    dots += x * load<V>(grad_v + n);
  }
  const V square = sum_of_quad<T>(squares);
  const auto [across, along] = squash_gradient(square);
  const V along_dot = along * sum_of_quad<T>(dots);
  for (int64_t n = 0; n < end; n += lanes) {
    store(grad_s + n, across * load<V>(grad_v + n) + along_dot * load<V>(s + n));
  }
  const auto plain = plain_scale(square);
  for (int sample = 0; sample < kQuadSamples<T>; ++sample) {
    if (plain[sample * kQuad<T>]) continue;
    row_from_quads(grad_v, sample, E, room);
    row_from_quads(s, sample, E, room + E);
    squash_any_backward(room, 1, room + E, 1, room + 2 * E, 1, E);
    quads_from_row(room + 2 * E, sample, E, grad_s);
  }
}

}  // namespace caps::CAPS_ISA
