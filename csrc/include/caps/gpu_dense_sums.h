// What happens to the vectors of dense_capsules between passes on a GPU: partial sums of chunks become s, v and V, or
// gV and g; and the last sums of the gradients. A warp takes one vector [E] at a time.
#pragma once

#include <caps/gpu_dense.h>
#include <caps/gpu_squash.h>

namespace caps::gpu {

template <typename scalar_t>
class DenseSums {
  using T = Acc<scalar_t>;

 public:
  CAPS_DEVICE explicit DenseSums(const DenseArgs& a)
      : args_(a), J_(a.weight.size[1]), E_(a.weight.size[3]), vectors_(a.u.size[0] * J_), width_(a.sum_lanes) {}

  // s, v and V of iteration t from the partial sums.
  CAPS_DEVICE void finish_iteration(int64_t t) const {
    const int64_t R = args_.iterations;
    const T factor = t == 0 ? 1 / T(J_ + (args_.leaky ? 1 : 0)) : T(1);
    const auto* bias = static_cast<const scalar_t*>(args_.bias.data);
    T *all_s = static_cast<T*>(args_.s.data) + t * vectors_ * E_, *all_V = static_cast<T*>(args_.V);
    for_vectors([&](int64_t vector, int64_t, int64_t j) {
      T *s = all_s + vector * E_, *V = all_V + vector * E_;
      add_chunks(vector, [&](int64_t e, T sum) {
        sum *= factor;
        if (bias) sum += widen(bias[j * args_.bias.stride[0] + e * args_.bias.stride[1]]);
        s[e] = sum;
      });
      T scale;
      const auto f = squash_of_lanes<T>([&](int64_t e) { return s[e]; }, first_, width_, E_, 32, scale);
      for (int64_t e = first_; e < E_; e += width_) {
        const T v = f.factor * (s[e] * scale);
        if (t == R - 1) static_cast<scalar_t*>(args_.v.data)[vector * E_ + e] = narrow<scalar_t>(v);
        else V[e] = t == 0 ? v : V[e] + v;
      }
    });
  }

  // V of all iterations but the last, and g of the last, from s and grad_v.
  CAPS_DEVICE void start_backward() const {
    const int64_t R = args_.iterations;
    T* V = static_cast<T*>(args_.V);
    for_vectors([&](int64_t vector, int64_t b, int64_t j) {
      for (int64_t t = 0; t < R - 1; ++t) {
        const auto s = total_input(t, b, j);
        T scale;
        const auto f = squash_of_lanes<T>(s, first_, width_, E_, 32, scale);
        for (int64_t e = first_; e < E_; e += width_) {
          const int64_t at = (t * vectors_ + vector) * E_ + e;
          V[at] = (t == 0 ? T(0) : V[at - vectors_ * E_]) + f.factor * (s(e) * scale);
        }
      }
      const auto& grad = args_.grad_v;
      put_g(R - 1, vector, b, j, [&](int64_t e) {
        const auto* from = static_cast<const scalar_t*>(grad.data);
        return widen(from[b * grad.stride[0] + j * grad.stride[1] + e * grad.stride[2]]);
      });
    });
  }

  // Σ gV and g of iteration t - 1 from the partial sums of gV, in the pass of iteration t.
  CAPS_DEVICE void finish_backward(int64_t t) const {
    const bool first = t == args_.iterations - 1;
    for_vectors([&](int64_t vector, int64_t b, int64_t j) {
      T* total = static_cast<T*>(args_.total) + vector * E_;
      add_chunks(vector, [&](int64_t e, T sum) { total[e] = first ? sum : total[e] + sum; });
      put_g(t - 1, vector, b, j, [&](int64_t e) { return total[e]; });
    });
  }

  // How many items grad_bias makes, each of 32 numbers.
  static CAPS_BOTH int64_t bias_items(const DenseArgs& args) {
    return args.grad_bias.data ? (args.weight.size[1] * args.weight.size[3] + 31) / 32 : 0;
  }

