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
        blocks((I + lanes - 1) / lanes) {}

  T* u(int64_t b, int64_t i) const { return static_cast<T*>(a.u_tiles) + (b * I + i) * D; }
  T* votes(int64_t b, int64_t i) const { return static_cast<T*>(a.votes) + (b * I + i) * size; }
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
  for (int64_t j = 0; j < l.J; ++j) {
    squash_any(s + j * l.width, 1, v + j * l.width, 1, l.E);
    for (int64_t e = l.E; e < l.width; ++e) v[j * l.width + e] = 0;
  }
}

template <typename T>
CAPS_INLINE void squash_rows_backward(const Rows<T>& l, const T* grad_v, const T* s, T* grad_s) {
  for (int64_t j = 0; j < l.J; ++j) {
    squash_any_backward(grad_v + j * l.width, 1, s + j * l.width, 1, grad_s + j * l.width, 1, l.E);
    for (int64_t e = l.E; e < l.width; ++e) grad_s[j * l.width + e] = 0;
  }
}

// û of a chunk of lower capsules, all samples; with `sum` also the partial sums of the first iteration.
template <typename T>
void predict_chunk(const Rows<T>& l, Weights<T>& weights, int64_t chunk, bool sum) {
  const int64_t i0 = chunk * l.a.chunk, i1 = min_of(i0 + l.a.chunk, l.I);
  weights.prepare(i0, i1);
  for (int64_t n = 0; sum && n < l.B * l.size; ++n) l.partial(chunk, 0)[n] = 0;
  for (int64_t i = i0; i < i1; ++i) {
    const T* matrices = weights(i);
    for_blocks<4>(l.B, [&](auto block, int64_t b) __attribute__((always_inline)) {
      constexpr int n = decltype(block)::size;
      predict_rows<n>(l.u(b, i), l.I * l.D, matrices, b == 0 ? weights.ahead(i + 2) : nullptr, l.z, l.votes(b, i),
                      l.I * l.size, sum ? l.partial(chunk, b) : nullptr, l.size);
    });
  }
}

template <typename T>
CAPS_INLINE T sum_of_chunks(const Rows<T>& l, int64_t b, int64_t n) {
  T sum = l.partial(0, b)[n];
  for (int64_t chunk = 1; chunk < l.a.chunks; ++chunk) sum += l.partial(chunk, b)[n];
  return sum;
}

template <typename T>
void finish_iteration(const Rows<T>& l, int64_t b) {
  const DenseArgs& a = l.a;
  T *s = l.s(0, b), *v = l.total(b), *V = l.V(0, b);
  const T scale = a.t == 0 ? l.uniform() : T(1);
  for (int64_t n = 0; n < l.size; ++n) s[n] = scale * sum_of_chunks(l, b, n);
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

// From the partial sums of gV^{t-1}: Σ gV so far, and g^{t-1}.
template <typename T>
void finish_backward(const Rows<T>& l, int64_t b) {
  const int64_t t = l.a.t;
  T* total = l.total(b);
  for (int64_t n = 0; n < l.size; ++n) {
    const T sum = sum_of_chunks(l, b, n);
    total[n] = t == l.a.iterations - 1 ? sum : total[n] + sum;
  }
  squash_rows_backward(l, total, l.s(t - 1, b), l.g(t - 1, b));
}

// gû [J][padded] of sample b and lower capsule i.
template <typename T>
CAPS_INLINE void votes_gradient(const Rows<T>& l, int64_t b, int64_t i, T* out) {
  using V = Vec<T>;
  constexpr int lanes = kLanes<T>;
  const int64_t R = l.a.iterations, first = l.a.last_only ? R - 1 : 0, J = l.J, width = l.width;
  const bool full = !l.a.last_only;
  const T uniform = l.uniform(), *g0 = l.g(0, b);
  for (int64_t n = 0; n < l.size; n += lanes) store(out + n, first == 0 ? uniform * load<V>(g0 + n) : V{});
  for (int64_t t = first > 0 ? first : 1; t < R; ++t) {
    const T *c = l.kept(2 * (t - 1), b, i) + i % lanes, *gb = l.kept(2 * (t - 1) + 1, b, i) + i % lanes;
    const T *g = l.g(t, b), *Vt = l.V(t - 1, b);
    for (int64_t j = 0; j < J; ++j) {
      for (int64_t at = j * width; at < (j + 1) * width; at += lanes) {
        V sum = load<V>(out + at) + c[j * lanes] * load<V>(g + at);
        if (full) sum += gb[j * lanes] * load<V>(Vt + at);
        store(out + at, sum);
      }
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
    prefetch(weights.ahead(i + 1), 0, matrices);
    for_blocks<4>(l.B, [&](auto block, int64_t b) __attribute__((always_inline)) {
      constexpr int n = decltype(block)::size;
      for (int k = 0; k < n; ++k) votes_gradient(l, b + k, i, grad_votes + k * l.size);
      const Write how = b > 0 ? Write::add : a.stream && l.B == n && direct ? Write::stream : Write::set;
      row_gradients<n>(grad_votes, l.u(b, i), l.I * l.D, weights(i), l.z, sums, how, grad_u + b * l.D, l.D);
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
