// A block of dense_capsules on a GPU: its shared memory, the flow of W and u through it, and what is done with û of one
// lower capsule while it is in registers. gpu_dense.h says who has which part of it.
#pragma once

#include <caps/gpu_async.h>
#include <caps/gpu_dense.h>
#include <caps/gpu_mma.h>

namespace caps::gpu {

// n numbers from aligned memory in one load of 4, 8 or 16 bytes, in the type of sums.
template <int n, typename S>
CAPS_DEVICE Pack<Acc<S>, n> load_pack(const S* from) {
  using Bits = std::conditional_t<n * sizeof(S) == 16, uint4, std::conditional_t<n * sizeof(S) == 8, uint2, uint32_t>>;
  static_assert(sizeof(Bits) == n * sizeof(S));
  const Bits bits = *reinterpret_cast<const Bits*>(from);
  S raw[n];
  __builtin_memcpy(raw, &bits, sizeof(Bits));
  Pack<Acc<S>, n> result;
#pragma unroll
  for (int k = 0; k < n; ++k) result[k] = widen(raw[k]);
  return result;
}

template <typename T, int n>
CAPS_DEVICE void store_pack(T* to, const Pack<T, n>& value) {
  using Bits = std::conditional_t<n * sizeof(T) == 16, uint4, uint2>;
  static_assert(sizeof(Bits) == n * sizeof(T));
  Bits bits;
  __builtin_memcpy(&bits, value.x, sizeof(Bits));
  *reinterpret_cast<Bits*>(to) = bits;
}

// `count` lower capsules from i0 on, for each of `tiles` tiles of samples from tile0 on. Their product is below 2^31.
struct Walk {
  int i0, count, tile0, tiles;
};

template <typename Tile>
class DenseBlock {
 public:
  using S = typename Tile::scalar_t;
  using T = typename Tile::T;
  static constexpr int kLanes = Tile::kLanes, kRows = Tile::kRows, kWidth = Tile::kWidth, kParents = Tile::kParents;
  static constexpr int kVec = Tile::kVec, kUnit = Tile::kUnit;
  // A number for each parent, sample and e of a thread.
  using Values = T[kParents][kRows][kWidth];
  using Scores = T[kParents][kRows];

  const DenseArgs& args;
  const DenseLayout& layout;
  int thread, warp, row0, e_lane;

  CAPS_DEVICE DenseBlock(const DenseArgs& a, unsigned char* shared)
      : args(a), layout(a.layout), shared_(shared) {
    forget();
    // What pads D and E stays zero: copies never reach it.
    for (int n = 4 * thread; n < layout.scores_at; n += 4 * int(blockDim.x)) memory<uint32_t>(n)[0] = 0;
    __syncthreads();
  }

  // Hides from the compiler that the thread is the same as before, so that it works out again what follows from that:
  // kept over the loop of lower capsules, that would fill half of the registers.
  CAPS_DEVICE void forget() {
    thread = int(threadIdx.x);
#ifndef CAPS_ON_HOST
    asm volatile("" : "+r"(thread));
#endif
    warp = thread / 32;
    row0 = thread % 32 / kLanes;
    e_lane = thread % kLanes;
  }

  CAPS_DEVICE int warps() const { return int(blockDim.x) / 32; }
  CAPS_DEVICE int parent(int k) const { return warp + k * warps(); }
  CAPS_DEVICE int row(int m) const { return row0 + m * Tile::kSampleLanes; }
  CAPS_DEVICE int number(int n) const { return n / kVec * (kLanes * kVec) + e_lane * kVec + n % kVec; }
  CAPS_DEVICE bool has(int k) const { return parent(k) < layout.J; }
  CAPS_DEVICE int64_t sample(int tile, int m) const { return int64_t(tile) * Tile::kSamples + row(m); }
  CAPS_DEVICE T uniform() const { return 1 / T(layout.J + (args.leaky ? 1 : 0)); }
  CAPS_DEVICE T* scores(int which) { return memory<T>(layout.scores_at) + which * layout.score_size; }
  // What lies behind the scores.
  CAPS_DEVICE T* rest() { return memory<T>(layout.rest_at); }