  // One of them. A warp adds a part of the iterations and samples; `shared` holds a number for each thread.
  CAPS_DEVICE void bias_gradient(int64_t item, T* shared) const {
    const int64_t size = J_ * E_, n = item * 32 + lane_, B = args_.u.size[0], R = args_.iterations;
    const int warps = int(blockDim.x) / 32, warp = int(threadIdx.x) / 32;
    const T* g = static_cast<const T*>(args_.g);
    T sum = 0;
    for (int64_t row = (args_.last_only ? R - 1 : 0) * B + warp; n < size && row < R * B; row += warps) {
      sum += g[row * size + n];
    }
    __syncthreads();
    shared[threadIdx.x] = sum;
    __syncthreads();
    if (warp == 0 && n < size) {
      for (int other = 1; other < warps; ++other) sum += shared[other * 32 + lane_];
      static_cast<scalar_t*>(args_.grad_bias.data)[n] = narrow<scalar_t>(sum);
    }
    __syncthreads();
  }

  // grad_weight from the parts of each matrix.
  CAPS_DEVICE void add_weight_parts() const {
    const int64_t size = J_ * args_.weight.size[2] * E_, all = args_.weight.size[0] * size;
    const T* parts = static_cast<const T*>(args_.weight_parts);
    for (int64_t n = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; n < all; n += int64_t(gridDim.x) * blockDim.x) {
      const T* of_matrix = parts + n / size * args_.parts * size + n % size;
      T sum = of_matrix[0];
      for (int64_t part = 1; part < args_.parts; ++part) sum += of_matrix[part * size];
      static_cast<scalar_t*>(args_.grad_weight.data)[n] = narrow<scalar_t>(sum);
    }
  }

 private:
  // f(vector, b, j) for the vectors of this warp, which all its lanes run through.
  template <typename F>
  CAPS_DEVICE void for_vectors(const F& f) const {
    const int64_t warps = blockDim.x / 32, step = gridDim.x * warps;
    for (int64_t vector = blockIdx.x * warps + threadIdx.x / 32; vector < vectors_; vector += step) {
      f(vector, vector / J_, vector % J_);
    }
  }

  // put(e, Σ over chunks) for the numbers of this lane. Groups of lanes share the chunks, and are added as a tree.
  template <typename F>
  CAPS_DEVICE void add_chunks(int64_t vector, const F& put) const {
    const T* partial = static_cast<const T*>(args_.partial) + vector * E_;
    const int64_t step = vectors_ * E_;
    const int groups = 32 / width_;
    for (int64_t e0 = 0; e0 < E_; e0 += width_) {
      const int64_t e = e0 + lane_ % width_;
      T sum = 0;
#pragma unroll 4
      for (int64_t chunk = lane_ / width_; chunk < args_.chunks; chunk += groups) {
        if (e < E_) sum += partial[chunk * step + e];
      }
      for (int bit = 16; bit >= width_; bit /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bit);
      if (e < E_ && lane_ < width_) put(e, sum);
    }
  }

  CAPS_DEVICE auto total_input(int64_t t, int64_t b, int64_t j) const {
    const auto& s = args_.s;
    const T* from = static_cast<const T*>(s.data) + t * s.stride[0] + b * s.stride[1] + j * s.stride[2];
    return [from, stride = s.stride[3]](int64_t e) { return from[e * stride]; };
  }

  // g of iteration t, from the gradient of v.
  template <typename F>
  CAPS_DEVICE void put_g(int64_t t, int64_t vector, int64_t b, int64_t j, const F& grad_v) const {
    const auto s = total_input(t, b, j);
    T scale, dot = 0;
    const auto f = squash_of_lanes<T>(s, first_, width_, E_, 32, scale);
    for (int64_t e = first_; e < E_; e += width_) dot += s(e) * scale * grad_v(e);
    dot = group_sum(dot, 32) * f.along;
    T* g = static_cast<T*>(args_.g) + (t * vectors_ + vector) * E_;
    for (int64_t e = first_; e < E_; e += width_) g[e] = f.across * grad_v(e) + dot * (s(e) * scale);
  }

  const DenseArgs& args_;
  const int64_t J_, E_, vectors_;
  const int lane_ = int(threadIdx.x) % 32;
  const int width_;                                    // lanes along e; the others hold other chunks
  const int64_t first_ = lane_ < width_ ? lane_ : E_;  // the first number of this lane, or E
};

}  // namespace caps::gpu
