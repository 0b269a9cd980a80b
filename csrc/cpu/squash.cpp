// squash: v = (|s|² / (1 + |s|²)) · s / |s|, and its gradient. caps_kernels/ops/squash has the mathematics.
//
// Tensors are seen as [outer, E, inner] with contiguous results. Where E is the last dimension (inner = 1) rows are
// read with lanes along E; elsewhere lanes run along `inner`, or along `outer` where the input's strides ask for it.
#include <caps/kernel.h>

namespace caps {

struct SquashArgs {
  DType dtype;
  View<3> s, grad_v;  // [outer, E, inner]; grad_v only in backward
  View<3> out;        // v or grad_s
  bool stream;  // `out` is so large, and its rows are whole cache lines, that it is better written past the caches
};

// Chunks of kSquashChunk vectors, counted over outer · inner.
constexpr int64_t kSquashChunk = 256;
CAPS_KERNEL(squash_forward, SquashArgs)
CAPS_KERNEL(squash_backward, SquashArgs)

}  // namespace caps

#ifdef CAPS_ISA

#include <caps/squash.h>

namespace caps::CAPS_ISA {
namespace {

constexpr int kBlock = 64;  // rows whose lengths are handled at once

template <typename scalar_t>
CAPS_INLINE scalar_t* at(const View<3>& view, int64_t outer, int64_t inner) {
  return static_cast<scalar_t*>(view.data) + outer * view.stride[0] + inner * view.stride[2];
}

// Rows of E consecutive numbers, lanes along E. Passes: sums over E, factors of a block of rows, results.
template <typename V, typename scalar_t, bool backward>
void rows(const SquashArgs& args, int64_t begin, int64_t end) {
  using T = Acc<scalar_t>;
  constexpr int n = kLanesOf<V>;
  const int64_t E = args.s.size[1], whole = E / n * n, rest = E - whole;
  alignas(64) T square[kBlock], dot[kBlock], along[kBlock];

  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t count = end - first < kBlock ? end - first : kBlock;
    for (int64_t row = 0; row < count; ++row) {
      const scalar_t* s = at<scalar_t>(args.s, first + row, 0);
      const scalar_t* g = backward ? at<scalar_t>(args.grad_v, first + row, 0) : nullptr;
      V squares{}, dots{};
      for (int64_t e = 0; e < whole; e += n) {
        const V x = load<V>(s + e);
        squares += x * x;
        if constexpr (backward) dots += x * load<V>(g + e);
      }
      if (rest > 0) {
        const V x = load_some<V>(s + whole, rest);
        squares += x * x;
        if constexpr (backward) dots += x * load_some<V>(g + whole, rest);
      }
      square[row] = reduce_add(squares);
      if constexpr (backward) dot[row] = reduce_add(dots);
    }

    // `square` becomes the factor of s (forward) or of g (backward); 0 where the row is left to squash_any.
    for (int64_t row = 0; row < count; row += kLanes<T>) {
      const auto q = load<Vec<T>>(square + row);
      const auto plain = plain_scale(q);
      if constexpr (backward) {
        const auto [across_factor, along_factor] = squash_gradient(q);
        store(square + row, plain ? across_factor : Vec<T>{});
        store(along + row, along_factor * load<Vec<T>>(dot + row));
      } else {
        store(square + row, plain ? squash_factor(q) : Vec<T>{});
      }
    }

    for (int64_t row = 0; row < count; ++row) {
      const scalar_t* s = at<scalar_t>(args.s, first + row, 0);
      const scalar_t* g = backward ? at<scalar_t>(args.grad_v, first + row, 0) : nullptr;
      scalar_t* out = at<scalar_t>(args.out, first + row, 0);
      if (square[row] == 0) {
        if constexpr (backward) squash_any_backward(g, 1, s, 1, out, 1, E);
        else squash_any(s, 1, out, 1, E);
        continue;
      }
      const V factor = splat<V>(square[row]);
      const V factor_s = backward ? splat<V>(along[row]) : V{};
      for (int64_t e = 0; e < whole; e += n) {
        const V x = load<V>(s + e);
        const V result = backward ? factor * load<V>(g + e) + factor_s * x : factor * x;
        if constexpr (std::is_same_v<scalar_t, T> && kCanStream<V>) {
          if (args.stream) {
            stream(out + e, result);
            continue;
          }
        }
        store(out + e, result);
      }
      if (rest > 0) {
        const V x = load_some<V>(s + whole, rest);
        if constexpr (backward) store_some(out + whole, factor * load_some<V>(g + whole, rest) + factor_s * x, rest);
        else store_some(out + whole, factor * x, rest);
      }
    }
  }
}

template <typename V, typename scalar_t>
CAPS_INLINE V load_lanes(const scalar_t* from, int64_t stride, int64_t count) {
  if (stride == 1) return count == kLanesOf<V> ? load<V>(from) : load_some<V>(from, count);
  return load_strided<V>(from, stride, count);
}

template <typename V, typename scalar_t>
CAPS_INLINE void store_lanes(scalar_t* to, int64_t stride, V value, int64_t count) {
  if (stride != 1) store_strided(to, stride, value, count);
  else if (count == kLanesOf<V>) store(to, value);
  else store_some(to, value, count);
}

// `count` vectors side by side along `inner`, one in each lane.
template <typename scalar_t, bool backward>
void side_by_side(const SquashArgs& args, int64_t outer, int64_t inner, int64_t count) {
  using V = Vec<Acc<scalar_t>>;
  const scalar_t* s = at<scalar_t>(args.s, outer, inner);
  const scalar_t* g = backward ? at<scalar_t>(args.grad_v, outer, inner) : nullptr;
  scalar_t* out = at<scalar_t>(args.out, outer, inner);
  const int64_t E = args.s.size[1];
  const auto load_s = [&](int64_t e) { return load_lanes<V>(s + e * args.s.stride[1], args.s.stride[2], count); };
  const auto load_g = [&](int64_t e) {
    return load_lanes<V>(g + e * args.grad_v.stride[1], args.grad_v.stride[2], count);
  };

  V square{}, dot{};
  for (int64_t e = 0; e < E; ++e) {
    const V x = load_s(e);
    square += x * x;
    if constexpr (backward) dot += x * load_g(e);
  }
  const auto plain = plain_scale(square);
  const auto [across, along] = squash_gradient(square);
  const V along_dot = along * dot;
  for (int64_t e = 0; e < E; ++e) {
    const V x = load_s(e);
    V result = across * x;
    if constexpr (backward) result = across * load_g(e) + along_dot * x;
    store_lanes(out + e * args.out.stride[1], args.out.stride[2], result, count);
  }
  for (int64_t lane = 0; lane < count; ++lane) {
    if (plain[lane]) continue;
    const scalar_t* one = s + lane * args.s.stride[2];
    scalar_t* result = out + lane * args.out.stride[2];
    if constexpr (backward) {
      squash_any_backward(g + lane * args.grad_v.stride[2], args.grad_v.stride[1], one, args.s.stride[1], result,
                          args.out.stride[1], E);
    } else {
      squash_any(one, args.s.stride[1], result, args.out.stride[1], E);
    }
  }
}

template <typename scalar_t, bool backward>
void squash(const SquashArgs& args, int64_t begin, int64_t end) {
  using T = Acc<scalar_t>;
  constexpr int n = kLanes<T>;
  const int64_t E = args.s.size[1], inner = args.s.size[2];
  const bool consecutive =
      args.s.stride[1] == 1 && args.out.stride[1] == 1 && (!backward || args.grad_v.stride[1] == 1);
  if (inner == 1 && consecutive) {
    if constexpr (n > 4) {
      if (E <= n / 2) return rows<Vec<T, n / 2>, scalar_t, backward>(args, begin, end);
    }
    return rows<Vec<T>, scalar_t, backward>(args, begin, end);
  }
  for (int64_t first = begin; first < end;) {
    const int64_t outer = first / inner, column = first % inner;
    int64_t count = end - first < inner - column ? end - first : inner - column;
    count = count < n ? count : n;
    side_by_side<scalar_t, backward>(args, outer, column, count);
    first += count;
  }
}

template <bool backward>
void squash_chunks(const SquashArgs& args, int64_t begin, int64_t end) {
  const int64_t vectors = args.s.size[0] * args.s.size[2];
  const int64_t last = end * kSquashChunk < vectors ? end * kSquashChunk : vectors;
  dispatch_floating(args.dtype,
                    [&]<typename scalar_t>() { squash<scalar_t, backward>(args, begin * kSquashChunk, last); });
  finish_streaming();
}

}  // namespace

