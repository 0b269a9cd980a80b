// dense_capsules on a GPU for sizes outside the table of tiles: a warp for each sample, lanes along e, nothing kept but
// three numbers of each softmax. û is made again wherever it is needed.
#pragma once

#include <caps/gpu_dense.h>

namespace caps::gpu {

template <typename scalar>
class DensePlain {
 public:
  using scalar_t = scalar;
  using T = Acc<scalar>;
  static constexpr int kWarps = 8, kBlocks = 2, kSamples = kWarps;

  CAPS_DEVICE explicit DensePlain(const DenseArgs& a)
      : args_(a),
        B_(a.u.size[0]),
        I_(a.u.size[1]),
        J_(a.weight.size[1]),
        D_(a.weight.size[2]),
        E_(a.weight.size[3]),
        all_(B_ * J_ * E_) {}

  // A pass of forward (t = 0 is the first) over a tile of samples and a chunk of lower capsules.
  CAPS_DEVICE void route(int64_t tile, int64_t chunk, int64_t t) const {
    const int64_t b = tile * kSamples + warp_;
    if (b >= B_) return;
    const T* V = static_cast<const T*>(args_.V) + b * J_ * E_;
    const bool last = t == args_.iterations - 1 && args_.coupling.data;
    pass(b, chunk, [&](int64_t i, const auto& add) {
      const Stats softmax = t == 0 ? Stats{} : stats<false>(b, i, V, nullptr);
      for (int64_t j = 0; j < J_; ++j) {
        const T c = t == 0 ? T(1) : softmax.coupling(dots<false>(b, i, j, V, nullptr).logit);
        add(j, c);
        if (last && lane_ == 0) {
          static_cast<scalar_t*>(args_.coupling.data)[(b * I_ + i) * J_ + j] = narrow<scalar_t>(t == 0 ? uniform() : c);
        }
      }
    });
  }

  // A pass of backward for iteration t.
  CAPS_DEVICE void route_backward(int64_t tile, int64_t chunk, int64_t t) const {
    const int64_t b = tile * kSamples + warp_;
    if (b >= B_) return;
    const T *V = vector(args_.V, t - 1, b), *g = vector(args_.g, t, b);
    pass(b, chunk, [&](int64_t i, const auto& add) {
      const Stats softmax = stats<true>(b, i, V, g);
      for (int64_t j = 0; j < J_; ++j) add(j, softmax.grad_logit(dots<true>(b, i, j, V, g)));
    });
  }

  // The gradients of one group of lower capsules.
  CAPS_DEVICE void gradients(int64_t group) const {
    const int64_t P = args_.positions, type = group / args_.parts, end = P > 1 ? (type + 1) * P : I_;
    const int64_t i0 = P > 1 ? type * P + group % args_.parts * args_.part : group * args_.part;
    const int64_t i1 = i0 + args_.part < end ? i0 + args_.part : end;
    for (int64_t i = i0; i < i1; ++i) {
      for (int64_t b = warp_; b < B_; b += warps_) grad_u(b, i);
      __syncthreads();
      for (int64_t j = warp_; j < J_; j += warps_) grad_weight(i, j, P > 1 ? group : i, i > i0 && P > 1);
      __syncthreads();
    }
  }

 private:
  struct Dots {
    T logit, gc;
  };

  // A softmax over j: c = exp(logit - most) · inverse; mean = Σ c gc.
  struct Stats {
    T most, inverse, mean;
    CAPS_DEVICE T coupling(T logit) const { return exp(logit - most) * inverse; }
    CAPS_DEVICE T grad_logit(Dots d) const { return coupling(d.logit) * (d.gc - mean); }
  };

