// Tiles: kLanes<T> samples side by side in the SIMD lanes, so that nothing is summed across lanes, whatever the sizes.
// A tile's arrays are [rows][kLanes<T>]. Only for code compiled with CAPS_ISA.
#pragma once

#include <caps/across_lanes.h>
#include <caps/squash.h>

namespace caps::CAPS_ISA {

CAPS_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

// Runs f<T>() for the type in which sums are taken.
template <typename F>
CAPS_INLINE void with_accumulation_type(DType dtype, const F& f) {
  if (dtype == DType::float64) f.template operator()<double>();
  else f.template operator()<float>();
}

// `count` numbers `stride` apart in the type T, consecutive.
template <typename T, typename scalar_t>
CAPS_INLINE void widen_row(const scalar_t* from, int64_t stride, int64_t count, T* to) {
  constexpr int n = kLanes<T>;
  for (int64_t at = 0; at < count; at += n) {
    const int64_t some = min_of(count - at, n);
    const auto x =
        stride == 1 ? load_some<Vec<T>>(from + at, some) : load_strided<Vec<T>>(from + at * stride, stride, some);
    store_some(to + at, x, some);
  }
}

// Whether the numbers of a sample lie one after the other.
CAPS_INLINE bool rows_are_consecutive(const View<3>& x) {
  return x.stride[2] == 1 && (x.stride[1] == x.size[2] || x.size[1] == 1);
}

// The samples of one tile of a tensor [B, n0, n1] as [n0 · n1][kLanes]; lanes beyond the batch are 0.
template <typename T>
void pack(DType dtype, const View<3>& x, int64_t tile, int64_t first, int64_t n0, T* to) {
  using V = Vec<T>;
  constexpr int n = kLanes<T>;
  const int64_t count = min_of(x.size[0] - tile * n, n), n1 = x.size[2], rows = n0 * n1, step = x.stride[0];
  const int64_t whole = rows_are_consecutive(x) ? rows / n * n : 0;
  dispatch_floating(dtype, [&]<typename scalar_t>() {
    if constexpr (std::is_same_v<Acc<scalar_t>, T>) {
      const auto* base = static_cast<const scalar_t*>(x.data) + tile * n * step + first * x.stride[1];
      for (int64_t row = 0; row < whole; row += n) {
        V square[n];
#pragma GCC unroll 16
        for (int lane = 0; lane < n; ++lane) square[lane] = lane < count ? load<V>(base + lane * step + row) : V{};
        transpose(square);
#pragma GCC unroll 16
        for (int k = 0; k < n; ++k) store(to + (row + k) * n, square[k]);
      }
      for (int64_t lane = 0; lane < n; ++lane) {
        for (int64_t row = whole; row < rows; ++row) {
          const auto* from = base + lane * step + row / n1 * x.stride[1] + row % n1 * x.stride[2];
          to[row * n + lane] = lane < count ? load_one(from) : T(0);
        }
      }
    }
  });
}

// The reverse of `pack`. streamed: past the caches, where whole lines can be written (see `stream`).
template <typename T>
void unpack(DType dtype, const View<3>& x, int64_t tile, int64_t first, int64_t n0, const T* from,
            bool streamed = false) {
  using V = Vec<T>;
  constexpr int n = kLanes<T>;
  const int64_t count = min_of(x.size[0] - tile * n, n), n1 = x.size[2], rows = n0 * n1, step = x.stride[0];
  const int64_t whole = rows_are_consecutive(x) ? rows / n * n : 0;
  dispatch_floating(dtype, [&]<typename scalar_t>() {
    if constexpr (std::is_same_v<Acc<scalar_t>, T>) {
      auto* base = static_cast<scalar_t*>(x.data) + tile * n * step + first * x.stride[1];
      const bool lines = streamed && uintptr_t(base) % 64 == 0 && step * int64_t(sizeof(T)) % 64 == 0;
      for (int64_t row = 0; row < whole; row += n) {
        V square[n];
#pragma GCC unroll 16
        for (int k = 0; k < n; ++k) square[k] = load<V>(from + (row + k) * n);
        transpose(square);
        for (int lane = 0; lane < n && lane < count; ++lane) {
          if constexpr (std::is_same_v<scalar_t, T> && kCanStream<V>) {
            if (lines) {
              stream(base + lane * step + row, square[lane]);
              continue;
            }
          }
          store(base + lane * step + row, square[lane]);
        }
      }
      for (int64_t lane = 0; lane < count; ++lane) {
        for (int64_t row = whole; row < rows; ++row) {
          store_one(base + lane * step + row / n1 * x.stride[1] + row % n1 * x.stride[2], from[row * n + lane]);
        }
      }
    }
  });
}

// Asks for `count` numbers that will soon be read, unless there are none: where W is larger than the caches, what the
// processor foresees by itself ends at every page.
template <typename T>
CAPS_INLINE void prefetch(const T* from, int64_t offset, int64_t count) {
  for (int64_t n = 0; from && n < count; n += 64 / int64_t(sizeof(T))) __builtin_prefetch(from + offset + n);
}

// v [E][kLanes] from s [E][kLanes].
template <typename T>
void squash_lanes(const T* s, int64_t E, T* v) {
  using V = Vec<T>;
  constexpr int n = kLanes<T>;
  V square{};
  for (int64_t e = 0; e < E; ++e) square += load<V>(s + e * n) * load<V>(s + e * n);
  const V factor = squash_factor(square);
  for (int64_t e = 0; e < E; ++e) store(v + e * n, factor * load<V>(s + e * n));
  const auto plain = plain_scale(square);
  for (int lane = 0; lane < n; ++lane) {
    if (!plain[lane]) squash_any(s + lane, n, v + lane, n, E);
  }
}

// grad_s [E][kLanes] from grad_v and s; grad_s may not be one of them.
template <typename T>
void squash_lanes_backward(const T* grad_v, const T* s, int64_t E, T* grad_s) {
  using V = Vec<T>;
  constexpr int n = kLanes<T>;
  V square{}, dot{};
  for (int64_t e = 0; e < E; ++e) {
    const V x = load<V>(s + e * n);
    square += x * x;
    dot += x * load<V>(grad_v + e * n);
  }
  const auto [across, along] = squash_gradient(square);
  const V along_dot = along * dot;
  for (int64_t e = 0; e < E; ++e) {
    store(grad_s + e * n, across * load<V>(grad_v + e * n) + along_dot * load<V>(s + e * n));
  }
  const auto plain = plain_scale(square);
  for (int lane = 0; lane < n; ++lane) {
    if (!plain[lane]) squash_any_backward(grad_v + lane, n, s + lane, n, grad_s + lane, n, E);
  }
}

// The matrices of lower capsules, [J][D][E] consecutive in the type T: those of the tensor itself where they lie so,
// else copies of a few types at a time.
template <typename T>
class Weights {
 public:
  Weights(DType dtype, const View<4>& weight, int64_t positions)
      : dtype_(dtype),
        weight_(weight),
        positions_(positions),
        own_matrices_(positions == 1),
        block_(weight.size[1] * weight.size[2] * weight.size[3]) {
    in_place_ = dtype == (sizeof(T) == 8 ? DType::float64 : DType::float32) && weight.stride[3] == 1 &&
                weight.stride[2] == weight.size[3] && weight.stride[1] == weight.size[2] * weight.size[3];
  }

