// dense_capsules sample by sample, û kept: what its kernels do with one sample, or one chunk of lower capsules.
// Only for code compiled with CAPS_ISA.
#pragma once

#include <caps/dense.h>
#include <caps/row_routing.h>

namespace caps::CAPS_ISA {
namespace {

// The sizes and the scratch of a call, for numbers of type T.
template <typename T>
struct Rows {
  static constexpr int lanes = kLanes<T>;
  const DenseArgs& a;
  Sizes z;
  int64_t B, I, J, D, E, width, size, row, blocks;  // size: J·width; row: J·lanes; blocks of `lanes` lower capsules
  int64_t sample;                                   // numbers of û of one

  explicit Rows(const DenseArgs& args)
      : a(args),
        z{args.u.size[1], args.weight.size[1], args.u.size[2], args.weight.size[3], args.leaky},
        B(args.tiles),
        I(z.in_capsules),
        J(z.out_capsules),
        D(z.in_dim),
        E(z.out_dim),
        width(padded<T>(E)),
        size(J * width),
        row(J * lanes),
        blocks((I + lanes - 1) / lanes),
        sample(blocks * lanes * size) {}

  T* u(int64_t b, int64_t i) const { return static_cast<T*>(a.u_tiles) + b * a.u_step + i * D; }
  T* votes(int64_t b, int64_t i) const {
    return static_cast<T*>(a.votes) + b * sample + (i / lanes * row + i % lanes) * width;
  }
  T* partial(int64_t chunk, int64_t b) const { return static_cast<T*>(a.partial) + (chunk * B + b) * size; }
  T* total(int64_t b) const { return static_cast<T*>(a.total) + b * size; }
  T* s(int64_t t, int64_t b) const { return static_cast<T*>(a.s_tiles) + (t * B + b) * size; }
  T* V(int64_t t, int64_t b) const { return static_cast<T*>(a.V) + (t * B + b) * size; }
  T* g(int64_t t, int64_t b) const { return static_cast<T*>(a.g) + (t * B + b) * size; }
  // [J][lanes] for the block of lower capsules with number i / lanes.
  T* kept(int64_t index, int64_t b, int64_t i) const {
    return static_cast<T*>(a.coefficients) + ((index * B + b) * blocks + i / lanes) * row;
  }
  T uniform() const { return T(1) / T(J + (z.leaky ? 1 : 0)); }
};

template <typename T, typename out_t>
CAPS_INLINE void write_rows(const Rows<T>& l, const T* rows, out_t* out, int64_t j_stride, int64_t e_stride) {
  for (int64_t j = 0; j < l.J; ++j) {
    for (int64_t e = 0; e < l.E; ++e) store_one(out + j * j_stride + e * e_stride, rows[j * l.width + e]);
  }
}

template <typename T, typename in_t>
CAPS_INLINE void read_rows(const Rows<T>& l, const in_t* in, int64_t j_stride, int64_t e_stride, T* rows) {
  for (int64_t j = 0; j < l.J; ++j) {
    for (int64_t e = 0; e < l.width; ++e)
      rows[j * l.width + e] = e < l.E ? load_one(in + j * j_stride + e * e_stride) : T(0);
  }
}

// v from s; numbers behind E are 0 in both.
template <typename T>
CAPS_INLINE void squash_rows(const Rows<T>& l, const T* s, T* v) {
  for (int64_t at = 0; at < l.size; at += l.width) squash_row(s + at, v + at, l.width);
}

template <typename T>
CAPS_INLINE void squash_rows_backward(const Rows<T>& l, const T* grad_v, const T* s, T* grad_s) {
  for (int64_t at = 0; at < l.size; at += l.width) squash_row_backward(grad_v + at, s + at, grad_s + at, l.width);
}

// û of a chunk of lower capsules, all samples; with `sum` also the partial sums of the first iteration. Votes up to a
// whole block are 0.
template <typename T>
void predict_chunk(const Rows<T>& l, Weights<T>& weights, int64_t chunk, bool sum) {
  const int64_t i0 = chunk * l.a.chunk, i1 = min_of(i0 + l.a.chunk, l.I);
  weights.prepare(i0, i1);
  for (int64_t n = 0; sum && n < l.B * l.size; ++n) l.partial(chunk, 0)[n] = 0;
  for (int64_t i = i0; i < i1; ++i) {
    const T* matrices = weights(i);
    prefetch_pages(weights.ahead(i + 1), l.J * l.D * l.E);
    for_blocks<4>(l.B, [&](auto block, int64_t b) __attribute__((always_inline)) {
      constexpr int n = decltype(block)::size;
      predict_rows<n>(l.u(b, i), l.a.u_step, matrices, l.z, l.votes(b, i), l.sample,
                      sum ? l.partial(chunk, b) : nullptr, l.size);
    });
  }
  for (int64_t i = i1; i1 == l.I && i % l.lanes != 0; ++i) {
    for (int64_t b = 0; b < l.B; ++b) {
      for (int64_t j = 0; j < l.J; ++j) {
        for (int64_t e = 0; e < l.width; ++e) l.votes(b, i)[j * l.lanes * l.width + e] = 0;
      }
    }
  }
}

template <typename T>
CAPS_INLINE int64_t blocks_of(const Rows<T>& l, int64_t chunk) {
  return (min_of(l.a.chunk, l.I - chunk * l.a.chunk) + l.lanes - 1) / l.lanes;
}

// Σ of the partial sums of all chunks: kLanes numbers from place n on.
template <typename T>
CAPS_INLINE Vec<T> sum_of_chunks(const Rows<T>& l, int64_t b, int64_t n) {
  auto sum = load<Vec<T>>(l.partial(0, b) + n);
  for (int64_t chunk = 1; chunk < l.a.chunks; ++chunk) sum += load<Vec<T>>(l.partial(chunk, b) + n);
  return sum;
}

template <typename T>
void finish_iteration(const Rows<T>& l, int64_t b) {
  const DenseArgs& a = l.a;
  T *s = l.s(0, b), *v = l.total(b), *V = l.V(0, b);
  const T scale = a.t == 0 ? l.uniform() : T(1);
  for (int64_t n = 0; n < l.size; n += l.lanes) store(s + n, scale * sum_of_chunks(l, b, n));
  dispatch_floating(a.dtype, [&]<typename scalar_t>() {
    if constexpr (std::is_same_v<Acc<scalar_t>, T>) {
      const auto* bias = static_cast<const scalar_t*>(a.bias.data);
      for (int64_t n = 0; bias && n < l.J * l.E; ++n) {
        s[n / l.E * l.width + n % l.E] += load_one(bias + n / l.E * a.bias.stride[0] + n % l.E * a.bias.stride[1]);
      }
      squash_rows(l, s, v);
      if (a.t == a.iterations - 1) {
        write_rows(l, v, static_cast<scalar_t*>(a.v.data) + b * a.v.stride[0], a.v.stride[1], a.v.stride[2]);
      }
    }
  });
  for (int64_t n = 0; n < l.size; ++n) V[n] = a.t == 0 ? v[n] : V[n] + v[n];
  write_rows(l, s, static_cast<T*>(a.s.data) + a.t * a.s.stride[0] + b * a.s.stride[1], a.s.stride[2], a.s.stride[3]);
}

template <typename T>
void start_backward(const Rows<T>& l, int64_t b) {
  const DenseArgs& a = l.a;
  for (int64_t t = 0; t < a.iterations; ++t) {
    const T* s = static_cast<const T*>(a.s.data) + t * a.s.stride[0] + b * a.s.stride[1];
    read_rows(l, s, a.s.stride[2], a.s.stride[3], l.s(t, b));
    squash_rows(l, l.s(t, b), l.V(t, b));
    for (int64_t n = 0; t > 0 && n < l.size; ++n) l.V(t, b)[n] += l.V(t - 1, b)[n];
  }
  dispatch_floating(a.dtype, [&]<typename scalar_t>() {
    if constexpr (std::is_same_v<Acc<scalar_t>, T>) {
      const auto* grad_v = static_cast<const scalar_t*>(a.grad_v.data) + b * a.grad_v.stride[0];
      read_rows(l, grad_v, a.grad_v.stride[1], a.grad_v.stride[2], l.total(b));
    }
  });
  squash_rows_backward(l, l.total(b), l.s(a.iterations - 1, b), l.g(a.iterations - 1, b));
}

// The pass of iteration t over a chunk of one sample: couplings, their gradients and, where these count, partial sums
// of gV^{t-1}.
template <typename T>
void route_chunk_backward(const Rows<T>& l, int64_t chunk, int64_t b, int64_t t) {
  T* sums = l.a.last_only ? nullptr : l.partial(chunk, b);
  for (int64_t n = 0; sums && n < l.size; ++n) sums[n] = 0;
  const int64_t i = chunk * l.a.chunk;
  route_rows<true>(l.votes(b, i), blocks_of(l, chunk), l.z, l.V(t - 1, b), l.g(t, b), sums, true,
                   l.kept(2 * (t - 1), b, i), l.kept(2 * (t - 1) + 1, b, i));
}

// From the partial sums of gV^{t-1}: Σ gV so far, and g^{t-1}.
template <typename T>
void finish_backward(const Rows<T>& l, int64_t b) {
  const int64_t t = l.a.t;
  T* total = l.total(b);
  for (int64_t n = 0; n < l.size; n += l.lanes) {
    const auto sum = sum_of_chunks(l, b, n);
    store(total + n, t == l.a.iterations - 1 ? sum : load<Vec<T>>(total + n) + sum);
  }
  squash_rows_backward(l, total, l.s(t - 1, b), l.g(t - 1, b));
}

// gû [J][padded] of sample b and lower capsule i.
template <typename T>
CAPS_INLINE void votes_gradient(const Rows<T>& l, int64_t b, int64_t i, T* out) {
  using V = Vec<T>;
  constexpr int lanes = kLanes<T>;
  const int64_t R = l.a.iterations, width = l.width;
  const int64_t first = l.a.last_only && R > 1 ? R - 1 : 1;  // before it only the first, whose couplings are alike
  const int64_t kept_step = l.kept(1, 0, 0) - l.kept(0, 0, 0), step = l.B * l.size;
  const bool full = !l.a.last_only, uniform_counts = full || R == 1;
  const T uniform = l.uniform(), *coefficients = l.kept(2 * (first - 1), b, i) + i % lanes;
  for (int64_t j = 0; j < l.J; ++j, coefficients += lanes) {
    for (int64_t at = j * width; at < (j + 1) * width; at += lanes) {
      V sum = uniform_counts ? uniform * load<V>(l.g(0, b) + at) : V{};
      const T *c = coefficients, *g = l.g(first, b) + at, *Vt = l.V(first - 1, b) + at;
      for (int64_t t = first; t < R; ++t, c += 2 * kept_step, g += step, Vt += step) {
        sum += c[0] * load<V>(g);
        if (full) sum += c[kept_step] * load<V>(Vt);
      }
      store(out + at, sum);
    }
  }
}

// The last pass over a chunk of lower capsules. memory: grad_weight [J·D·E], grad_u [B][D], grad_votes [4][J][padded].
template <typename T>
void chunk_gradients(const Rows<T>& l, Weights<T>& weights, int64_t chunk, T* grad_weight, T* grad_u, T* grad_votes) {
  constexpr int lanes = kLanes<T>;
  const DenseArgs& a = l.a;
  const int64_t i0 = chunk * a.chunk, i1 = min_of(i0 + a.chunk, l.I), matrices = l.J * l.D * l.E;
  // Sums over the samples are taken in the result itself where it is of their type.
  const bool direct = a.dtype == (sizeof(T) == 8 ? DType::float64 : DType::float32);
  weights.prepare(i0, i1);
  for (int64_t i = i0; i < i1; ++i) {
    T* sums = direct ? static_cast<T*>(a.grad_weight.data) + i * matrices : grad_weight;
    prefetch_pages(weights.ahead(i + 1), matrices);
    for_blocks<4>(l.B, [&](auto block, int64_t b) __attribute__((always_inline)) {
      constexpr int n = decltype(block)::size;
      for (int k = 0; k < n; ++k) votes_gradient(l, b + k, i, grad_votes + k * l.size);
      const Write how = b > 0 ? Write::add : a.stream && l.B == n && direct ? Write::stream : Write::set;
      row_gradients<n>(grad_votes, l.u(b, i), a.u_step, weights(i), l.z, sums, how, grad_u + b * l.D, l.D);
    });
    dispatch_floating(a.dtype, [&]<typename scalar_t>() {
      if constexpr (std::is_same_v<Acc<scalar_t>, T>) {
        auto* out_weight = static_cast<scalar_t*>(a.grad_weight.data) + i * matrices;
        for (int64_t n = 0; !direct && n < matrices; n += lanes) {
          const int64_t some = min_of(matrices - n, lanes);
          store_some(out_weight + n, load_some<Vec<T>>(grad_weight + n, some), some);
        }
        auto* out_u = static_cast<scalar_t*>(a.grad_u.data) + i * a.grad_u.stride[1];
        for (int64_t b = 0; b < l.B; ++b) {
          for (int64_t d = 0; d < l.D; ++d) {
            store_one(out_u + b * a.grad_u.stride[0] + d * a.grad_u.stride[2], grad_u[b * l.D + d]);
          }
        }
      }
    });
  }
}

}  // namespace
}  // namespace caps::CAPS_ISA