  CAPS_DEVICE T uniform() const { return 1 / T(J_ + (args_.leaky ? 1 : 0)); }
  CAPS_DEVICE const T* vector(const void* from, int64_t t, int64_t b) const {
    return static_cast<const T*>(from) + t * all_ + b * J_ * E_;
  }
  CAPS_DEVICE const scalar_t* u(int64_t b, int64_t i) const {
    return static_cast<const scalar_t*>(args_.u.data) + b * args_.u.stride[0] + i * args_.u.stride[1];
  }
  CAPS_DEVICE const scalar_t* weight(int64_t i, int64_t j) const {
    const auto& w = args_.weight;
    return static_cast<const scalar_t*>(w.data) + i / args_.positions * w.stride[0] + j * w.stride[1];
  }

  // û_ije of a sample.
  CAPS_DEVICE T vote(int64_t b, int64_t i, int64_t j, int64_t e) const {
    const scalar_t *from = u(b, i), *w = weight(i, j) + e * args_.weight.stride[3];
    T sum = 0;
    for (int64_t d = 0; d < D_; ++d) sum += widen(from[d * args_.u.stride[2]]) * widen(w[d * args_.weight.stride[2]]);
    return sum;
  }

  // û · V, and û · g where asked for.
  template <bool backward>
  CAPS_DEVICE Dots dots(int64_t b, int64_t i, int64_t j, const T* V, const T* g) const {
    Dots sums{};
    for (int64_t e = lane_; e < E_; e += 32) {
      const T x = vote(b, i, j, e);
      sums.logit += x * V[j * E_ + e];
      if constexpr (backward) sums.gc += x * g[j * E_ + e];
    }
    return {group_sum(sums.logit, 32), backward ? group_sum(sums.gc, 32) : T(0)};
  }

  template <bool backward>
  CAPS_DEVICE Stats stats(int64_t b, int64_t i, const T* V, const T* g) const {
    T most = 0, total = args_.leaky ? 1 : 0, mean = 0;
    for (int64_t j = 0; j < J_; ++j) {
      const Dots d = dots<backward>(b, i, j, V, g);
      const T before = most;
      most = j == 0 && !args_.leaky ? d.logit : larger(d.logit, most);
      const T kept = total == 0 ? T(0) : exp(before - most), power = exp(d.logit - most);
      total = total * kept + power;
      if constexpr (backward) mean = mean * kept + power * d.gc;
    }
    return {most, 1 / total, mean / total};
  }

  // partial[chunk] of a sample becomes Σ_i f's coefficients · û.
  template <typename F>
  CAPS_DEVICE void pass(int64_t b, int64_t chunk, const F& f) const {
    const int64_t i0 = chunk * args_.chunk, i1 = i0 + args_.chunk < I_ ? i0 + args_.chunk : I_;
    T* sums = static_cast<T*>(args_.partial) + chunk * all_ + b * J_ * E_;
    for (int64_t j = 0; j < J_; ++j) {
      for (int64_t e = lane_; e < E_; e += 32) sums[j * E_ + e] = 0;
    }
    for (int64_t i = i0; i < i1; ++i) {
      f(i, [&](int64_t j, T scale) {
        for (int64_t e = lane_; e < E_; e += 32) sums[j * E_ + e] += scale * vote(b, i, j, e);
      });
    }
  }

  CAPS_DEVICE T* stats_of(int64_t b, int64_t t) const {
    return static_cast<T*>(args_.stats) + ((int64_t(blockIdx.x) * B_ + b) * args_.iterations + t) * 3;
  }

  CAPS_DEVICE int64_t first_t() const { return args_.last_only ? args_.iterations - 1 : 0; }

  // f(c g + gb V of iteration t and number e) for the iterations that have a share in gû of a sample and parent.
  template <typename F>
  CAPS_DEVICE void for_iterations(int64_t b, int64_t i, int64_t j, const F& f) const {
    for (int64_t t = first_t(); t < args_.iterations; ++t) {
      const T* g = vector(args_.g, t, b);
      if (t == 0) {
        f([&](int64_t e) { return uniform() * g[j * E_ + e]; });
        continue;
      }
      const T *V = vector(args_.V, t - 1, b), *kept = stats_of(b, t);
      const Stats softmax{kept[0], kept[1], kept[2]};
      const Dots d = dots<true>(b, i, j, V, g);
      const T c = softmax.coupling(d.logit), gb = args_.last_only ? T(0) : softmax.grad_logit(d);
      f([&](int64_t e) { return args_.last_only ? c * g[j * E_ + e] : c * g[j * E_ + e] + gb * V[j * E_ + e]; });
    }
  }

