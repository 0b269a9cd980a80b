// The steps of dynamic_routing on a GPU; csrc/cuda/dynamic_routing.cu puts them together.
//
// A sample's lower capsules are cut into chunks, and a chunk into tiles. A block takes a chunk of a sample: for each tile
// it gets the dot products of the votes with V (and g), a group of lanes a vote; the softmax over j, a warp a capsule; and
// adds up the votes by column, reading them again from the cache. Sums of chunks lie in global memory until a warp a
// higher capsule adds them up and squashes. Where a sample is one chunk, its block does all of it.
#pragma once

#include <caps/gpu_squash.h>

namespace caps::gpu {

constexpr int kRoutingThreads = 256, kRoutingWarps = kRoutingThreads / 32;

struct RoutingArgs {
  int64_t iterations;
  int leaky, last, with_coupling;  // flags
  View<4> votes;                   // [B, I, J, E]
  View<2> bias;                    // [J, E]; data may be null
  View<4> s;                       // [R, B, J, E] in the type of sums, as all below but the outputs
  View<3> grad_v;                  // [B, J, E]; only in backward
  void *v, *coupling;              // outputs of forward, contiguous
  void *grad_votes, *grad_bias;    // outputs of backward, contiguous
  void* partial;                   // [B, chunks, J, E]: sums of chunks
  void* total;                     // [B, J, E]: V so far, or the gradient that has reached it
  void *totals, *gradients;        // [R, B, J, E], in backward: V^0 … (the last unused), and g^t
  void* memory;                    // of blocks, `memory_size` numbers each, where shared memory is too small
  int64_t memory_size;
  int64_t chunk, chunks;    // lower capsules of a chunk, chunks of a sample
  int64_t tile;             // lower capsules of a tile
  int64_t size, columns;    // J · E, and how many packs of n numbers that is
  int64_t sharers;          // threads that share a column, each with lower capsules of its own
  int width;                // lanes of a vote
  int lanes;                // of a lower capsule, where registers hold its votes (caps/gpu_routing_warp.h), else 0
  int first_step, end_step;
};

// The number of this thread as something that the compiler cannot know: else it works out what all steps make of it before
// the first, and keeps that in registers.
CAPS_DEVICE int thread_of_step() {
  int thread = int(threadIdx.x);
#ifndef CAPS_ON_HOST
  asm volatile("" : "+r"(thread));
#endif
  return thread;
}

// Made anew for each step.
template <typename scalar_t, int n>
struct Routing {
  using Scalar = scalar_t;
  using T = Acc<scalar_t>;
  const RoutingArgs& args;
  T* memory;
  const int64_t B, I, J, E, columns, size;
  const int thread, lane, warp;
  const T uniform;  // c of the first iteration

  CAPS_DEVICE Routing(const RoutingArgs& args, T* memory)
      : args(args), memory(memory), B(args.votes.size[0]), I(args.votes.size[1]), J(args.votes.size[2]),
        E(args.votes.size[3]), columns(args.columns), size(args.size), thread(thread_of_step()), lane(thread % 32),
        warp(thread / 32), uniform(T(1) / T(J + args.leaky)) {}

  // Whether a block does all of its samples alone.
  CAPS_DEVICE bool whole_samples() const { return args.chunks == 1 && args.lanes == 0; }

  // Between steps: what any block wrote is seen by those that read it.
  CAPS_DEVICE void between_steps() const {
    if (whole_samples()) __syncthreads();
    else grid_barrier();
  }

  // f(b, chunk) for the chunks of this block.
  template <typename F>
  CAPS_DEVICE void each_chunk(const F& f) const {
    for (int64_t k = blockIdx.x; k < B * args.chunks; k += gridDim.x) f(k / args.chunks, k % args.chunks);
  }

  // f(b, j) for the higher capsules of this warp: of its block's own samples, or of all.
  template <typename F>
  CAPS_DEVICE void each_capsule(const F& f) const {
    if (whole_samples()) {
      for (int64_t b = blockIdx.x; b < B; b += gridDim.x) {
        for (int64_t j = warp; j < J; j += kRoutingWarps) f(b, j);
      }
    } else {
      const int64_t step = int64_t(gridDim.x) * kRoutingWarps;
      for (int64_t k = int64_t(warp) * gridDim.x + blockIdx.x; k < B * J; k += step) f(k / J, k % J);
    }
  }