  // Begins to fetch the first lower capsules of a walk. All that were fetched before have been used.
  CAPS_DEVICE void start(const Walk& walk) {
    walk_ = walk;
    at_ = -1;
    __syncthreads();
    for (int n = 0; n < args.stages - 1; ++n) fetch(n);
  }

  // Whether there is a next lower capsule.
  CAPS_DEVICE bool more() const { return at_ + 1 < walk_.count * walk_.tiles; }

  // Goes to the next lower capsule, whose W and u are then there for all, and fetches one more.
  CAPS_DEVICE void next() {
    ++at_;
    if (args.stages == 2) async_wait<0>();
    else async_wait<2>();
    __syncthreads();
    forget();
    fetch(at_ + args.stages - 1);
    forget();
  }

  CAPS_DEVICE void finish() {
    async_wait<0>();
    forget();
  }

  CAPS_DEVICE const S* weight() const { return memory<S>(0) + stage(matrix(at_)) * layout.weight_size; }
  CAPS_DEVICE const S* u() const { return memory<S>(layout.u_at) + stage(at_) * layout.u_size; }
  // The capsule, its number among those of the walk, how many these are, and the tile of samples.
  CAPS_DEVICE int capsule() const { return walk_.i0 + in_group(); }
  CAPS_DEVICE int in_group() const { return in_group(at_); }
  CAPS_DEVICE int group_size() const { return walk_.count; }
  CAPS_DEVICE int tile() const { return walk_.tile0 + of_tiles(at_); }

  // x += û
  CAPS_DEVICE void votes(Values& x) const {
    if constexpr (Tile::kTensorCores) votes_by_tensor_cores(x);
    else votes_by_fma(x);
  }

  using Row = T[kWidth];

  // The numbers of this thread for one of its parents and samples, from [B, J, E] in the type of sums; 0 where there is
  // no such parent, sample or number.
  CAPS_DEVICE void load_row(const T* from, int tile, int k, int m, Row& x) const {
    const int E = layout.E;
    const bool there = has(k) && sample(tile, m) < args.u.size[0];
    const T* row = from + (sample(tile, m) * layout.J + parent(k)) * E;
#pragma unroll
    for (int n = 0; n < kWidth; n += kVec) {
      if (there && E == Tile::kE) {
        const Pack<T, kVec> pack = load_pack<kVec>(row + number(n));
#pragma unroll
        for (int v = 0; v < kVec; ++v) x[n + v] = pack[v];
      } else {
#pragma unroll
        for (int v = 0; v < kVec; ++v) x[n + v] = there && number(n) + v < E ? row[number(n) + v] : T(0);
      }
    }
  }

  CAPS_DEVICE void load_values(const T* from, int tile, Values& x) const {
#pragma unroll
    for (int k = 0; k < kParents; ++k) {
#pragma unroll
      for (int m = 0; m < kRows; ++m) load_row(from, tile, k, m, x[k][m]);
    }
  }

  // V or g of a tile: kept in registers, or read again row by row, from the first level cache for all but the first.
  class Vectors {
   public:
    CAPS_DEVICE Vectors(const DenseBlock& block, const T* from, int tile) : block_(block), from_(from), tile_(tile) {
      if constexpr (Tile::kKeep) block.load_values(from, tile, kept_);
    }
    CAPS_DEVICE void row(int k, int m, Row& x) const {
      if constexpr (Tile::kKeep) {
#pragma unroll
        for (int n = 0; n < kWidth; ++n) x[n] = kept_[k][m][n];
      } else {
        block_.load_row(from_, tile_, k, m, x);
      }
    }

   private:
    const DenseBlock& block_;
    const T* from_;
    int tile_;
    T kept_[Tile::kKeep ? kParents : 1][Tile::kKeep ? kRows : 1][Tile::kKeep ? kWidth : 1];
  };

