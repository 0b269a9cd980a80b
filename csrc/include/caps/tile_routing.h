// Passes over the lower capsules of one tile. û is computed in registers and never leaves the innermost cache.
// Only for code compiled with CAPS_ISA.
#pragma once

#include <caps/dense.h>
#include <caps/softmax.h>
#include <caps/tile.h>

namespace caps::CAPS_ISA {

struct Sizes {
  int64_t in_capsules, out_capsules, in_dim, out_dim;
  bool leaky;
};

constexpr int kVotes = sizeof(Vec<float>) == 64 ? 16 : 8;  // sums of votes held in registers at once
constexpr int kWays = kVotes / 8;                          // sums into which a dot product is split
constexpr int kShared = 4;                                 // lower capsules that share one load and store of the sums

template <int n>
struct Block {
  static constexpr int size = n;
};

// Calls f(Block<n>(), offset) with blocks of n = most, then of smaller powers of two, until `size` is covered.
template <int most, typename F>
CAPS_INLINE void for_blocks(int64_t size, const F& f, int64_t at = 0) {
  for (; at + most <= size; at += most) f(Block<most>(), at);
  if constexpr (most > 1) {
    if (at < size) for_blocks<most / 2>(size, f, at);
  }
}

// Calls f(Block<n>(), e) for blocks of n numbers of E, whose votes of `tiles` tiles are summed in registers at once. Of
// 16 registers two tiles take 12 for the sums: with 8, an addition waits for the one before it. Blocks are as few as
// can be, and none of fewer than 4 where E allows.
template <int tiles, typename F>
CAPS_INLINE void for_sums(int64_t E, const F& f) {
  if constexpr (kVectorBytes == 32 && tiles == 2) {
    constexpr int8_t next[] = {0, 1, 2, 2, 4, 5, 6, 4, 4, 5, 5, 6, 6, 5};
    for (int64_t e = 0, n; e < E; e += n) {
      n = E - e < int64_t(sizeof(next)) ? next[E - e] : 6;
      switch (n) {
        case 6: f(Block<6>(), e); break;
        case 5: f(Block<5>(), e); break;
        case 4: f(Block<4>(), e); break;
        case 2: f(Block<2>(), e); break;
        default: f(Block<1>(), e);
      }
    }
  } else {
    for_blocks<kVotes / tiles>(E, f);
  }
}

// Bytes of W of a lower capsule, rounded up to whole matrices, that are asked for before they are read. A few lower
// capsules are read side by side, parent by parent, so that what the processor foresees by itself comes late and ends
// at every page; and what is asked for too early leaves the innermost cache before its turn.
constexpr int64_t kAhead = 2048;

// The same in parents.
template <typename T>
CAPS_INLINE int64_t parents_ahead(Sizes z) {
  const int64_t matrix = z.in_dim * z.out_dim * int64_t(sizeof(T));
  return min_of(z.out_capsules, (kAhead + matrix - 1) / matrix);
}

// Asks for the matrix of lower capsule i and parent j, or behind the last parent for one of capsule `next`, which will
// take the place of i.
template <typename T>
CAPS_INLINE void prefetch_weights(const Weights<T>& weights, Sizes z, int64_t i, int64_t next, int64_t j) {
  const int64_t matrix = z.in_dim * z.out_dim, J = z.out_capsules;
  if (j < J) prefetch(weights.ahead(i), j * matrix, matrix);
  else prefetch(weights.ahead(next), (j - J) * matrix, matrix);
}

// sums [tiles][n] += Σ_d u_d W_de for n consecutive e; matrix rows are E numbers long, tiles of u u_step apart.
template <int n, int tiles, typename T>
CAPS_INLINE void add_votes(const T* u, int64_t u_step, const T* matrix, int64_t D, int64_t E, Vec<T>* sums) {
  for (int64_t d = 0; d < D; ++d) {
    Vec<T> x[tiles];
#pragma GCC unroll 4
    for (int k = 0; k < tiles; ++k) x[k] = load<Vec<T>>(u + k * u_step + d * kLanes<T>);
#pragma GCC unroll 16
    for (int e = 0; e < n; ++e) {
#pragma GCC unroll 4
      for (int k = 0; k < tiles; ++k) sums[k * n + e] += x[k] * matrix[d * E + e];
    }
  }
}

// s [tiles][J·E] += coupling · Σ_i û_i: the first iteration, in which all couplings are alike. u: of capsule `first`. A
// few lower capsules at a time, so that W is read in the order in which it lies in memory.
template <int tiles, typename T>
void route_uniformly(const T* u, int64_t u_step, const Weights<T>& weights, Sizes z, int64_t first, int64_t last,
                     T coupling, T* s) {
  constexpr int lanes = kLanes<T>;
  const int64_t size = z.out_capsules * z.out_dim * lanes, matrix = z.in_dim * z.out_dim, by = parents_ahead<T>(z);
  for (int64_t i = first; i < last; i += kShared) {
    const int64_t end = min_of(i + kShared, last);
    for (int64_t j = 0; j < z.out_capsules; ++j) {
      for (int64_t k = i; k < end; ++k) prefetch_weights(weights, z, k, k + kShared, j + by);
      for_sums<tiles>(z.out_dim, [&](auto block, int64_t e0) __attribute__((always_inline)) {
        constexpr int n = decltype(block)::size;
        Vec<T> sums[tiles * n] = {};
        for (int64_t k = i; k < end; ++k) {
          add_votes<n, tiles>(u + (k - first) * z.in_dim * lanes, u_step, weights(k) + j * matrix + e0, z.in_dim,
                              z.out_dim, sums);
        }
#pragma GCC unroll 4
        for (int k = 0; k < tiles; ++k) {
          T* out = s + k * size + (j * z.out_dim + e0) * lanes;
#pragma GCC unroll 16
          for (int e = 0; e < n; ++e)
            store(out + e * lanes, load<Vec<T>>(out + e * lanes) + coupling * sums[k * n + e]);
        }
      });
    }
  }
}

// û of `count` lower capsules from i on, [count][tiles][J·E], its dot products [J] with V and, in backward, with g:
// those of a tile lie dots_step numbers after those of the one before, those of a capsule after those of its neighbour.
// u: of capsule i. kept: the dot products go where nothing was written lately, those of the next `count` capsules
// behind them.
template <bool backward, int tiles, typename T>
CAPS_INLINE void votes_and_dots(const T* u, int64_t u_step, const Weights<T>& weights, int64_t i, int64_t count,
                                Sizes z, const T* V, const T* g, T* votes, T* with_V, T* with_g, int64_t dots_step,
                                bool kept) {
  constexpr int lanes = kLanes<T>;
  const int64_t row = z.out_capsules * lanes, size = row * z.out_dim, matrix = z.in_dim * z.out_dim;
  const int64_t by = parents_ahead<T>(z);
  for (int64_t j = 0; j < z.out_capsules; ++j) {
    for (int64_t m = 0; m < count; ++m) {
      prefetch_weights(weights, z, i + m, i + count + m, j + by);
      const T *um = u + m * z.in_dim * lanes, *matrices = weights(i + m) + j * matrix;
      T* out = votes + m * tiles * size;
      Vec<T> dots[tiles][2 * kWays] = {};
      for_sums<tiles>(z.out_dim, [&](auto block, int64_t e0) __attribute__((always_inline)) {
        constexpr int n = decltype(block)::size;
        Vec<T> sums[tiles * n] = {};
        add_votes<n, tiles>(um, u_step, matrices + e0, z.in_dim, z.out_dim, sums);
#pragma GCC unroll 4
        for (int k = 0; k < tiles; ++k) {
          const int64_t at = k * size + (j * z.out_dim + e0) * lanes;
#pragma GCC unroll 16
          for (int e = 0; e < n; ++e) {
            store(out + at + e * lanes, sums[k * n + e]);
            dots[k][e % kWays] += sums[k * n + e] * load<Vec<T>>(V + at + e * lanes);
            if constexpr (backward) dots[k][kWays + e % kWays] += sums[k * n + e] * load<Vec<T>>(g + at + e * lanes);
          }
        }
      });
#pragma GCC unroll 4
      for (int k = 0; k < tiles; ++k) {
        const int64_t at = k * dots_step + m * row + j * lanes;
        store(with_V + at, kWays > 1 ? dots[k][0] + dots[k][kWays - 1] : dots[k][0]);
        if constexpr (backward)
          store(with_g + at, kWays > 1 ? dots[k][kWays] + dots[k][2 * kWays - 1] : dots[k][kWays]);
        // A store waits for those before it, and these come from far away.
        if (kept) {
          __builtin_prefetch(with_V + at + count * row, 1);
          if constexpr (backward) __builtin_prefetch(with_g + at + count * row, 1);
        }
      }
    }
  }
}

// The same dot products for `rounds` iterations at once, from û that never leaves the registers. V, g, with_V, with_g:
// one of each iteration.
template <int rounds, int tiles, typename T>
void dots_of_rounds(const T* u, int64_t u_step, const Weights<T>& weights, int64_t i, int64_t count, Sizes z,
                    const T* const* V, const T* const* g, T* const* with_V, T* const* with_g, int64_t dots_step) {
  constexpr int lanes = kLanes<T>;
  const int64_t row = z.out_capsules * lanes, size = row * z.out_dim, matrix = z.in_dim * z.out_dim;
  const int64_t by = parents_ahead<T>(z);
  for (int64_t j = 0; j < z.out_capsules; ++j) {
    for (int64_t m = 0; m < count; ++m) {
      prefetch_weights(weights, z, i + m, i + count + m, j + by);
      const T *um = u + m * z.in_dim * lanes, *matrices = weights(i + m) + j * matrix;
      Vec<T> dots[rounds][tiles][2][kWays] = {};
      for_sums<tiles>(z.out_dim, [&](auto block, int64_t e0) __attribute__((always_inline)) {
        constexpr int n = decltype(block)::size;
        Vec<T> sums[tiles * n] = {};
        add_votes<n, tiles>(um, u_step, matrices + e0, z.in_dim, z.out_dim, sums);
#pragma GCC unroll 2
        for (int t = 0; t < rounds; ++t) {
#pragma GCC unroll 4
          for (int k = 0; k < tiles; ++k) {
            const T *Vt = V[t] + k * size + (j * z.out_dim + e0) * lanes, *gt = g[t] + (Vt - V[t]);
#pragma GCC unroll 16
            for (int e = 0; e < n; ++e) {
              dots[t][k][0][e % kWays] += sums[k * n + e] * load<Vec<T>>(Vt + e * lanes);
              dots[t][k][1][e % kWays] += sums[k * n + e] * load<Vec<T>>(gt + e * lanes);
            }
          }
        }
      });
      for (int t = 0; t < rounds; ++t) {
#pragma GCC unroll 4
        for (int k = 0; k < tiles; ++k) {
          const int64_t at = k * dots_step + m * row + j * lanes;
          store(with_V[t] + at, dots[t][k][0][0] + (kWays > 1 ? dots[t][k][0][kWays - 1] : Vec<T>{}));
          store(with_g[t] + at, dots[t][k][1][0] + (kWays > 1 ? dots[t][k][1][kWays - 1] : Vec<T>{}));
        }
      }
    }
  }
}

// sums [J·E] += Σ_k factors_k [J] · votes_k [J·E] over n lower capsules, whose votes lie `step` numbers apart.
template <int n, typename T>
CAPS_INLINE void add_weighted(const T* votes, int64_t step, const T* factors, Sizes z, T* sums) {
  constexpr int lanes = kLanes<T>;
  const int64_t row = z.out_capsules * lanes;
  for (int64_t j = 0; j < z.out_capsules; ++j) {
    Vec<T> factor[n];
#pragma GCC unroll 4
    for (int k = 0; k < n; ++k) factor[k] = load<Vec<T>>(factors + k * row + j * lanes);
    for (int64_t at = j * z.out_dim * lanes; at < (j + 1) * z.out_dim * lanes; at += lanes) {
      Vec<T> sum = load<Vec<T>>(sums + at);
#pragma GCC unroll 4
      for (int k = 0; k < n; ++k) sum += factor[k] * load<Vec<T>>(votes + k * step + at);
      store(sums + at, sum);
    }
  }
}

// One iteration over lower capsules first … last - 1 of neighbouring tiles:  c_i = softmax(û_i · V), and
//   forward:  sums += Σ_i c_i û_i                            (s)
//   backward: gb_i = c_i (gc_i - Σ_j c_i gc_i), gc_i = g · û_i, and sums += Σ_i gb_i û_i   (gV), unless `sums` is null
// u: of capsule `first`. V, g, sums: [tiles][J·E]. c, gb: [last - first][J] of each tile c_step apart, or where not
// `keep` [capsules][J], that each group of capsules writes over. votes: room for `tiles` times `capsules` [J·E].
template <bool backward, int tiles, int capsules, typename T>
void route(const T* u, int64_t u_step, const Weights<T>& weights, Sizes z, int64_t first, int64_t last, const T* V,
           const T* g, T* sums, T* votes, bool keep, T* c, T* gb, int64_t c_step) {
  constexpr int lanes = kLanes<T>;
  const int64_t row = z.out_capsules * lanes, size = row * z.out_dim;
  for (int64_t i = first; i < last; i += capsules) {
    const int64_t count = min_of(last - i, capsules);
    votes_and_dots<backward, tiles>(u + (i - first) * z.in_dim * lanes, u_step, weights, i, count, z, V, g, votes, c,
                                    gb, c_step, keep);
#pragma GCC unroll 4
    for (int k = 0; k < tiles; ++k) {
      T *ck = c + k * c_step, *gk = backward ? gb + k * c_step : nullptr;
      softmax(ck, z.out_capsules, z.leaky, count);
      if constexpr (backward) softmax_backward(ck, gk, z.out_capsules, count);
      if (!sums) continue;
      for_blocks<capsules>(count, [&](auto block, int64_t m) __attribute__((always_inline)) {
        add_weighted<decltype(block)::size>(votes + (m * tiles + k) * size, tiles * size,
                                            (backward ? gk : ck) + m * row, z, sums + k * size);
      });
    }
    if (keep) c += count * row, gb += backward ? count * row : 0;
  }
}

// grad_u [tiles][D] += Σ_e W_de gû_e for one parent; tiles of gû and of grad_u lie g_step and u_step numbers apart.
template <int tiles, typename T>
CAPS_INLINE void add_input_gradient(const T* grad_votes, int64_t g_step, const T* matrix, int64_t D, int64_t E,
                                    T* grad_u, int64_t u_step) {
  using V = Vec<T>;
  constexpr int lanes = kLanes<T>;
  for_blocks<kVotes / 2>(D, [&](auto block, int64_t d0) __attribute__((always_inline)) {
    constexpr int n = decltype(block)::size;
    V sums[tiles * n];
#pragma GCC unroll 4
    for (int k = 0; k < tiles; ++k) {
#pragma GCC unroll 8
      for (int d = 0; d < n; ++d) sums[k * n + d] = load<V>(grad_u + k * u_step + (d0 + d) * lanes);
    }
    for (int64_t e = 0; e < E; ++e) {
      V x[tiles];
#pragma GCC unroll 4
      for (int k = 0; k < tiles; ++k) x[k] = load<V>(grad_votes + k * g_step + e * lanes);
#pragma GCC unroll 8
      for (int d = 0; d < n; ++d) {
#pragma GCC unroll 4
        for (int k = 0; k < tiles; ++k) sums[k * n + d] += x[k] * matrix[(d0 + d) * E + e];
      }
    }
#pragma GCC unroll 4
    for (int k = 0; k < tiles; ++k) {
#pragma GCC unroll 8
      for (int d = 0; d < n; ++d) store(grad_u + k * u_step + (d0 + d) * lanes, sums[k * n + d]);
    }
  });
}

// How grad_W is written: as it is, to what is there already, or past the caches (see `stream`).
enum class Write { set, add, stream };

// `count` numbers, at most a vector of them.
template <typename V>
CAPS_INLINE void write(Element<V>* to, V value, int64_t count, Write how) {
  if (count < kLanesOf<V>) {
    store_some(to, how == Write::add ? load_some<V>(to, count) + value : value, count);
  } else if (how == Write::add) {
    store(to, load<V>(to) + value);
  } else {
    if constexpr (kCanStream<V>) {
      if (how == Write::stream) return stream(to, value);
    }
    store(to, value);
  }
}

template <int which, typename T, int... lane>
CAPS_INLINE Vec<T, kLanes<T> / 2> half_of(Vec<T> x, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(x, x, (which * kLanes<T> / 2 + lane)...);
}

// grad_W [D][E] = Σ over tiles and lanes of u_d gû_e for one parent; tiles are u_step and g_step numbers apart. As many
// products as a vector has lanes are summed over the tiles, and then over the lanes all at once.
template <typename T>
void weight_gradient_of_many(const T* u, int64_t u_step, const T* grad_votes, int64_t g_step, int64_t tiles, int64_t D,
                             int64_t E, T* grad_weight, Write how) {
  using V = Vec<T>;
  constexpr int lanes = kLanes<T>;
  // Two rows at a time halve the loads, which bound the products of one.
  for_blocks<lanes / 2>(E, [&](auto columns, int64_t e0) __attribute__((always_inline)) {
    constexpr int ne = decltype(columns)::size, nd = lanes / ne;  // ne columns of nd rows
    for (int64_t d0 = 0; d0 < D; d0 += nd) {
      V sums[lanes] = {};
      const int64_t rows = min_of(D - d0, nd);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const T *x = u + tile * u_step + d0 * lanes, *y = grad_votes + tile * g_step + e0 * lanes;
        V row[ne];
#pragma GCC unroll 16
        for (int e = 0; e < ne; ++e) row[e] = load<V>(y + e * lanes);
#pragma GCC unroll 16
        for (int d = 0; d < nd; ++d) {
          const V ud = d < rows ? load<V>(x + d * lanes) : V{};
#pragma GCC unroll 16
          for (int e = 0; e < ne; ++e) sums[d * ne + e] += ud * row[e];
        }
      }
      const V total = sums_of_rows<V>([&](int64_t k) __attribute__((always_inline)) { return sums[k]; });
      T* out = grad_weight + d0 * E + e0;
      if constexpr (ne == lanes / 2) {
        constexpr auto sequence = std::make_integer_sequence<int, ne>();
        write(out, half_of<0, T>(total, sequence), ne, how);
        if (rows > 1) write(out + E, half_of<1, T>(total, sequence), ne, how);
      } else {
        for (int k = 0; k < rows * ne; ++k) {
          T& number = out[k / ne * E + k % ne];
          number = how == Write::add ? number + total[k] : total[k];
        }
      }
    }
  });
}

