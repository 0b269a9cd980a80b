// squash: v = (|s|² / (1 + |s|²)) · s / |s|, and its gradient. caps_kernels/ops/squash has the mathematics.
//
// Tensors are seen as [outer, E, inner] with contiguous results. Where E is the last dimension, a row lies across a
// group of lanes; elsewhere each thread has a vector of its own, and neighbours have neighbours.
#include <caps/gpu_squash.h>

namespace caps::gpu {
namespace {

struct SquashArgs {
  View<3> s, grad_v;  // [outer, E, inner]; grad_v only in backward
  View<3> out;        // v or grad_s
  int width;          // lanes of a row
};

// Threads of a block, and blocks of rows that share a processor at least: not so many that registers are spilled.
constexpr int kSquashThreads = 256, kSquashBlocks = 4;

template <typename scalar_t>
CAPS_DEVICE scalar_t* at(const View<3>& view, int64_t outer, int64_t inner) {
  return static_cast<scalar_t*>(view.data) + outer * view.stride[0] + inner * view.stride[2];
}

// Rows of E consecutive numbers, each across `width` lanes that hold n consecutive numbers at a time; inner is 1. Where a lane holds
// no more than n numbers of its row (`single`), they stay in registers between the two sums and the result.
template <typename scalar_t, int n, bool backward, bool single>
__global__ void __launch_bounds__(kSquashThreads, kSquashBlocks) squash_rows(const __grid_constant__ SquashArgs args) {
  using T = Acc<scalar_t>;
  const int64_t E = args.s.size[1], rows = args.s.size[0];
  const int lane = int(threadIdx.x) % args.width;
  const int64_t step = int64_t(gridDim.x) * (kSquashThreads / args.width), e_step = int64_t(args.width) * n;
  int64_t row = int64_t(blockIdx.x) * (kSquashThreads / args.width) + threadIdx.x / args.width;
  // Every lane of a warp goes round as often, for the sums are taken by whole warps.
  for (int64_t first = row - row % (32 / args.width); first < rows; first += step, row += step) {
    const int64_t size = row < rows ? E : 0;
    const scalar_t* s = at<scalar_t>(args.s, row, 0);
    const scalar_t* g = at<scalar_t>(backward ? args.grad_v : args.s, row, 0);
    scalar_t* out = at<scalar_t>(args.out, row, 0);
    Pack<T, n> kept{}, kept_g{};
    if (single && lane * n < size) {
      kept = load<n>(s + lane * n);
      if constexpr (backward) kept_g = load<n>(g + lane * n);
    }
    const auto s_at = [&](int64_t e) { return single ? kept : load<n>(s + e); };
    const auto g_at = [&](int64_t e) { return single ? kept_g : load<n>(g + e); };

    T largest = 0;
    for (int64_t e = lane * n; e < size; e += e_step) {
      const Pack<T, n> x = s_at(e);
#pragma unroll
      for (int k = 0; k < n; ++k) largest = larger(fabs(x[k]), largest);
    }
    const T scale = squash_scale(group_max(largest, args.width));
    T square = 0, dot = 0;
    for (int64_t e = lane * n; e < size; e += e_step) {
      const Pack<T, n> x = s_at(e), gradient = backward ? g_at(e) : Pack<T, n>{};
#pragma unroll
      for (int k = 0; k < n; ++k) {
        const T scaled = x[k] * scale;
        square += scaled * scaled;
        if constexpr (backward) dot += scaled * gradient[k];
      }
    }
    const auto f = squash_factors(group_sum(square, args.width), scale);
    if constexpr (backward) dot = f.along * group_sum(dot, args.width);
    for (int64_t e = lane * n; e < size; e += e_step) {
      Pack<T, n> x = s_at(e), gradient = backward ? g_at(e) : Pack<T, n>{};
#pragma unroll
      for (int k = 0; k < n; ++k) {
        const T scaled = x[k] * scale;
        x[k] = backward ? f.across * gradient[k] + dot * scaled : f.factor * scaled;
      }
      store<scalar_t, n>(out + e, x);
    }
  }
}

// A vector a thread, neighbouring threads along `inner`.
template <typename scalar_t, bool backward>
__global__ void __launch_bounds__(kSquashThreads) squash_columns(const __grid_constant__ SquashArgs args) {
  using T = Acc<scalar_t>;
  const int64_t E = args.s.size[1], inner = args.s.size[2], count = args.s.size[0] * inner;
  const int64_t step = int64_t(gridDim.x) * kSquashThreads;
  for (int64_t at_once = int64_t(blockIdx.x) * kSquashThreads + threadIdx.x; at_once < count; at_once += step) {
    const int64_t outer = at_once / inner, rest = at_once - outer * inner;  // a division of 64 bits is a call
    const scalar_t* s = at<scalar_t>(args.s, outer, rest);
    const scalar_t* g = at<scalar_t>(backward ? args.grad_v : args.s, outer, rest);
    scalar_t* out = at<scalar_t>(args.out, outer, rest);
    T largest = 0;
    for (int64_t e = 0; e < E; ++e) largest = larger(fabs(widen(s[e * args.s.stride[1]])), largest);
    const T scale = squash_scale(largest);
    T square = 0, dot = 0;
    for (int64_t e = 0; e < E; ++e) {
      const T scaled = widen(s[e * args.s.stride[1]]) * scale;
      square += scaled * scaled;
      if constexpr (backward) dot += scaled * widen(g[e * args.grad_v.stride[1]]);
    }
    const auto f = squash_factors(square, scale);
    dot *= f.along;
    for (int64_t e = 0; e < E; ++e) {
      const T scaled = widen(s[e * args.s.stride[1]]) * scale;
      T result = f.factor * scaled;
      if constexpr (backward) result = f.across * widen(g[e * args.grad_v.stride[1]]) + dot * scaled;
      out[e * args.out.stride[1]] = narrow<scalar_t>(result);
    }
  }
}

}  // namespace
}  // namespace caps::gpu

