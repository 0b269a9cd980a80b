// The loops of dynamic_routing over a block of lower capsules: as many as a vector has lanes. Only for code compiled
// with CAPS_ISA.
//
// For one higher capsule j, the dot products of the block's rows û_ij with a vector come out side by side in the lanes
// of one vector (sums_of_rows), and so the softmax over j is done for all capsules of the block at once.
#pragma once

#include <caps/across_lanes.h>

namespace caps::CAPS_ISA {

// Rows û_kj of E consecutive numbers, k = 0 … L - 1. They are padded with zeros to whole vectors where a part of a
// vector cannot be loaded (kPartsLoad).
template <typename scalar_t>
struct Block {
  scalar_t* rows;
  int64_t k_stride, j_stride;
  int64_t ahead = 0;      // distance of the block to be read next, for prefetching; 0: none
  bool streamed = false;  // a result: write past the cache
};

struct BlockShape {
  int64_t J, E;
  int64_t padded;  // E rounded up to whole vectors; vectors [J, padded] and coefficients [J, L] belong to a block
};

// The loops for vectors V along E and kE of them a row (0: any number), the last of which is a part or not.
template <typename scalar_t, typename V, int kE, bool part>
struct Loops {
  using T = Element<V>;
  using Rows = Block<scalar_t>;
  static constexpr int W = kLanesOf<V>, L = kLanes<T>;

  static CAPS_INLINE int64_t vectors(const BlockShape& shape) { return kE > 0 ? kE : shape.padded / W; }

  static CAPS_INLINE V read(const scalar_t* row, int64_t n, const BlockShape& shape) {
    if (part && n == vectors(shape) - 1) return load_some<V>(row + n * W, shape.E - n * W);
    return load<V>(row + n * W);
  }

  static CAPS_INLINE void write(scalar_t* to, V value, bool streamed) {
    if constexpr (std::is_same_v<scalar_t, T> && kCanStream<V>) {
      if (streamed) return stream(to, value);
    }
    store(to, value);
  }

  static CAPS_INLINE void prefetch(const scalar_t* rows, const Rows& block, const BlockShape& shape) {
    if (block.ahead == 0) return;
    constexpr int64_t line = 64 / sizeof(scalar_t);
    for (int64_t e = 0; e < shape.E; e += line) {
      for (int k = 0; k < L; ++k) __builtin_prefetch(rows + k * block.k_stride + block.ahead + e);
    }
  }

  // out[j][k] = û_kj · x_j
  static void dots(const Rows& block, const T* x, T* out, const BlockShape& shape) {
    for (int64_t j = 0; j < shape.J; ++j) {
      const scalar_t* rows = block.rows + j * block.j_stride;
      const T* vector = x + j * shape.padded;
      prefetch(rows, block, shape);
      for (int k = 0; k < L; k += W) {
        const auto row = [&](int64_t n) __attribute__((always_inline)) {
          const scalar_t* from = rows + (k + n) * block.k_stride;
          V sum = read(from, 0, shape) * load<V>(vector);
          for (int64_t e = 1; e < vectors(shape); ++e) sum += read(from, e, shape) * load<V>(vector + e * W);
          return sum;
        };
        store(out + j * L + k, sums_of_rows<V>(row));
      }
    }
  }

  // s_j += Σ_k c[j][k] û_kj
  static void add(const Rows& block, const T* c, T* s, const BlockShape& shape) {
    constexpr int ways = L < 4 ? L : 4;  // independent sums, for the latency of an addition
    for (int64_t j = 0; j < shape.J; ++j) {
      const scalar_t* rows = block.rows + j * block.j_stride;
      prefetch(rows, block, shape);
      for (int64_t e = 0; e < vectors(shape); ++e) {
        V sum[ways] = {};
        for (int k = 0; k < L; k += ways) {
          CAPS_UNROLL
          for (int n = 0; n < ways; ++n) {
            sum[n] += c[j * L + k + n] * read(rows + (k + n) * block.k_stride, e, shape);
          }
        }
        CAPS_UNROLL
        for (int n = ways / 2; n > 0; n /= 2) {
          CAPS_UNROLL
          for (int m = 0; m < n; ++m) sum[m] += sum[m + n];
        }
        T* to = s + j * shape.padded + e * W;
        store(to, load<V>(to) + sum[0]);
      }
    }
  }