  // f(first capsule, how many) for the tiles of a chunk.
  template <typename F>
  CAPS_DEVICE void each_tile(int64_t chunk, const F& f) const {
    const int64_t end = (chunk + 1) * args.chunk < I ? (chunk + 1) * args.chunk : I;
    for (int64_t i = chunk * args.chunk; i < end; i += args.tile) f(i, end - i < args.tile ? end - i : args.tile);
  }

  // The votes of column pack c (or of number e of capsule j) by lower capsule i.
  CAPS_DEVICE const scalar_t* vote(int64_t b, int64_t i, int64_t j, int64_t e) const {
    const View<4>& votes = args.votes;
    return static_cast<const scalar_t*>(votes.data) + b * votes.stride[0] + i * votes.stride[1] + j * votes.stride[2] +
           e * votes.stride[3];
  }

  CAPS_DEVICE T* totals_of(int64_t t, int64_t b) const { return static_cast<T*>(args.totals) + (t * B + b) * size; }
  CAPS_DEVICE T* gradients_of(int64_t t, int64_t b) const {
    return static_cast<T*>(args.gradients) + (t * B + b) * size;
  }
  CAPS_DEVICE T* s_of(int64_t t, int64_t b, int64_t j) const {
    return static_cast<T*>(args.s.data) + t * args.s.stride[0] + b * args.s.stride[1] + j * args.s.stride[2];
  }

  // out[l][j] = û_ij · x_j for the capsules i = first + l of a tile.
  CAPS_DEVICE void dots(int64_t b, int64_t first, int64_t count, const T* x, T* out) const {
    const int of_warp = 32 / args.width, groups = kRoutingThreads / args.width;
    const int group = thread / args.width, own = thread % args.width;
    // All lanes of a warp go round as often, for sums are taken by whole warps.
    for (int64_t start = group - group % of_warp; start < count * J; start += groups) {
      const int64_t pair = start + group % of_warp, l = pair / J, j = pair % J;
      T sum = 0;
      if (pair < count * J) {
        for (int64_t e = own * n; e < E; e += args.width * n) {
          const Pack<T, n> votes = load<n>(vote(b, first + l, j, e)), other = load<n>(x + j * E + e);
#pragma unroll
          for (int k = 0; k < n; ++k) sum += votes[k] * other[k];
        }
      }
      sum = group_sum(sum, args.width);
      if (pair < count * J && own == 0) out[pair] = sum;
    }
  }

  // x[l][j] becomes its softmax over j; where gc[l][j] is given, it becomes gb = c (gc - Σ_j c gc).
  CAPS_DEVICE void softmax(T* x, T* gc, int64_t count) const {
    for (int64_t l = warp; l < count; l += kRoutingWarps) {
      T most = args.leaky ? T(0) : T(-INFINITY);
      for (int64_t j = lane; j < J; j += 32) most = larger(x[l * J + j], most);
      most = group_max(most, 32);
      T sum = 0, mean = 0;
      for (int64_t j = lane; j < J; j += 32) sum += x[l * J + j] = exp(x[l * J + j] - most);
      sum = group_sum(sum, 32) + (args.leaky ? exp(-most) : T(0));
      const T inverse = 1 / sum;
      for (int64_t j = lane; j < J; j += 32) {
        x[l * J + j] *= inverse;
        if (gc != nullptr) mean += x[l * J + j] * gc[l * J + j];
      }
      if (gc == nullptr) continue;
      mean = group_sum(mean, 32);
      for (int64_t j = lane; j < J; j += 32) gc[l * J + j] = x[l * J + j] * (gc[l * J + j] - mean);
    }
  }

  // c^t of a tile, and gb^t where `gb` is given, both [tile, J]; t > 0. Ends with what was written seen by all.
  CAPS_DEVICE void coefficients(int64_t b, int64_t first, int64_t count, const T* total, const T* g, T* c, T* gb) const {
    dots(b, first, count, total, c);
    if (gb != nullptr) dots(b, first, count, g, gb);
    __syncthreads();
    softmax(c, gb, count);
    __syncthreads();
  }

  CAPS_DEVICE void clear(T* sums) const {
    for (int64_t k = thread; k < args.sharers * size; k += kRoutingThreads) sums[k] = 0;
    __syncthreads();
  }