  // grad_u of one sample and lower capsule; leaves the softmaxes of the sample in `stats`.
  CAPS_DEVICE void grad_u(int64_t b, int64_t i) const {
    for (int64_t t = first_t() > 1 ? first_t() : 1; t < args_.iterations; ++t) {
      const Stats softmax = stats<true>(b, i, vector(args_.V, t - 1, b), vector(args_.g, t, b));
      T* kept = stats_of(b, t);
      __syncwarp();  // all have read what was there
      if (lane_ == 0) {
        kept[0] = softmax.most;
        kept[1] = softmax.inverse;
        kept[2] = softmax.mean;
      }
      __syncwarp();
    }
    for (int64_t d0 = 0; d0 < D_; d0 += kStep) {
      T sums[kStep] = {};
      for (int64_t j = 0; j < J_; ++j) {
        const scalar_t* w = weight(i, j);
        for_iterations(b, i, j, [&](const auto& grad) {
          for (int64_t e = lane_; e < E_; e += 32) {
            const T x = grad(e);
#pragma unroll
            for (int d = 0; d < kStep; ++d) {
              if (d0 + d < D_) sums[d] += x * widen(w[(d0 + d) * args_.weight.stride[2] + e * args_.weight.stride[3]]);
            }
          }
        });
      }
#pragma unroll
      for (int d = 0; d < kStep; ++d) {
        const T sum = group_sum(sums[d], 32);
        if (lane_ == 0 && d0 + d < D_) {
          static_cast<scalar_t*>(args_.grad_u.data)[(b * I_ + i) * D_ + d0 + d] = narrow<scalar_t>(sum);
        }
      }
    }
  }

  // The share of one lower capsule in a parent's part of matrix n: set, or added to what is there.
  CAPS_DEVICE void grad_weight(int64_t i, int64_t j, int64_t n, bool add) const {
    for (int64_t e0 = 0; e0 < E_; e0 += 32) {
      const int64_t e = e0 + lane_;
      for (int64_t d0 = 0; d0 < D_; d0 += kStep) {
        T sums[kStep] = {};
        for (int64_t b = 0; b < B_; ++b) {
          const scalar_t* from = u(b, i);
          for_iterations(b, i, j, [&](const auto& grad) {
            const T x = e < E_ ? grad(e) : T(0);
#pragma unroll
            for (int d = 0; d < kStep; ++d) {
              if (d0 + d < D_) sums[d] += x * widen(from[(d0 + d) * args_.u.stride[2]]);
            }
          });
        }
        for (int d = 0; d < kStep && d0 + d < D_ && e < E_; ++d) {
          const int64_t at = ((n * J_ + j) * D_ + d0 + d) * E_ + e;
          T* part = static_cast<T*>(args_.weight_parts) + at;
          if (!args_.weight_parts) static_cast<scalar_t*>(args_.grad_weight.data)[at] = narrow<scalar_t>(sums[d]);
          else *part = add ? *part + sums[d] : sums[d];
        }
      }
    }
  }

  static constexpr int kStep = 8;
  const DenseArgs& args_;
  const int64_t B_, I_, J_, D_, E_, all_;
  const int lane_ = int(threadIdx.x) % 32, warp_ = int(threadIdx.x) / 32, warps_ = int(blockDim.x) / 32;
};

template <typename Tile>
constexpr bool is_plain = false;
template <typename scalar_t>
constexpr bool is_plain<DensePlain<scalar_t>> = true;

}  // namespace caps::gpu
