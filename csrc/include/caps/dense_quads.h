// dense_capsules over a group of quad tiles, û kept: what its kernels do with one quad tile, or with a chunk of lower
// capsules of a bundle of them.
// Only for code compiled with CAPS_ISA.
#pragma once

#include <caps/dense.h>
#include <caps/quad_routing.h>

namespace caps::CAPS_ISA {
namespace {

constexpr int kQuadBundle = quad_bundle(kVectorBytes);

// The sizes and the scratch of a call, for numbers of type T.
template <typename T>
struct Quads {
  static constexpr int lanes = kLanes<T>, quad = kQuad<T>, samples = kQuadSamples<T>;
  const DenseArgs& a;
  Sizes z;
  int64_t B, I, J, D, E, width, size, row, blocks;  // width: of a vote; size: J·width; row: J·lanes; blocks of `quad`
  int64_t first, group;                             // the quad tiles at work
  int64_t all;                                      // numbers of all quad tiles

  explicit Quads(const DenseArgs& args)
      : a(args),
        z{args.u.size[1], args.weight.size[1], args.u.size[2], args.weight.size[3], args.leaky},
        B(args.u.size[0]),
        I(z.in_capsules),
        J(z.out_capsules),
        D(z.in_dim),
        E(z.out_dim),
        width(quads_of<T>(E) * lanes),
        size(J * width),
        row(J * lanes),
        blocks((I + quad - 1) / quad),
        first(args.first),
        group(min_of(args.group, args.quad_tiles - args.first)),
        all(args.quad_tiles * size) {}

  // Arrays of the group; n counts its quad tiles.
  T* votes(int64_t n, int64_t i) const {
    return static_cast<T*>(a.votes) + n * blocks * quad * size + i / quad * quad * size + i % quad * width;
  }
  T* partial(int64_t chunk, int64_t n) const { return static_cast<T*>(a.partial) + (chunk * a.group + n) * size; }
  // Arrays of all quad tiles in backward, of those of the group in forward.
  T* total(int64_t tile) const { return static_cast<T*>(a.total) + tile * size; }
  T* s(int64_t t, int64_t tile) const { return static_cast<T*>(a.s_tiles) + t * all + tile * size; }
  T* V(int64_t t, int64_t tile) const { return static_cast<T*>(a.V) + t * all + tile * size; }
  T* g(int64_t t, int64_t tile) const { return static_cast<T*>(a.g) + t * all + tile * size; }
  // [J] vectors for the block of lower capsules with number i / quad.
  T* kept(int64_t index, int64_t tile, int64_t i) const {
    return static_cast<T*>(a.coefficients) + ((index * a.quad_tiles + tile) * blocks + i / quad) * row;
  }
  T uniform() const { return T(1) / T(J + (z.leaky ? 1 : 0)); }
  // Samples of a quad tile that exist.
  int64_t count(int64_t tile) const { return min_of(B - tile * samples, samples); }
};

// Calls f(row of the tensor, j, sample) for every vote-sized row of a quad tile's samples in a tensor [B, J, E].
template <typename scalar_t, typename T, typename F>
CAPS_INLINE void for_rows(const Quads<T>& l, int64_t tile, scalar_t* x, int64_t b_stride, int64_t j_stride,
                          const F& f) {
  for (int64_t sample = 0; sample < l.count(tile); ++sample) {
    for (int64_t j = 0; j < l.J; ++j) f(x + (tile * l.samples + sample) * b_stride + j * j_stride, j, sample);
  }
}

template <typename T, typename out_t>
CAPS_INLINE void write_quads(const Quads<T>& l, int64_t tile, const T* quads, out_t* out, int64_t b_stride,
                             int64_t j_stride) {
  for_rows(l, tile, out, b_stride, j_stride, [&](out_t* to, int64_t j, int64_t sample) __attribute__((always_inline)) {
    const T* from = quads + j * l.width + sample * l.quad;
    for (int64_t e = 0; e < l.E; e += l.quad, from += l.lanes) {
      store_some(to + e, load<QuadVec<T>>(from), min_of(l.E - e, l.quad));
    }
  });
}

// Numbers of samples that do not exist are 0.
template <typename T, typename in_t>
CAPS_INLINE void read_quads(const Quads<T>& l, int64_t tile, const in_t* in, int64_t b_stride, int64_t j_stride,
                            int64_t e_stride, T* quads) {
  for (int64_t n = 0; l.count(tile) < l.samples && n < l.size; ++n) quads[n] = 0;
  for_rows(l, tile, in, b_stride, j_stride,
           [&](const in_t* from, int64_t j, int64_t sample) __attribute__((always_inline)) {
             T* to = quads + j * l.width + sample * l.quad;
             for (int64_t e = 0; e < l.E; e += l.quad, to += l.lanes) {
               const int64_t some = min_of(l.E - e, l.quad);
               store(to, e_stride == 1 ? load_some<QuadVec<T>>(from + e, some)
                                       : load_strided<QuadVec<T>>(from + e * e_stride, e_stride, some));
             }
           });
}

// A task of the passes: a chunk of lower capsules of one bundle of the group.
struct QuadTask {
  int64_t chunk, i0, i1, first, tiles;  // lower capsules i0 … i1 - 1; `tiles` quad tiles from `first` on