  // out_kj = first_j + Σ_n c[n][j][k] x[n]_j, padded rows
  static void combine(const Rows& out, const T* first, const T* c, const T* x, int64_t count, const BlockShape& shape) {
    constexpr int tile = L < 8 ? L : 8;
    for (int64_t j = 0; j < shape.J; ++j) {
      for (int64_t e = 0; e < vectors(shape); ++e) {
        const int64_t at = j * shape.padded + e * W;
        for (int k = 0; k < L; k += tile) {
          V sum[tile];
          CAPS_UNROLL
          for (int m = 0; m < tile; ++m) sum[m] = load<V>(first + at);
          for (int64_t n = 0; n < count; ++n) {
            const V vector = load<V>(x + n * shape.J * shape.padded + at);
            CAPS_UNROLL
            for (int m = 0; m < tile; ++m) sum[m] += c[(n * shape.J + j) * L + k + m] * vector;
          }
          scalar_t* to = out.rows + k * out.k_stride + j * out.j_stride;
          CAPS_UNROLL
          for (int m = 0; m < tile; ++m) write(to + m * out.k_stride + e * W, sum[m], out.streamed);
        }
      }
    }
  }
};

template <typename scalar_t>
struct LoopTable {
  using T = Acc<scalar_t>;
  int width;
  void (*dots)(const Block<scalar_t>&, const T*, T*, const BlockShape&);
  void (*add)(const Block<scalar_t>&, const T*, T*, const BlockShape&);
  void (*combine)(const Block<scalar_t>&, const T*, const T*, const T*, int64_t count, const BlockShape&);
};

template <typename scalar_t, typename V, int kE>
LoopTable<scalar_t> loop_table(int64_t E) {
  if constexpr (kPartsLoad<scalar_t>) {
    using Parts = Loops<scalar_t, V, kE, true>;
    if (E % kLanesOf<V> != 0) return {kLanesOf<V>, &Parts::dots, &Parts::add, &Parts::combine};
  }
  using Whole = Loops<scalar_t, V, kE, false>;
  return {kLanesOf<V>, &Whole::dots, &Whole::add, &Whole::combine};
}

// The loops for rows of E numbers: half a vector where that holds a row, else as many vectors as it takes.
template <typename scalar_t>
LoopTable<scalar_t> loops_for(int64_t E) {
  using T = Acc<scalar_t>;
  constexpr int n = kLanes<T>;
  if constexpr (kVectorBytes > 16) {
    if (E <= n / 2) return loop_table<scalar_t, Vec<T, n / 2>, 1>(E);
  }
  if (E <= n) return loop_table<scalar_t, Vec<T>, 1>(E);
  if (E <= 2 * n) return loop_table<scalar_t, Vec<T>, 2>(E);
  return loop_table<scalar_t, Vec<T>, 0>(E);
}

// The block of `count` capsules whose first row is at `from`: where the loops can work on it as it lies, or else a copy
// in `memory` [L, J, padded], with zeros for the capsules and numbers that are missing.
template <typename scalar_t>
Block<scalar_t> read_block(scalar_t* from, int64_t k_stride, int64_t j_stride, int64_t e_stride, int64_t count,
                           const BlockShape& shape, scalar_t* memory) {
  const auto [J, E, padded] = shape;
  constexpr int64_t L = kLanes<Acc<scalar_t>>;
  const bool loadable = (E == 1 || e_stride == 1) && (E == padded || kPartsLoad<scalar_t>);
  if (loadable && count == L) return {from, k_stride, j_stride, L * k_stride};
  for (int64_t n = 0; n < L * J * padded; ++n) memory[n] = scalar_t{};
  for (int64_t k = 0; k < count; ++k) {
    for (int64_t j = 0; j < J; ++j) {
      const scalar_t* row = from + k * k_stride + j * j_stride;
      scalar_t* to = memory + (k * J + j) * padded;
      if (e_stride == 1) {
        for (int64_t e = 0; e < E; ++e) to[e] = row[e];
      } else {
        for (int64_t e = 0; e < E; ++e) to[e] = row[e * e_stride];
      }
    }
  }
  return {memory, J * padded, padded};
}

// The rows of `memory` [count, J, padded] to consecutive memory [count, J, E]. Whole vectors are written, and what is
// too much is overwritten by the next row; the last rows are copied number by number. `memory` is read as far as a
// vector beyond its end.
template <typename scalar_t>
void write_rows(const scalar_t* memory, scalar_t* to, int64_t count, const BlockShape& shape) {
  const auto [J, E, padded] = shape;
  constexpr int64_t n = kVectorBytes / sizeof(scalar_t);
  const scalar_t* end = to + count * J * E;
  for (int64_t row = 0; row < count * J; ++row, memory += padded, to += E) {
    if (end - to < E + n) {
      for (int64_t e = 0; e < E; ++e) to[e] = memory[e];
    } else {
      for (int64_t e = 0; e < E; e += n) __builtin_memcpy(to + e, memory + e, kVectorBytes);
    }
  }
}

}  // namespace caps::CAPS_ISA
