// Rows: one sample at a time, lanes along E, û kept in memory. For few samples, where tiles would be mostly empty.
// A vote is a row of `padded` numbers, E rounded up to whole vectors with zeros behind. Lower capsules are taken kLanes
// at a time, so that their logits lie side by side in the lanes, [J][kLanes].
// Only for code compiled with CAPS_ISA.
#pragma once

#include <caps/tile_routing.h>

namespace caps::CAPS_ISA {

template <typename T>
CAPS_INLINE int64_t padded(int64_t E) {
  return (E + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

template <typename T>
CAPS_INLINE Vec<T> load_row(const T* row, int64_t at, int64_t E) {
  return E - at >= kLanes<T> ? load<Vec<T>>(row + at) : load_some<Vec<T>>(row + at, E - at);
}

// û of `samples` samples for one lower capsule; u and votes of a sample are u_step and votes_step numbers after those
// of the one before. Adds the votes to `sums` too, sums_step apart, unless it is null.
template <int samples, typename T>
CAPS_INLINE void predict_rows(const T* u, int64_t u_step, const T* matrices, const T* next, Sizes z, T* votes,
                              int64_t votes_step, T* sums, int64_t sums_step) {
  using V = Vec<T>;
  const int64_t width = padded<T>(z.out_dim);
  for (int64_t j = 0; j < z.out_capsules; ++j) {
    prefetch(next, j * z.in_dim * z.out_dim, z.in_dim * z.out_dim);
    for (int64_t e = 0; e < z.out_dim; e += kLanes<T>) {
      V row[samples] = {};
      for (int64_t d = 0; d < z.in_dim; ++d) {
        const V w = load_row(matrices + (j * z.in_dim + d) * z.out_dim, e, z.out_dim);
#pragma GCC unroll 4
        for (int b = 0; b < samples; ++b) row[b] += w * u[b * u_step + d];
      }
      const int64_t at = j * width + e;
      for (int b = 0; b < samples; ++b) {
        store(votes + b * votes_step + at, row[b]);
        if (sums) store(sums + b * sums_step + at, load<V>(sums + b * sums_step + at) + row[b]);
      }
    }
  }
}

// Dot products [J][kLanes] of `count` consecutive capsules' votes with x [J][padded].
template <typename T>
CAPS_INLINE void row_dots(const T* votes, int64_t count, const T* x, Sizes z, T* out) {
  using V = Vec<T>;
  constexpr int lanes = kLanes<T>;
  const int64_t width = padded<T>(z.out_dim), size = z.out_capsules * width;
  for (int64_t j = 0; j < z.out_capsules; ++j) {
    V products[lanes] = {};
    for (int64_t e = 0; e < width; e += lanes) {
      const V xe = load<V>(x + j * width + e);
      const T* row = votes + j * width + e;
      if (count == lanes) {
#pragma GCC unroll 16
        for (int k = 0; k < lanes; ++k) products[k] += xe * load<V>(row + k * size);
      } else {
        for (int64_t k = 0; k < count; ++k) products[k] += xe * load<V>(row + k * size);
      }
    }
    store(out + j * lanes, lane_sums(products));
  }
}

// sums [J][padded] += Σ_k factors [J][k] votes_k over `count` consecutive capsules.
template <typename T>
CAPS_INLINE void add_weighted_rows(const T* votes, int64_t count, const T* factors, Sizes z, T* sums) {
  using V = Vec<T>;
  constexpr int lanes = kLanes<T>;
  const int64_t width = padded<T>(z.out_dim), size = z.out_capsules * width;
  for (int64_t j = 0; j < z.out_capsules; ++j) {
    for (int64_t at = j * width; at < (j + 1) * width; at += lanes) {
      // Several sums at once: each addition waits for the one before it.
      V parts[4] = {load<V>(sums + at)};
      int64_t k = 0;
      for (; k + 4 <= count; k += 4) {
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) parts[n] += factors[j * lanes + k + n] * load<V>(votes + (k + n) * size + at);
      }
      for (; k < count; ++k) parts[0] += factors[j * lanes + k] * load<V>(votes + k * size + at);
      store(sums + at, (parts[0] + parts[1]) + (parts[2] + parts[3]));
    }
  }
}

// One iteration over `capsules` lower capsules of one sample; the same as `route` of tiles. c, gb: [blocks][J][kLanes].
template <bool backward, typename T>
void route_rows(const T* votes, int64_t capsules, Sizes z, const T* V, const T* g, T* sums, T* c, T* gb) {
  constexpr int lanes = kLanes<T>;
  const int64_t size = z.out_capsules * padded<T>(z.out_dim), row = z.out_capsules * lanes;
  for (int64_t i = 0; i < capsules; i += lanes, c += row, gb += backward ? row : 0) {
    const int64_t count = min_of(capsules - i, lanes);
    row_dots(votes + i * size, count, V, z, c);
    softmax(c, z.out_capsules, z.leaky);
    if constexpr (backward) {
      row_dots(votes + i * size, count, g, z, gb);
      softmax_backward(c, gb, z.out_capsules);
    }
    if (sums) add_weighted_rows(votes + i * size, count, backward ? gb : c, z, sums);
  }
}

// For one lower capsule, from gû [samples][J][padded]: grad_W [J][D][E] of all samples, and each sample's grad_u [D],
// to places grad_u_step apart.
template <int samples, typename T>
CAPS_INLINE void row_gradients(const T* grad_votes, const T* u, int64_t u_step, const T* matrices, Sizes z,
                               T* grad_weight, Write how, T* grad_u, int64_t grad_u_step) {
  using V = Vec<T>;
  constexpr int lanes = kLanes<T>;
  const int64_t J = z.out_capsules, D = z.in_dim, E = z.out_dim, width = padded<T>(E), size = J * width;
  for (int64_t d = 0; d < D; ++d) {
    V sums[samples] = {};
    for (int64_t j = 0; j < J; ++j) {
      for (int64_t e = 0; e < E; e += lanes) {
        const int64_t row = (j * D + d) * E;
        const V w = load_row(matrices + row, e, E);
        V gw{};
#pragma GCC unroll 4
        for (int b = 0; b < samples; ++b) {
          const V gv = load<V>(grad_votes + b * size + j * width + e);
          gw += gv * u[b * u_step + d];
          sums[b] += w * gv;
        }
        write(grad_weight + row + e, gw, min_of(E - e, lanes), how);
      }
    }
    for (int b = 0; b < samples; ++b) grad_u[b * grad_u_step + d] = reduce_add(sums[b]);
  }
}

}  // namespace caps::CAPS_ISA
