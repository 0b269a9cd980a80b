// Rows: one sample at a time, lanes along E, û kept in memory. For few samples, where tiles would be mostly empty.
// A vote is a row of `padded` numbers, E rounded up to whole vectors with zeros behind. Lower capsules are taken kLanes
// at a time, a block, so that their logits lie side by side in the lanes, [J][kLanes]; the votes of a block are
// [J][kLanes][padded], those of capsules beyond the last being 0.
// Only for code compiled with CAPS_ISA.
#pragma once

#include <caps/tile_routing.h>

namespace caps::CAPS_ISA {

template <typename T>
CAPS_INLINE int64_t padded(int64_t E) {
  return (E + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// Calls f(whole, e, count) for each vector of a row of E numbers: `count` of them from e on, and whether that is all.
template <typename T, typename F>
CAPS_INLINE void for_vectors(int64_t E, const F& f) {
  int64_t e = 0;
  for (; e + kLanes<T> <= E; e += kLanes<T>) f(std::true_type(), e, kLanes<T>);
  if (e < E) f(std::false_type(), e, E - e);
}

template <bool whole, typename T>
CAPS_INLINE Vec<T> load_row(const T* row, int64_t count) {
  if constexpr (whole) return load<Vec<T>>(row);
  else return load_some<Vec<T>>(row, count);
}

// Asks for the first line of every page among `count` numbers that will soon be read: within a page the processor
// foresees by itself what is read in order.
template <typename T>
CAPS_INLINE void prefetch_pages(const T* from, int64_t count) {
  constexpr uintptr_t page = 4096;
  const uintptr_t begin = uintptr_t(from), end = from ? begin + count * sizeof(T) : begin;
  for (uintptr_t at = (begin + page - 1) / page * page; at < end; at += page) {
    __builtin_prefetch(reinterpret_cast<const char*>(at));
  }
}

// Rows of W whose factors u_d are held in registers at once, for `samples` samples.
template <int samples>
constexpr int kDims = 8 / samples;

// û of `samples` samples for one lower capsule, parents kLanes rows apart; u and votes of a sample are u_step and
// votes_step numbers after those of the one before. Adds the votes to `sums` [J][padded] too, sums_step apart, unless
// it is null.
template <int samples, typename T>
CAPS_INLINE void predict_rows(const T* u, int64_t u_step, const T* matrices, Sizes z, T* votes, int64_t votes_step,
                              T* sums, int64_t sums_step) {
  using V = Vec<T>;
  constexpr int lanes = kLanes<T>;
  const int64_t J = z.out_capsules, D = z.in_dim, E = z.out_dim, width = padded<T>(E);
  for_blocks<kDims<samples>>(D, [&](auto block, int64_t d0) __attribute__((always_inline)) {
    constexpr int n = decltype(block)::size;
    V x[samples * n];
#pragma GCC unroll 8
    for (int k = 0; k < samples * n; ++k) x[k] = splat<V>(u[k / n * u_step + d0 + k % n]);
    for (int64_t j = 0; j < J; ++j) {
      const T* matrix = matrices + (j * D + d0) * E;
      for_vectors<T>(E, [&](auto whole, int64_t e, int64_t count) __attribute__((always_inline)) {
        T *out = votes + j * lanes * width + e, *sum = sums + j * width + e;
        V row[samples];
#pragma GCC unroll 4
        for (int b = 0; b < samples; ++b) row[b] = d0 > 0 ? load<V>(out + b * votes_step) : V{};
#pragma GCC unroll 8
        for (int d = 0; d < n; ++d) {
          const V w = load_row<whole>(matrix + d * E + e, count);
#pragma GCC unroll 4
          for (int b = 0; b < samples; ++b) row[b] += w * x[b * n + d];
        }
#pragma GCC unroll 4
        for (int b = 0; b < samples; ++b) {
          store(out + b * votes_step, row[b]);
          if (sums && d0 + n == D) store(sum + b * sums_step, load<V>(sum + b * sums_step) + row[b]);
        }
      });
    }
  });
}

// Dot products [J][kLanes] of a block's votes with x [J][padded].
template <typename T>
CAPS_INLINE void row_dots(const T* votes, const T* x, Sizes z, T* out) {
  using V = Vec<T>;
  constexpr int lanes = kLanes<T>;
  const int64_t width = padded<T>(z.out_dim);
  for (int64_t j = 0; j < z.out_capsules; ++j, votes += lanes * width, x += width, out += lanes) {
    V products[lanes];
    const V first = load<V>(x);
#pragma GCC unroll 16
    for (int k = 0; k < lanes; ++k) products[k] = first * load<V>(votes + k * width);
    for (int64_t e = lanes; e < width; e += lanes) {
      const V xe = load<V>(x + e);
#pragma GCC unroll 16
      for (int k = 0; k < lanes; ++k) products[k] += xe * load<V>(votes + k * width + e);
    }
    store(out, sums_of_rows<V>([&](int64_t k) __attribute__((always_inline)) { return products[k]; }));
  }
}

// sums [J][padded] += Σ_k factors [J][k] votes_k over a block.
template <typename T>
CAPS_INLINE void add_weighted_rows(const T* votes, const T* factors, Sizes z, T* sums) {
  using V = Vec<T>;
  constexpr int lanes = kLanes<T>, chains = 4;  // several sums at once: each addition waits for the one before it
  const int64_t width = padded<T>(z.out_dim);
  for (int64_t j = 0; j < z.out_capsules; ++j, votes += lanes * width, factors += lanes, sums += width) {
    for (int64_t e = 0; e < width; e += lanes) {
      V parts[chains] = {load<V>(sums + e)};
#pragma GCC unroll 16
      for (int k = 0; k < lanes; ++k) parts[k % chains] += factors[k] * load<V>(votes + k * width + e);
      store(sums + e, (parts[0] + parts[1]) + (parts[2] + parts[3]));
    }
  }
}

// One iteration over blocks of lower capsules of one sample; the same as `route` of tiles. c, gb: [blocks][J][kLanes],
// or one block of c that each writes over if not `keep`.
template <bool backward, typename T>
CAPS_INLINE void route_rows(const T* votes, int64_t blocks, Sizes z, const T* V, const T* g, T* sums, bool keep, T* c,
                            T* gb) {
  constexpr int lanes = kLanes<T>;
  const int64_t row = z.out_capsules * lanes, size = row * padded<T>(z.out_dim);
  for (int64_t block = 0; block < blocks; ++block, votes += size) {
    row_dots(votes, V, z, c);
    softmax(c, z.out_capsules, z.leaky);
    if constexpr (backward) {
      row_dots(votes, g, z, gb);
      softmax_backward(c, gb, z.out_capsules);
    }
    if (sums) add_weighted_rows(votes, backward ? gb : c, z, sums);
    if (keep) c += row, gb += backward ? row : 0;
  }
}

// For one lower capsule, from gû [samples][J][padded]: grad_W [J][D][E] of all samples, and each sample's grad_u [D],
// to places grad_u_step apart.
template <int samples, typename T>
CAPS_INLINE void row_gradients(const T* grad_votes, const T* u, int64_t u_step, const T* matrices, Sizes z,
                               T* grad_weight, Write how, T* grad_u, int64_t grad_u_step) {
  using V = Vec<T>;
  const int64_t J = z.out_capsules, D = z.in_dim, E = z.out_dim, width = padded<T>(E), size = J * width;
  for_blocks<kDims<samples>>(D, [&](auto block, int64_t d0) __attribute__((always_inline)) {
    constexpr int n = decltype(block)::size;
    V x[samples * n], sums[samples * n] = {};
#pragma GCC unroll 8
    for (int k = 0; k < samples * n; ++k) x[k] = splat<V>(u[k / n * u_step + d0 + k % n]);
    for (int64_t j = 0; j < J; ++j) {
      for_vectors<T>(E, [&](auto whole, int64_t e, int64_t count) __attribute__((always_inline)) {
        V gv[samples];
#pragma GCC unroll 4
        for (int b = 0; b < samples; ++b) gv[b] = load<V>(grad_votes + b * size + j * width + e);
#pragma GCC unroll 8
        for (int d = 0; d < n; ++d) {
          const int64_t at = (j * D + d0 + d) * E + e;
          const V w = load_row<whole>(matrices + at, count);
          V gw{};
#pragma GCC unroll 4
          for (int b = 0; b < samples; ++b) {
            gw += gv[b] * x[b * n + d];
            sums[b * n + d] += w * gv[b];
          }
          write(grad_weight + at, gw, count, how);
        }
      });
    }
#pragma GCC unroll 8
    for (int k = 0; k < samples * n; ++k) grad_u[k / n * grad_u_step + d0 + k % n] = reduce_add(sums[k]);
  });
}

}  // namespace caps::CAPS_ISA