  CAPS_DEVICE void store_values(T* to, int tile, const Values& x) const {
    const int J = layout.J, E = layout.E;
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      if (sample(tile, m) >= args.u.size[0]) continue;
      T* of_sample = to + sample(tile, m) * J * E;
#pragma unroll
      for (int k = 0; k < kParents; ++k) {
        if (!has(k)) continue;
#pragma unroll
        for (int n = 0; n < kWidth; n += kVec) {
          T* at = of_sample + parent(k) * E + number(n);
          if (E == Tile::kE) {
            store_pack(at, pack_of(x[k][m] + n));
          } else {
#pragma unroll
            for (int v = 0; v < kVec; ++v) {
              if (number(n) + v < E) at[v] = x[k][m][n + v];
            }
          }
        }
      }
    }
  }

  // Scores of this thread's samples and parents: Σ_e x y, into shared memory.
  CAPS_DEVICE void put_scores(const Values& x, const Vectors& vectors, T* scores) {
#pragma unroll
    for (int k = 0; k < kParents; ++k) {
      if constexpr (kParents > 1) forget();
      if (!has(k)) continue;
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        Row y;
        vectors.row(k, m, y);
        T sum = 0;
#pragma unroll
        for (int n = 0; n < kWidth; ++n) sum += x[k][m][n] * y[n];
        sum = group_sum(sum, kLanes);
        if (e_lane == 0) scores[row(m) * layout.score_row + parent(k)] = sum;
      }
    }
  }

  // x += score · y, with scores from shared memory; row(k, m, y) fills in y.
  template <typename F>
  CAPS_DEVICE void add_scaled(Values& x, const T* scores, const F& row_of) {
#pragma unroll
    for (int k = 0; k < kParents; ++k) {
      if constexpr (kParents > 1) forget();
      if (!has(k)) continue;
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        Row y;
        row_of(k, m, y);
        const T scale = scores[row(m) * layout.score_row + parent(k)];
#pragma unroll
        for (int n = 0; n < kWidth; ++n) x[k][m][n] += scale * y[n];
      }
    }
  }
  CAPS_DEVICE void add_scaled(Values& x, const T* scores, const Vectors& vectors) {
    add_scaled(x, scores, [&](int k, int m, Row& y) { vectors.row(k, m, y); });
  }
  CAPS_DEVICE void add_scaled(Values& x, const T* scores, const Values& y) {
    add_scaled(x, scores, [&](int k, int m, Row& row) {
#pragma unroll
      for (int n = 0; n < kWidth; ++n) row[n] = y[k][m][n];
    });
  }

  // Logits, in shared memory, become coupling coefficients c. Where there are gc as well, they become
  // gb = c (gc - Σ_k c gc). done(row, j, c) is called for each.
  template <bool backward, typename F>
  CAPS_DEVICE void softmax(T* logits, T* gc, const F& done) const {
    const int lane = thread % kSoftmaxLanes, J = layout.J;
    constexpr int own = (Tile::kWarps * Tile::kParents + kSoftmaxLanes - 1) / kSoftmaxLanes;  // of a lane, at most
    constexpr bool few = own <= 2;  // then they stay in registers, of which the other tiles have none to spare
    // A warp has 4 rows at a time, and tiles have multiples of 4.
    for (int r = thread / kSoftmaxLanes; r < Tile::kSamples; r += int(blockDim.x) / kSoftmaxLanes) {
      T *x = logits + r * layout.score_row, *y = gc + r * layout.score_row;
      T most = args.leaky ? T(0) : T(-INFINITY);  // x[0] is for the lane alone that will write it
      T kept[few ? own : 1];
      const auto each_own = [&](const auto& f) {
        if constexpr (few) {
#pragma unroll
          for (int k = 0; k < own; ++k) {
            if (lane + k * kSoftmaxLanes < J) f(lane + k * kSoftmaxLanes, kept[k]);
          }
        } else {
          for (int j = lane; j < J; j += kSoftmaxLanes) f(j, x[j]);
        }
      };
      each_own([&](int j, T& number) {
        if constexpr (few) number = x[j];
        most = larger(number, most);
      });
      most = group_max(most, kSoftmaxLanes);
      T total = 0, mean = 0;
      each_own([&](int j, T& number) {
        const T power = exp(number - most);
        total += power;
        if constexpr (backward) mean += power * y[j];
        number = power;
      });
      total = group_sum(total, kSoftmaxLanes);
      if (args.leaky) total += exp(-most);
      const T inverse = 1 / total;
      if constexpr (backward) mean = group_sum(mean, kSoftmaxLanes) * inverse;
      each_own([&](int j, T& number) {
        const T c = number * inverse;
        x[j] = c;
        if constexpr (backward) y[j] = c * (y[j] - mean);
        done(r, j, c);
      });
    }
  }

  // f(row, j) for all samples of the tile and all parents, spread over the threads.
  template <typename F>
  CAPS_DEVICE void for_scores(const F& f) const {
    for (int n = thread; n < Tile::kSamples * layout.J; n += int(blockDim.x)) f(n / layout.J, n % layout.J);
  }

  template <int n>
  static CAPS_DEVICE Pack<T, n> pack_of(const T* from) {
    Pack<T, n> pack;
#pragma unroll
    for (int k = 0; k < n; ++k) pack[k] = from[k];
    return pack;
  }
  static CAPS_DEVICE Pack<T, kVec> pack_of(const T* from) { return pack_of<kVec>(from); }

 private:
  // What begins after so many bytes of shared memory.
  template <typename U>
  CAPS_DEVICE U* memory(int bytes) const {
    return reinterpret_cast<U*>(shared_ + bytes);
  }

  CAPS_DEVICE int stage(int n) const { return n & (args.stages - 1); }

  // Which of the walk's capsules, and which of its tiles, number n is. Divisions are slow, and passes need none; but a
  // tile of several parents has no registers for the choice.
  CAPS_DEVICE int in_group(int n) const {
    if (kParents == 1 && walk_.tiles == 1) return n;
    return n % walk_.count;
  }
  CAPS_DEVICE int of_tiles(int n) const {
    if (kParents == 1 && walk_.tiles == 1) return 0;
    return n / walk_.count;
  }
  CAPS_DEVICE int matrix_of(int capsule) const { return positions_ == 1 ? capsule : capsule / positions_; }

  // How many matrices come before that of capsule n of the walk. A walk over several tiles is over capsules that share a
  // matrix, or have each their own; where it is over one capsule, its matrix stays.
  CAPS_DEVICE int matrix(int n) const {
    if (positions_ == 1) return walk_.count == 1 ? 0 : n;
    return walk_.tiles == 1 ? matrix_of(walk_.i0 + n) - matrix_of(walk_.i0) : 0;
  }

  // Fetches capsule n of the walk, if there is one.
  CAPS_DEVICE void fetch(int n) const {
    if (n < walk_.count * walk_.tiles) {
      const int i = walk_.i0 + in_group(n);
      if (n == 0 || matrix(n) != matrix(n - 1)) fetch_weight(matrix_of(i), stage(matrix(n)));
      fetch_u(i, walk_.tile0 + of_tiles(n), stage(n));
    }
    async_commit();
  }

  // `rows` rows of `size` numbers into shared memory, 2^shift lanes to a row, by whole 16 bytes where `wide`; from(row) is where
  // one begins, and null where there is none and zeros are wanted.
  template <typename F>
  CAPS_DEVICE void fetch_rows(S* to, int to_row, int rows, int size, int64_t stride, bool wide, int shift,
                              const F& from) const {
    const int pieces = wide ? size / kUnit : size, lanes = 1 << shift;
    for (int r = thread >> shift; r < rows; r += int(blockDim.x) >> shift) {
      const S* row = from(r);
      for (int n = thread & (lanes - 1); n < pieces; n += lanes) {
        if (wide) async_copy(to + r * to_row + n * kUnit, row ? row + n * kUnit : nullptr);
        else to[r * to_row + n] = row ? row[n * stride] : S{};
      }
    }
  }

  CAPS_DEVICE void fetch_weight(int64_t matrix, int stage) const {
    const auto& w = args.weight;
    const S* from = static_cast<const S*>(w.data) + matrix * w.stride[0];
    S* to = memory<S>(0) + stage * layout.weight_size;
    constexpr int to_row = Tile::kWeightRow;
    if (layout.depth == layout.D && w.stride[1] == layout.D * w.stride[2]) {
      fetch_rows(to, to_row, layout.J * layout.D, layout.E, w.stride[3], args.wide_weight, args.weight_shift,
                 [&](int r) { return from + r * w.stride[2]; });
    } else {
      for (int j = 0; j < layout.J; ++j) {
        fetch_rows(to + j * layout.depth * to_row, to_row, layout.D, layout.E, w.stride[3], args.wide_weight,
                   args.weight_shift, [&](int r) { return from + j * w.stride[1] + r * w.stride[2]; });
      }
    }
  }

  CAPS_DEVICE void fetch_u(int64_t i, int64_t tile, int stage) const {
    const auto& u = args.u;
    const int64_t first = tile * Tile::kSamples;
    const S* from = static_cast<const S*>(u.data) + i * u.stride[1];
    S* to = memory<S>(layout.u_at) + stage * layout.u_size;
    fetch_rows(to, layout.u_row, Tile::kSamples, layout.D, u.stride[2], args.wide_u, args.u_shift,
               [&](int r) { return first + r < u.size[0] ? from + (first + r) * u.stride[0] : nullptr; });
  }

  CAPS_DEVICE void votes_by_fma(Values& x) const {
    const S *w = weight(), *us = u();
    for (int d0 = 0; d0 < layout.depth; d0 += kUnit) {
      Pack<T, kUnit> u_d[kRows];
#pragma unroll
      for (int m = 0; m < kRows; ++m) u_d[m] = load<kUnit>(us + row(m) * layout.u_row + d0);
#pragma unroll
      for (int k = 0; k < kParents; ++k) {
        if (!has(k)) continue;
#pragma unroll
        for (int d = 0; d < kUnit; ++d) {
          const S* at = w + (parent(k) * layout.depth + d0 + d) * Tile::kWeightRow + e_lane * kVec;
#pragma unroll
          for (int n = 0; n < kWidth; n += kVec) {
            const Pack<T, kVec> w_e = load<kVec>(at + n * kLanes);
#pragma unroll
            for (int m = 0; m < kRows; ++m) {
#pragma unroll
              for (int v = 0; v < kVec; ++v) x[k][m][n + v] += u_d[m][d] * w_e[v];
            }
          }
        }
      }
    }
  }

  // The fragments of m16n8k8: a thread's two samples, and for each 8 numbers e two neighbours.
  CAPS_DEVICE void votes_by_tensor_cores(Values& x) const {
    const S *w = weight(), *us = u();
    const int lane = thread % 32;
    for (int d0 = 0; d0 < layout.depth; d0 += 8) {
      uint32_t u_d[2];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        u_d[m] = *reinterpret_cast<const uint32_t*>(us + row(m) * layout.u_row + d0 + 2 * e_lane);
      }
#pragma unroll
      for (int k = 0; k < kParents; ++k) {
        if (!has(k)) continue;
        const S* at = w + (parent(k) * layout.depth + d0) * Tile::kWeightRow;
#pragma unroll
        for (int n = 0; n < kWidth; n += 4) {
          // Two squares of 8 rows d and 8 numbers e.
          uint32_t w_d[2];
          load_transposed(at + lane % 8 * Tile::kWeightRow + n * kLanes + lane / 8 % 2 * 8, w_d);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            T *upper = x[k][0] + n + 2 * half, *lower = x[k][1] + n + 2 * half;
            T c[4] = {upper[0], upper[1], lower[0], lower[1]};
            multiply_add<S>(c, u_d, w_d[half]);
            upper[0] = c[0];
            upper[1] = c[1];
            lower[0] = c[2];
            lower[1] = c[3];
          }
        }
      }
    }
  }

  unsigned char* const shared_;
  const int positions_ = int(args.positions);
  Walk walk_{};
  int at_ = -1;
};

}  // namespace caps::gpu