  // sums[sharer] += Σ_l factor_lj û_ij over a tile; the factor is c[l][j], or `uniform` where c is null.
  CAPS_DEVICE void add(int64_t b, int64_t first, int64_t count, const T* c, T* sums) const {
    const int64_t apart = columns < kRoutingThreads ? columns : kRoutingThreads, sharer = thread / apart;
    if (sharer >= args.sharers) return;
    for (int64_t column = thread % apart; column < columns; column += apart) {
      const int64_t j = column * n / E, e = column * n % E;
      Pack<T, n> sum{};
      for (int64_t l = sharer; l < count; l += args.sharers) {
        const Pack<T, n> votes = load<n>(vote(b, first + l, j, e));
        const T factor = c == nullptr ? uniform : c[l * J + j];
#pragma unroll
        for (int k = 0; k < n; ++k) sum[k] += factor * votes[k];
      }
      T* to = sums + sharer * size + column * n;
#pragma unroll
      for (int k = 0; k < n; ++k) to[k] += sum[k];
    }
  }

  // The chunk's sum from those of the sharers, in their order.
  CAPS_DEVICE void put_chunk(int64_t b, int64_t chunk, const T* sums) const {
    __syncthreads();
    T* to = static_cast<T*>(args.partial) + (b * args.chunks + chunk) * size;
    for (int64_t k = thread; k < size; k += kRoutingThreads) {
      T sum = 0;
      for (int64_t sharer = 0; sharer < args.sharers; ++sharer) sum += sums[sharer * size + k];
      to[k] = sum;
    }
    __syncthreads();
  }

  // Number k of the sum of a sample's chunks.
  CAPS_DEVICE T sum_of_chunks(int64_t b, int64_t k) const {
    const T* partial = static_cast<const T*>(args.partial) + b * args.chunks * size + k;
    T sum = 0;
#pragma unroll 8
    for (int64_t chunk = 0; chunk < args.chunks; ++chunk) sum += partial[chunk * size];
    return sum;
  }

  // s^t of chunks, and the coupling coefficients in the last iteration.
  CAPS_DEVICE void forward_pass(int64_t t) const {
    T *c = memory, *sums = memory + args.tile * J;
    each_chunk([&](int64_t b, int64_t chunk) {
      clear(sums);
      each_tile(chunk, [&](int64_t first, int64_t count) {
        if (t > 0) coefficients(b, first, count, static_cast<T*>(args.total) + b * size, nullptr, c, nullptr);
        add(b, first, count, t > 0 ? c : nullptr, sums);
        if (args.with_coupling && t == args.iterations - 1) {
          scalar_t* to = static_cast<scalar_t*>(args.coupling) + (b * I + first) * J;
          for (int64_t k = thread; k < count * J; k += kRoutingThreads) to[k] = narrow<scalar_t>(t > 0 ? c[k] : uniform);
        }
        __syncthreads();
      });
      put_chunk(b, chunk, sums);
    });
  }

  // s^t, V^t and in the end v.
  CAPS_DEVICE void forward_finish(int64_t t) const {
    each_capsule([&](int64_t b, int64_t j) {
      T* s = s_of(t, b, j);
      for (int64_t e = lane; e < E; e += 32) {
        const scalar_t* bias = static_cast<const scalar_t*>(args.bias.data);
        const T offset = bias == nullptr ? T(0) : widen(bias[j * args.bias.stride[0] + e * args.bias.stride[1]]);
        s[e] = sum_of_chunks(b, j * E + e) + offset;
      }
      T scale;
      const auto f = squash_of_lanes<T>([&](int64_t e) { return s[e]; }, lane, 32, E, 32, scale);
      T* total = static_cast<T*>(args.total) + b * size + j * E;
      scalar_t* v = static_cast<scalar_t*>(args.v) + b * size + j * E;
      for (int64_t e = lane; e < E; e += 32) {
        const T value = f.factor * (s[e] * scale);
        if (t == args.iterations - 1) v[e] = narrow<scalar_t>(value);
        else total[e] = t == 0 ? value : total[e] + value;
      }
    });
  }

  // g^t of a higher capsule from the gradient that reaches v^t, given by number; saved s may have any strides.
  template <typename F>
  CAPS_DEVICE void put_gradient(int64_t t, int64_t b, int64_t j, const F& grad) const {
    const T* s = s_of(t, b, j);
    const int64_t stride = args.s.stride[3];
    T scale, dot = 0;
    const auto f = squash_of_lanes<T>([&](int64_t e) { return s[e * stride]; }, lane, 32, E, 32, scale);
    for (int64_t e = lane; e < E; e += 32) dot += s[e * stride] * scale * grad(e);
    dot = f.along * group_sum(dot, 32);
    T* g = gradients_of(t, b) + j * E;
    for (int64_t e = lane; e < E; e += 32) g[e] = f.across * grad(e) + dot * (s[e * stride] * scale);
  }