  template <typename T>
  QuadTask(const Quads<T>& l, int64_t task) {
    const int64_t bundles = (l.group + kQuadBundle - 1) / kQuadBundle;
    chunk = task / bundles;
    i0 = chunk * l.a.chunk;
    i1 = min_of(i0 + l.a.chunk, l.I);
    first = task % bundles * kQuadBundle;
    tiles = min_of(l.group - first, kQuadBundle);
  }
};

// u of `count` lower capsules from i on as predict_quads wants it, [count][D][tiles] vectors.
template <typename T>
void spread_inputs(const Quads<T>& l, const QuadTask& task, int64_t i, int64_t count, T* x) {
  constexpr int lanes = kLanes<T>, quad = kQuad<T>, samples = kQuadSamples<T>;
  const View<3> u = l.a.u;
  const int64_t D = l.D, tiles = task.tiles, step = tiles * lanes, stride = u.stride[2];
  dispatch_floating(l.a.dtype, [&]<typename scalar_t>() {
    if constexpr (std::is_same_v<Acc<scalar_t>, T>) {
      for (int64_t n = 0; n < tiles; ++n) {
        const int64_t b = (l.first + task.first + n) * samples, some = min_of(u.size[0] - b, samples);
        for (int64_t m = 0; m < count; ++m) {
          const auto* from = static_cast<const scalar_t*>(u.data) + b * u.stride[0] + (i + m) * u.stride[1];
          // Those of the next block: too short a way through memory to be seen coming.
          for (int64_t k = 0; k < some && stride == 1; ++k) prefetch(from + k * u.stride[0], quad * u.stride[1], D);
          T* to = x + m * D * step + n * lanes;
          for (int64_t d = 0; d < D; d += quad, from += quad * stride, to += quad * step) {
            const int64_t numbers = min_of(D - d, quad);
            QuadVec<T> rows[samples];
            CAPS_UNROLL
            for (int64_t k = 0; k < samples; ++k) {
              const auto* row = from + k * u.stride[0];
              if (k >= some) rows[k] = QuadVec<T>{};
              else if (stride != 1) rows[k] = load_strided<QuadVec<T>>(row, stride, numbers);
              else if (numbers < quad) rows[k] = load_some<QuadVec<T>>(row, numbers);
              else rows[k] = load<QuadVec<T>>(row);
            }
            Vec<T> picked[quad];
            pick_each<T>(quads_of_samples<T>(rows, std::make_integer_sequence<int, samples>()), picked,
                         std::make_integer_sequence<int, quad>());
            CAPS_UNROLL
            for (int k = 0; k < quad; ++k) {
              if (k < numbers) store(to + k * step, picked[k]);
            }
          }
        }
      }
    }
  });
}

// Numbers of scratch that a kernel needs: u of a block and c and gb of those routed at once, or three votes.
template <typename T>
CAPS_INLINE int64_t scratch_size(const Quads<T>& l) {
  const int64_t block = l.quad * l.D * kQuadBundle * l.lanes + 2 * kQuadBlocks * l.row;
  return block > 3 * l.E ? block : 3 * l.E;
}

// û of one block; with `sum` also the partial sums of the first iteration.
template <bool sum, typename T>
CAPS_INLINE void predict_block(const Quads<T>& l, const Weights<T>& weights, const QuadTask& task, int64_t i, T* x) {
  const int64_t count = min_of(l.I - i, l.quad), step = l.votes(1, 0) - l.votes(0, 0), x_step = task.tiles * l.lanes;
  spread_inputs(l, task, i, count, x);
  for_blocks<kQuadBundle>(task.tiles, [&](auto tiles, int64_t n) __attribute__((always_inline)) {
    predict_quads<decltype(tiles)::size, sum>(x + n * l.lanes, x_step, weights, i, count, l.z,
                                              l.votes(task.first + n, i), step,
                                              sum ? l.partial(task.chunk, task.first + n) : nullptr, l.size);
  });
  for (int64_t n = 0; n < task.tiles; ++n) {
    T* votes = l.votes(task.first + n, i);
    for (int64_t at = 0; count < l.quad && at < l.quad * l.size; at += l.width) {
      for (int64_t e = 0; at / l.width % l.quad >= count && e < l.width; ++e) votes[at + e] = 0;
    }
  }
}

// The pass of iteration t over `blocks` blocks of a quad tile of the group from lower capsule i on: in forward
// couplings and partial sums of s, in backward couplings, their gradients and partial sums of gV^{t-1}.
template <bool backward, typename T>
CAPS_INLINE void route_blocks(const Quads<T>& l, int64_t chunk, int64_t n, int64_t i, int64_t blocks, T* memory) {
  const int64_t t = l.a.t, tile = l.first + n, index = backward ? 2 * (t - 1) : 0;
  T* c = l.a.keep ? l.kept(index, tile, i) : memory;
  T* gb = l.a.keep && backward ? l.kept(index + 1, tile, i) : memory + kQuadBlocks * l.row;
  route_quads<backward, T>(l.votes(n, i), blocks, l.z, backward ? l.V(t - 1, tile) : l.V(0, n),
                           backward ? l.g(t, tile) : nullptr, l.a.last_only ? nullptr : l.partial(chunk, n), c, gb);
}

template <typename T>
CAPS_INLINE void clear_partial(const Quads<T>& l, const QuadTask& task) {
  T* sums = l.partial(task.chunk, task.first);
  for (int64_t n = 0; n < task.tiles * l.size; ++n) sums[n] = 0;
}

// û, and in forward the partial sums of the first iteration; in backward, while û is in the innermost cache, the pass
// of the last iteration, for which all is known.
template <bool backward, typename T>
void predict_task(const Quads<T>& l, Weights<T>& weights, const QuadTask& task, T* memory) {
  weights.prepare(task.i0, task.i1);
  clear_partial(l, task);
  for (int64_t i = task.i0; i < task.i1; i += l.quad) {
    predict_block<!backward>(l, weights, task, i, memory);
    if constexpr (!backward) continue;
    T* own = memory + l.quad * l.D * kQuadBundle * l.lanes;
    for (int64_t n = 0; n < task.tiles; ++n) route_blocks<true>(l, task.chunk, task.first + n, i, 1, own);
  }
}

template <bool backward, typename T>
void route_task(const Quads<T>& l, const QuadTask& task, T* memory) {
  const int64_t step = kQuadBlocks * l.quad;
  clear_partial(l, task);
  for (int64_t n = task.first; n < task.first + task.tiles; ++n) {
    for (int64_t i = task.i0; i < task.i1; i += step) {
      route_blocks<backward>(l, task.chunk, n, i, (min_of(task.i1 - i, step) + l.quad - 1) / l.quad, memory);
    }
  }
}

// Σ of the partial sums of all chunks: kLanes numbers from place `at` on.
template <typename T>
CAPS_INLINE Vec<T> sum_of_chunks(const Quads<T>& l, int64_t n, int64_t at) {
  auto sum = load<Vec<T>>(l.partial(0, n) + at);
  for (int64_t chunk = 1; chunk < l.a.chunks; ++chunk) sum += load<Vec<T>>(l.partial(chunk, n) + at);
  return sum;
}

template <typename T>
void finish_iteration(const Quads<T>& l, int64_t n, T* memory) {
  const DenseArgs& a = l.a;
  const int64_t tile = l.first + n;
  T *s = l.s(0, n), *v = l.total(n), *V = l.V(0, n);
  const T scale = a.t == 0 ? l.uniform() : T(1);
  for (int64_t at = 0; at < l.size; at += l.lanes) store(s + at, scale * sum_of_chunks(l, n, at));
  dispatch_floating(a.dtype, [&]<typename scalar_t>() {
    if constexpr (std::is_same_v<Acc<scalar_t>, T>) {
      const auto* bias = static_cast<const scalar_t*>(a.bias.data);
      for (int64_t at = 0; bias && at < l.J * l.E; ++at) {
        const int64_t j = at / l.E, e = at % l.E;
        T* to = s + j * l.width + e / l.quad * l.lanes + e % l.quad;
        for (int64_t sample = 0; sample < l.samples; ++sample) {
          to[sample * l.quad] += load_one(bias + j * a.bias.stride[0] + e * a.bias.stride[1]);
        }
      }
      for (int64_t at = 0; at < l.size; at += l.width) squash_quads(s + at, l.E, v + at, memory);
      if (a.t == a.iterations - 1) {
        write_quads(l, tile, v, static_cast<scalar_t*>(a.v.data), a.v.stride[0], a.v.stride[1]);
      }
    }
  });
  for (int64_t at = 0; at < l.size; at += l.lanes) {
    store(V + at, a.t == 0 ? load<Vec<T>>(v + at) : load<Vec<T>>(V + at) + load<Vec<T>>(v + at));
  }
  write_quads(l, tile, s, static_cast<T*>(a.s.data) + a.t * a.s.stride[0], a.s.stride[1], a.s.stride[2]);
}

template <typename T>
void start_backward(const Quads<T>& l, int64_t tile, T* memory) {
  const DenseArgs& a = l.a;
  for (int64_t t = 0; t < a.iterations; ++t) {
    const T* from = static_cast<const T*>(a.s.data) + t * a.s.stride[0];
    T *s = l.s(t, tile), *V = l.V(t, tile);
    read_quads(l, tile, from, a.s.stride[1], a.s.stride[2], a.s.stride[3], s);
    for (int64_t at = 0; at < l.size; at += l.width) squash_quads(s + at, l.E, V + at, memory);
    for (int64_t at = 0; t > 0 && at < l.size; at += l.lanes) {
      store(V + at, load<Vec<T>>(V + at) + load<Vec<T>>(l.V(t - 1, tile) + at));
    }
  }
  dispatch_floating(a.dtype, [&]<typename scalar_t>() {
    if constexpr (std::is_same_v<Acc<scalar_t>, T>) {
      const auto* grad_v = static_cast<const scalar_t*>(a.grad_v.data);
      read_quads(l, tile, grad_v, a.grad_v.stride[0], a.grad_v.stride[1], a.grad_v.stride[2], l.total(tile));
    }
  });
  for (int64_t at = 0; at < l.size; at += l.width) {
    squash_quads_backward(l.total(tile) + at, l.s(a.iterations - 1, tile) + at, l.E, l.g(a.iterations - 1, tile) + at,
                          memory);
  }
}

// From the partial sums of gV^{t-1}: Σ gV so far, and g^{t-1}.
template <typename T>
void finish_backward(const Quads<T>& l, int64_t n, T* memory) {
  const int64_t t = l.a.t, tile = l.first + n;
  T* total = l.total(tile);
  for (int64_t at = 0; at < l.size; at += l.lanes) {
    const auto sum = sum_of_chunks(l, n, at);
    store(total + at, t == l.a.iterations - 1 ? sum : load<Vec<T>>(total + at) + sum);
  }
  for (int64_t at = 0; at < l.size; at += l.width) {
    squash_quads_backward(total + at, l.s(t - 1, tile) + at, l.E, l.g(t - 1, tile) + at, memory);
  }
}

// A quad row of each of the quad tiles that make up a tile, at `rows` and each `step` numbers after the one before, as
// kQuad vectors in whose lanes lie the samples of the tile; those of quad tiles that do not exist are 0. next: the
// distance to what will be asked for next, or 0.
template <typename T>
CAPS_INLINE void load_lanes_of_tile(const DenseArgs& a, int64_t tile, const T* rows, int64_t step, int64_t next,
                                    Vec<T>* lanes) {
  for (int k = 0; k < kQuad<T>; ++k) {
    const int64_t from = tile * kQuad<T> + k;
    // More streams than the processor sees coming.
    if (next > 0) __builtin_prefetch(rows + from * step + next, 0, 2);
    lanes[k] = from < a.quad_tiles ? load<Vec<T>>(rows + from * step) : Vec<T>{};
  }
  quads_to_lanes<T>(lanes, std::make_integer_sequence<int, kLanes<T>>());
}

// An array [J·E] of a tile from those of its quad tiles.
template <typename T>
void tile_from_quads(const Quads<T>& l, int64_t tile, const T* quads, T* out) {
  for (int64_t at = 0; at < l.size; at += l.lanes) {
    const int64_t e = at % l.width / l.lanes * l.quad;
    Vec<T> rows[kQuad<T>];
    load_lanes_of_tile(l.a, tile, quads + at, l.size, 0, rows);
    for (int64_t k = 0; k < l.quad && e + k < l.E; ++k) store(out + (at / l.width * l.E + e + k) * l.lanes, rows[k]);
  }
}

// Coefficients of lower capsules i … i + count - 1 and one tile, [count][J], from those of its quad tiles.
template <typename T>
void coefficients_from_quads(const Quads<T>& l, int64_t index, int64_t tile, int64_t i, int64_t count, T* out) {
  for (int64_t block = i / l.quad; block * l.quad < i + count; ++block) {
    for (int64_t at = 0; at < l.row; at += l.lanes) {
      Vec<T> rows[kQuad<T>];
      load_lanes_of_tile(l.a, tile, l.kept(index, 0, block * l.quad) + at, l.blocks * l.row, l.row, rows);
      for (int64_t k = 0; k < l.quad; ++k) {
        const int64_t m = block * l.quad + k - i;
        if (m >= 0 && m < count) store(out + m * l.row + at, rows[k]);
      }
    }
  }
}

}  // namespace
}  // namespace caps::CAPS_ISA