void squash_forward(const SquashArgs& args, int64_t begin, int64_t end) { squash_chunks<false>(args, begin, end); }
void squash_backward(const SquashArgs& args, int64_t begin, int64_t end) { squash_chunks<true>(args, begin, end); }

}  // namespace caps::CAPS_ISA

#else

#include <caps/op.h>

namespace caps {
namespace {

// The stride of dimensions first … last - 1 seen as one, or nothing where they cannot be.
std::optional<int64_t> merged_stride(const Tensor& tensor, int64_t first, int64_t last) {
  int64_t size = 1, stride = 1;
  for (int64_t n = last - 1; n >= first; --n) {
    if (tensor.size(n) == 1) continue;
    if (size == 1) stride = tensor.stride(n);
    else if (tensor.stride(n) != size * stride) return {};
    size *= tensor.size(n);
  }
  return stride;
}

// The tensor as [outer, E, inner]; one that cannot be seen so is copied.
View<3> view_around(Tensor& tensor, int64_t dim) {
  auto outer = merged_stride(tensor, 0, dim), inner = merged_stride(tensor, dim + 1, tensor.dim());
  if (!outer || !inner) {
    tensor = torch::stable::contiguous(tensor);
    outer = merged_stride(tensor, 0, dim);
    inner = merged_stride(tensor, dim + 1, tensor.dim());
  }
  View<3> view{
      const_cast<void*>(tensor.const_data_ptr()), {1, tensor.size(dim), 1}, {*outer, tensor.stride(dim), *inner}};
  for (int64_t n = 0; n < dim; ++n) view.size[0] *= tensor.size(n);
  for (int64_t n = dim + 1; n < tensor.dim(); ++n) view.size[2] *= tensor.size(n);
  return view;
}

// Vectors stand side by side along `outer` too.
void turn(View<3>& view) {
  std::swap(view.size[0], view.size[2]);
  std::swap(view.stride[0], view.stride[2]);
}

Tensor run(const KernelTable<SquashArgs>& kernel, Tensor s, std::optional<Tensor> grad_v, int64_t dim) {
  Tensor out = torch::stable::new_empty(s, s.sizes());
  dim = dim < 0 ? dim + s.dim() : dim;
  SquashArgs args{dtype_of(s), view_around(s, dim), {}, view_around(out, dim), false};
  args.grad_v = grad_v ? view_around(*grad_v, dim) : args.s;
  const int64_t size = args.s.size[1], vectors = args.s.size[0] * args.s.size[2];
  const bool rows = size > 1 && args.s.stride[1] == 1 && args.grad_v.stride[1] == 1;
  args.stream = worth_streaming(out) && size * int64_t(out.element_size()) % 64 == 0;
  if (args.s.size[2] == 1 && !rows) {
    for (View<3>* view : {&args.s, &args.grad_v, &args.out}) turn(*view);
  }
  launch(kernel, args, (vectors + kSquashChunk - 1) / kSquashChunk, kSquashChunk * (size + 8) / 4);
  return out;
}

Tensor squash_fwd(Tensor s, int64_t dim) { return run(squash_forward, s, {}, dim); }
Tensor squash_bwd(Tensor grad_v, Tensor s, int64_t dim) { return run(squash_backward, s, grad_v, dim); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(caps_kernels_cpp, m) {
  m.def("squash_fwd(Tensor s, int dim) -> Tensor");
  m.def("squash_bwd(Tensor grad_v, Tensor s, int dim) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(caps_kernels_cpp, CPU, m) {
  m.impl("squash_fwd", TORCH_BOX(&squash_fwd));
  m.impl("squash_bwd", TORCH_BOX(&squash_bwd));
}

}  // namespace caps

#endif