  // V of all iterations, and g of the last.
  CAPS_DEVICE void backward_start() const {
    each_capsule([&](int64_t b, int64_t j) {
      for (int64_t t = 0; t < args.iterations - 1; ++t) {
        const T* s = s_of(t, b, j);
        const int64_t stride = args.s.stride[3];
        T scale;
        const auto f = squash_of_lanes<T>([&](int64_t e) { return s[e * stride]; }, lane, 32, E, 32, scale);
        for (int64_t e = lane; e < E; e += 32) {
          const T before = t == 0 ? T(0) : totals_of(t - 1, b)[j * E + e];
          totals_of(t, b)[j * E + e] = before + f.factor * (s[e * stride] * scale);
        }
      }
      const View<3>& view = args.grad_v;
      const scalar_t* grad = static_cast<const scalar_t*>(view.data) + b * view.stride[0] + j * view.stride[1];
      put_gradient(args.iterations - 1, b, j, [&](int64_t e) { return widen(grad[e * view.stride[2]]); });
    });
  }

  // gV^{t-1} of chunks.
  CAPS_DEVICE void backward_pass(int64_t t) const {
    T *c = memory, *gb = memory + args.tile * J, *sums = memory + 2 * args.tile * J;
    each_chunk([&](int64_t b, int64_t chunk) {
      clear(sums);
      each_tile(chunk, [&](int64_t first, int64_t count) {
        coefficients(b, first, count, totals_of(t - 1, b), gradients_of(t, b), c, gb);
        add(b, first, count, gb, sums);
        __syncthreads();
      });
      put_chunk(b, chunk, sums);
    });
  }

  // g^{t-1}.
  CAPS_DEVICE void backward_finish(int64_t t) const {
    each_capsule([&](int64_t b, int64_t j) {
      T* total = static_cast<T*>(args.total) + b * size + j * E;
      for (int64_t e = lane; e < E; e += 32) {
        const T before = t == args.iterations - 1 ? T(0) : total[e];
        total[e] = before + sum_of_chunks(b, j * E + e);
      }
      put_gradient(t - 1, b, j, [&](int64_t e) { return total[e]; });
    });
  }

  // grad_votes: Σ_t c^t g^t + gb^t V^{t-1}, all coefficients of a tile first.
  CAPS_DEVICE void backward_votes() const {
    const int64_t R = args.iterations, each = args.tile * J, begin = args.last ? R - 1 : 0;
    each_chunk([&](int64_t b, int64_t chunk) {
      each_tile(chunk, [&](int64_t first, int64_t count) {
        for (int64_t t = R - 1; t > 0 && t >= begin; --t) {
          T* c = memory + (args.last ? 0 : 2 * (t - 1) * each);
          coefficients(b, first, count, totals_of(t - 1, b), gradients_of(t, b), c, args.last ? nullptr : c + each);
        }
        scalar_t* out = static_cast<scalar_t*>(args.grad_votes) + (b * I + first) * size;
        for (int64_t k = thread; k < count * columns; k += kRoutingThreads) {
          const int64_t l = k / columns, at = k % columns * n, pair = l * J + at / E;
          Pack<T, n> sum = load<n>(gradients_of(begin, b) + at);
          const T factor = begin == 0 ? uniform : memory[pair];
#pragma unroll
          for (int m = 0; m < n; ++m) sum[m] *= factor;
          for (int64_t t = begin + 1; t < R; ++t) {
            const T c = memory[2 * (t - 1) * each + pair], gb = memory[(2 * t - 1) * each + pair];
            const Pack<T, n> g = load<n>(gradients_of(t, b) + at), total = load<n>(totals_of(t - 1, b) + at);
#pragma unroll
            for (int m = 0; m < n; ++m) sum[m] += c * g[m] + gb * total[m];
          }
          store<scalar_t, n>(out + k * n, sum);
        }
        __syncthreads();
      });
    });
  }

  // grad_bias, samples added up in groups of 32.
  CAPS_DEVICE void backward_bias() const {
    const int64_t step = int64_t(gridDim.x) * kRoutingThreads;
    for (int64_t k = int64_t(blockIdx.x) * kRoutingThreads + thread; k < size; k += step) {
      T sum = 0;
      for (int64_t first = 0; first < B; first += 32) {
        T group = 0;
        for (int64_t b = first; b < B && b < first + 32; ++b) {
          for (int64_t t = args.iterations - 1; t >= (args.last ? args.iterations - 1 : 0); --t) {
            group += gradients_of(t, b)[k];
          }
        }
        sum += group;
      }
      static_cast<scalar_t*>(args.grad_bias)[k] = narrow<scalar_t>(sum);
    }
  }
};

}  // namespace caps::gpu