// The same for a tile or two: gû is transposed, so that the lanes lie along E and nothing is summed across them. room:
// [D][E], for the sums of the first of two tiles; what was written past the caches must not be read again. Of
// vectors of half a line, the sums of the last too.
template <typename T>
void weight_gradient_of_few(const T* u, int64_t u_step, const T* grad_votes, int64_t g_step, int64_t tiles, int64_t D,
                            int64_t E, T* grad_weight, Write how, T* room) {
  using V = Vec<T>;
  constexpr int lanes = kLanes<T>;
  const bool copies = kCanStreamCopies && how == Write::stream;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const T *x = u + tile * u_step, *y = grad_votes + tile * g_step;
    const auto columns = [&](int64_t e0, const auto& count) __attribute__((always_inline)) {
      V square[lanes];
      CAPS_UNROLL
      for (int e = 0; e < lanes; ++e) square[e] = e < count ? load<V>(y + (e0 + e) * lanes) : V{};
      transpose(square);
      for_blocks<kVotes / 2>(D, [&](auto rows, int64_t d0) __attribute__((always_inline)) {
        constexpr int n = decltype(rows)::size;
        V sums[n] = {};
        CAPS_UNROLL
        for (int b = 0; b < lanes; ++b) {
          CAPS_UNROLL
          for (int d = 0; d < n; ++d) sums[d] += square[b] * x[(d0 + d) * lanes + b];
        }
        CAPS_UNROLL
        for (int d = 0; d < n; ++d) {
          const int64_t at = (d0 + d) * E + e0;
          if (tile > 0) sums[d] += load_some<V>(room + at, count);
          if (tile + 1 < tiles || copies) store_some(room + at, sums[d], count);
          else write(grad_weight + at, sums[d], count, how);
        }
      });
    };
    int64_t e0 = 0;
    for (; e0 + lanes <= E; e0 += lanes) columns(e0, std::integral_constant<int64_t, lanes>());
    if (e0 < E) columns(e0, E - e0);
  }
  if constexpr (kCanStreamCopies) {
    if (copies) stream_copy(room, D * E, grad_weight);
  }
}

}  // namespace caps::CAPS_ISA
