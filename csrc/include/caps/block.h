// The loops of dynamic_routing over a block of lower capsules: as many as a vector has lanes. Only for code compiled
// with CAPS_ISA.
//
// For one higher capsule j, the dot products of the block's rows û_ij with a vector come out side by side in the lanes
// of one vector (sums_of_rows), and so the softmax over j is done for all capsules of the block at once.
#pragma once

#include <caps/simd.h>

namespace caps::CAPS_ISA {

// Rows û_ij of a block of kLanes<T> input capsules, E padded with zeros to whole vectors.
template <typename T>
struct Block {
  T* rows;
  int64_t i_stride, j_stride;
  int64_t ahead = 0;
  bool streamed = false;  // as a result: write past the cache
};

// The loops over a block, for vectors V along E and kE of them a row (0: any number). Lower capsules are k = 0 … L - 1.
template <typename V, int kE>
struct Loops {
  using T = Element<V>;
  static constexpr int W = kLanesOf<V>, L = kLanes<T>;

  static CAPS_INLINE int64_t vectors(int64_t padded) { return kE > 0 ? kE : padded / W; }

  static CAPS_INLINE void write(T* to, V value, bool streamed) {
    if constexpr (kCanStream<V>) {
      if (streamed) return stream(to, value);
    }
    store(to, value);
  }

  static CAPS_INLINE void prefetch(const T* rows, const Block<T>& block) {
    if (block.ahead == 0) return;
    for (int k = 0; k < L; ++k) {
      __builtin_prefetch(rows + k * block.i_stride + block.ahead, 0, 3);
    }
  }

  // out[j][k] = û_kj · x_j
  static void dots(const Block<T>& block, const T* x, T* out, int64_t J, int64_t padded) {
    for (int64_t j = 0; j < J; ++j) {
      const T* rows = block.rows + j * block.j_stride;
      const T* vector = x + j * padded;
      prefetch(rows, block);
      for (int k = 0; k < L; k += W) {
        const auto row = [&](int64_t n) __attribute__((always_inline)) {
          const T* from = rows + (k + n) * block.i_stride;
          V sum = load<V>(from) * load<V>(vector);
          for (int64_t e = 1; e < vectors(padded); ++e) sum += load<V>(from + e * W) * load<V>(vector + e * W);
          return sum;
        };
        store(out + j * L + k, sums_of_rows<V>(row));
      }
    }
  }

  // s_j += Σ_k c[j][k] û_kj
  static void add(const Block<T>& block, const T* c, T* s, int64_t J, int64_t padded) {
    constexpr int ways = L < 4 ? L : 4;  // independent sums, for the latency of an addition
    for (int64_t j = 0; j < J; ++j) {
      prefetch(block.rows + j * block.j_stride, block);
      for (int64_t e = 0; e < vectors(padded); ++e) {
        const T* rows = block.rows + j * block.j_stride + e * W;
        V sum[ways] = {};
        for (int k = 0; k < L; k += ways) {
          CAPS_UNROLL for (int n = 0; n < ways; ++n) sum[n] += c[j * L + k + n] * load<V>(rows + (k + n) * block.i_stride);
        }
        CAPS_UNROLL for (int n = ways / 2; n > 0; n /= 2) {
          CAPS_UNROLL for (int m = 0; m < n; ++m) sum[m] += sum[m + n];
        }
        T* to = s + j * padded + e * W;
        store(to, load<V>(to) + sum[0]);
      }
    }
  }

  // out_kj = first_j + Σ_n c[n][j][k] x[n]_j
  static void combine(const Block<T>& out, const T* first, const T* c, const T* x, int64_t count, int64_t J,
                      int64_t padded) {
    constexpr int tile = L < 8 ? L : 8;
    for (int64_t j = 0; j < J; ++j) {
      for (int64_t e = 0; e < vectors(padded); ++e) {
        const int64_t at = j * padded + e * W;
        for (int k = 0; k < L; k += tile) {
          V sum[tile];
          for (V& one : sum) one = load<V>(first + at);
          for (int64_t n = 0; n < count; ++n) {
            const V vector = load<V>(x + n * J * padded + at);
            CAPS_UNROLL for (int m = 0; m < tile; ++m) sum[m] += c[(n * J + j) * L + k + m] * vector;
          }
          T* to = out.rows + k * out.i_stride + j * out.j_stride + e * W;
          CAPS_UNROLL for (int m = 0; m < tile; ++m) write(to + m * out.i_stride, sum[m], out.streamed);
        }
      }
    }
  }
};

template <typename T>
struct LoopTable {
  int64_t padded;
  void (*dots)(const Block<T>&, const T*, T*, int64_t J, int64_t padded);
  void (*add)(const Block<T>&, const T*, T*, int64_t J, int64_t padded);
  void (*combine)(const Block<T>&, const T*, const T*, const T*, int64_t count, int64_t J, int64_t padded);
};

template <typename V, int kE>
LoopTable<Element<V>> loop_table(int64_t E) {
  const int64_t padded = (E + kLanesOf<V> - 1) / kLanesOf<V> * kLanesOf<V>;
  return {padded, &Loops<V, kE>::dots, &Loops<V, kE>::add, &Loops<V, kE>::combine};
}

// The loops for rows of E numbers: the narrowest vector that holds a row, or as many of the widest as it takes.
template <typename T>
LoopTable<T> loops_for(int64_t E) {
  constexpr int n = kLanes<T>, least = 16 / sizeof(T);
  if constexpr (n >= 4 * least) {
    if (E <= n / 4) return loop_table<Vec<T, n / 4>, 1>(E);
  }
  if constexpr (n >= 2 * least) {
    if (E <= n / 2) return loop_table<Vec<T, n / 2>, 1>(E);
  }
  if (E <= n) return loop_table<Vec<T>, 1>(E);
  if (E <= 2 * n) return loop_table<Vec<T>, 2>(E);
  return loop_table<Vec<T>, 0>(E);
}

}  // namespace caps::CAPS_ISA