  // How many numbers the copies for `capsules` consecutive lower capsules take.
  int64_t copy_size(int64_t capsules) const { return in_place_ ? 0 : ((capsules - 1) / positions_ + 2) * block_; }
  void use_memory(T* copies) { copies_ = copies; }

  // Makes capsules first … last - 1 ready.
  void prepare(int64_t first, int64_t last) {
    const int64_t from = first / positions_, to = (last - 1) / positions_ + 1;
    if (in_place_ || (from_ <= from && to <= to_)) return;
    from_ = from;
    to_ = to;
    dispatch_floating(dtype_, [&]<typename scalar_t>() {
      if constexpr (std::is_same_v<Acc<scalar_t>, T>) {
        T* out = copies_;
        const int64_t E = weight_.size[3], D = weight_.size[2], J = weight_.size[1];
        const bool together = weight_.stride[3] == 1 && weight_.stride[2] == E && weight_.stride[1] == D * E;
        for (int64_t t = from; t < to; ++t) {
          if (together) {
            widen_row(static_cast<const scalar_t*>(weight_.data) + t * weight_.stride[0], 1, block_, out);
            out += block_;
            continue;
          }
          for (int64_t j = 0; j < J; ++j) {
            for (int64_t d = 0; d < D; ++d, out += E) {
              const auto* row = static_cast<const scalar_t*>(weight_.data) + t * weight_.stride[0] +
                                j * weight_.stride[1] + d * weight_.stride[2];
              widen_row(row, weight_.stride[3], E, out);
            }
          }
        }
      }
    });
  }

  // Those of lower capsule i where they lie, or null: for prefetching.
  CAPS_INLINE const T* ahead(int64_t i) const {
    return in_place_ && i < weight_.size[0] * positions_ ? (*this)(i) : nullptr;
  }

  // The matrices [J][D][E] of lower capsule i.
  CAPS_INLINE const T* operator()(int64_t i) const {
    const int64_t t = own_matrices_ ? i : i / positions_;
    return in_place_ ? static_cast<const T*>(weight_.data) + t * weight_.stride[0] : copies_ + (t - from_) * block_;
  }

 private:
  DType dtype_;
  const View<4>& weight_;
  int64_t positions_;
  bool own_matrices_;  // a lower capsule's; asked as positions_ == 1, GCC divides all the same
  int64_t block_, from_ = -1, to_ = -1;
  bool in_place_;
  T* copies_ = nullptr;
};

}  // namespace caps::CAPS_ISA