#include <caps/gpu_op.h>
#include <caps/gpu_view.h>

namespace caps::gpu {
namespace {

// Vectors stand side by side along `outer` too.
void turn(View<3>& view) {
  std::swap(view.size[0], view.size[2]);
  std::swap(view.stride[0], view.stride[2]);
}

template <typename scalar_t, int n, bool backward>
void launch_rows(const Gpu& gpu, SquashArgs& args) {
  const int64_t lanes = (args.s.size[1] + n - 1) / n;
  args.width = 1;
  while (args.width < 32 && args.width < lanes) args.width *= 2;
  const int64_t rows = kSquashThreads / args.width;
  const Grid grid{std::min(kMaxBlocks, (args.s.size[0] + rows - 1) / rows), kSquashThreads};
  if (lanes <= args.width) gpu.launch(squash_rows<scalar_t, n, backward, true>, grid, args);
  else gpu.launch(squash_rows<scalar_t, n, backward, false>, grid, args);
}

template <typename scalar_t, bool backward>
void launch(const Gpu& gpu, SquashArgs& args) {
  constexpr int n = kWide<scalar_t>;
  const int64_t size = args.s.size[1], vectors = args.s.size[0] * args.s.size[2];
  const bool rows = args.s.size[2] == 1 && (size == 1 || (args.s.stride[1] == 1 && args.grad_v.stride[1] == 1));
  if (rows && can_load_wide(args.s, 1, n) && can_load_wide(args.grad_v, 1, n) && can_load_wide(args.out, 1, n)) {
    return launch_rows<scalar_t, n, backward>(gpu, args);
  }
  if (rows) return launch_rows<scalar_t, 1, backward>(gpu, args);
  if (args.s.size[2] == 1) {
    for (View<3>* view : {&args.s, &args.grad_v, &args.out}) turn(*view);
  }
  const Grid grid{std::min(kMaxBlocks, (vectors + kSquashThreads - 1) / kSquashThreads), kSquashThreads};
  gpu.launch(squash_columns<scalar_t, backward>, grid, args);
}

template <bool backward>
Tensor run(Tensor s, std::optional<Tensor> grad_v, int64_t dim) {
  const Gpu gpu("squash", s);
  Tensor out = torch::stable::new_empty(s, s.sizes());
  dim = dim < 0 ? dim + s.dim() : dim;
  SquashArgs args{view_around(s, dim), {}, view_around(out, dim), 0};
  args.grad_v = grad_v ? view_around(*grad_v, dim) : args.s;
  dispatch_floating(dtype_of(s), [&]<typename scalar_t>() { launch<scalar_t, backward>(gpu, args); });
  return out;
}

Tensor squash_fwd(Tensor s, int64_t dim) { return run<false>(s, {}, dim); }
Tensor squash_bwd(Tensor grad_v, Tensor s, int64_t dim) { return run<true>(s, grad_v, dim); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(CAPS_GPU_OPS, m) {
  m.def("squash_fwd(Tensor s, int dim) -> Tensor");
  m.def("squash_bwd(Tensor grad_v, Tensor s, int dim) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(CAPS_GPU_OPS, CAPS_GPU_KEY, m) {
  m.impl("squash_fwd", TORCH_BOX(&squash_fwd));
  m.impl("squash_bwd", TORCH_BOX(&squash_bwd));
}

}  // namespace caps::gpu
