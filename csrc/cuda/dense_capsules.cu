// dense_capsules: û_ij = W_ij u_i and R iterations of routing over them. caps_kernels/ops/dense_capsules has the
// mathematics, and how long it should take.
//
// Forward: in each iteration a block takes a tile of samples and a chunk of lower capsules, makes û of one capsule after
// the other in registers and adds its share of s. The sums of all chunks meet in global memory; all blocks add them up,
// and go on to the next iteration, in the same launch where the grid is resident as a whole (`cooperative`), or else in
// the next. Backward goes through the iterations in the same way, for gV; then each block takes a group of lower
// capsules and runs over all samples, so that gradients of W are sums of its own. How work is cut depends on the shape
// alone; blocks take as many items as there are.
#include <caps/gpu_dense_plain.h>
#include <caps/gpu_dense_sums.h>
#include <caps/gpu_dense_tile.h>

namespace caps::gpu {
namespace {

template <typename Tile>
constexpr int kMaxThreads = 32 * Tile::kWarps;

// Counts the items of a launch. Tiles, which are for fewer than 2^30 samples and lower capsules, have no register to spare.
template <typename Tile>
using Item = std::conditional_t<is_plain<Tile>, int64_t, int>;

// f(tile of samples, chunk) for the items of this block.
template <typename Tile, typename F>
CAPS_DEVICE void for_items(const DenseArgs& args, const F& f) {
  const Item<Tile> tiles = args.tiles, items = tiles * args.chunks;
  for (Item<Tile> item = blockIdx.x; item < items; item += Item<Tile>(gridDim.x)) f(int(item % tiles), item / tiles);
}

// f(step) for the steps of a launch.
template <typename F>
CAPS_DEVICE void for_steps(const DenseArgs& args, const F& f) {
  for (int step = args.begin; step < args.end; ++step) {
    if (step > args.begin) grid_barrier();
    f(step);
  }
}

// Steps 2 t and 2 t + 1: the pass of iteration t, and its sums.
template <typename Tile>
__global__ void __launch_bounds__(kMaxThreads<Tile>, Tile::kBlocks) dense_forward(const __grid_constant__ DenseArgs args) {
  using Sums = DenseSums<typename Tile::scalar_t>;
  const auto steps = [&](const auto& route) {
    for_steps(args, [&](int step) {
      if (step % 2) return Sums(args).finish_iteration(step / 2);
      for_items<Tile>(args, [&](int tile, int64_t chunk) { route(tile, chunk, step / 2); });
    });
  };
  if constexpr (is_plain<Tile>) {
    const Tile block(args);
    steps([&](int tile, int64_t chunk, int64_t t) { block.route(tile, chunk, t); });
  } else {
    CAPS_DYNAMIC_SHARED(shared);
    DenseBlock<Tile> block(args, shared);
    steps([&](int tile, int64_t chunk, int64_t t) { route(block, tile, chunk, t == 0, t == args.iterations - 1); });
  }
}

// Step 0: V and g of the last iteration; then, for t = R - 1 … 1, the pass of iteration t and its sums.
template <typename Tile>
__global__ void __launch_bounds__(kMaxThreads<Tile>, 1) dense_backward(const __grid_constant__ DenseArgs args) {
  using Sums = DenseSums<typename Tile::scalar_t>;
  const auto steps = [&](const auto& route) {
    for_steps(args, [&](int step) {
      const int64_t t = args.iterations - (step + 1) / 2;
      if (step == 0) Sums(args).start_backward();
      else if (step % 2 == 0) Sums(args).finish_backward(t);
      else for_items<Tile>(args, [&](int tile, int64_t chunk) { route(tile, chunk, t); });
    });
  };
  if constexpr (is_plain<Tile>) {
    const Tile block(args);
    steps([&](int tile, int64_t chunk, int64_t t) { block.route_backward(tile, chunk, t); });
  } else {
    CAPS_DYNAMIC_SHARED(shared);
    DenseBlock<Tile> block(args, shared);
    steps([&](int tile, int64_t chunk, int64_t t) { route_backward(block, tile, chunk, t); });
  }
}

// Step 0: gradients of u, W and bias; step 1, where matrices are shared: the sums of their parts.
template <typename Tile>
__global__ void __launch_bounds__(kMaxThreads<Tile>, 1) dense_gradients(const __grid_constant__ DenseArgs args) {
  CAPS_DYNAMIC_SHARED(shared);
  using T = typename Tile::T;
  using Sums = DenseSums<typename Tile::scalar_t>;
  const auto steps = [&](const auto& gradients) {
    for_steps(args, [&](int step) {
      if (step == 1) return Sums(args).add_weight_parts();
      for (Item<Tile> item = blockIdx.x; item < args.groups + Sums::bias_items(args); item += Item<Tile>(gridDim.x)) {
        if (item < args.groups) gradients(item);
        else Sums(args).bias_gradient(item - args.groups, reinterpret_cast<T*>(shared));
      }
    });
  };
  if constexpr (is_plain<Tile>) {
    const Tile block(args);
    steps([&](int64_t group) { block.gradients(group); });
  } else {
    DenseBlock<Tile> block(args, shared);
    DenseGradients<Tile> gradients(block);
    steps([&](int group) { gradients.run(group); });
  }
}

}  // namespace
}  // namespace caps::gpu

#include <caps/gpu_dense_plan.h>

namespace caps::gpu {
namespace {

using Results = std::tuple<Tensor, Tensor, Tensor>;

DenseArgs common_args(const Tensor& u, const Tensor& weight, const std::optional<Tensor>& bias, int64_t positions,
                      int64_t iterations, bool leaky, bool last_only) {
  DenseArgs a{};
  a.u = view_of<3>(u);
  a.weight = view_of<4>(weight);
  if (bias) a.bias = view_of<2>(*bias);
  a.positions = positions;
  a.iterations = iterations;
  a.leaky = leaky;
  a.last_only = last_only;
  return a;
}

// Calls f.template operator()<Tile>() for the tile of a call.
template <typename F>
auto with_tile(const Gpu& gpu, const Tensor& u, DenseArgs& a, const F& f) {
  return dispatch_floating(dtype_of(u), [&]<typename scalar_t>() {
    return with_tile_of<scalar_t>(a, gpu.shared_limit(), f);
  });
}

// Does steps begin … end - 1 in one cooperative launch, or one after the other.
void launch_steps(const Gpu& gpu, void (*kernel)(DenseArgs), Grid grid, DenseArgs& a, int end) {
  const int64_t items = grid.blocks, resident = end > 1 ? gpu.resident_blocks(kernel, grid) : items;
  if (end == 1 || resident == 0) {
    for (int step = 0; step < end; ++step) {
      a.begin = step;
      a.end = step + 1;
      gpu.launch(kernel, grid, a);
    }
    return;
  }
  grid.blocks = std::min(items, resident);
  a.begin = 0;
  a.end = end;
  gpu.launch(kernel, grid, a, true);
}

using PlanNumbers = std::tuple<int64_t, int64_t, int64_t, bool, bool, int64_t, int64_t, int64_t, int64_t, int64_t>;

// How a call would run, for whoever asks: the samples, parents and numbers e that its tile has room for, 0 for the plain
// kernels; whether products are made on tensor cores; whether all iterations of forward are one launch; the threads of a
// block; items and bytes of shared memory of a pass, and of the gradients.
PlanNumbers dense_capsules_plan(Tensor u, Tensor weight, int64_t positions, int64_t iterations) {
  const Gpu gpu("dense_capsules", u);
  DenseArgs a = common_args(u, weight, {}, positions, iterations, false, false);
  return with_tile(gpu, u, a, [&]<typename Tile>() -> PlanNumbers {
    const Plan p = plan<Tile>(a);
    const bool one_launch = gpu.resident_blocks(dense_forward<Tile>, {1, p.threads, p.forward_bytes}) > 0;
    int64_t samples = 0, parents = 0, numbers = 0;
    bool tensor_cores = false;
    if constexpr (!is_plain<Tile>) {
      samples = Tile::kSamples;
      parents = Tile::kWarps * Tile::kParents;
      numbers = Tile::kE;
      tensor_cores = Tile::kTensorCores;
    }
    return {samples,   parents,           numbers,         tensor_cores, one_launch,
            p.threads, a.tiles * a.chunks, p.forward_bytes, a.groups,     p.gradient_bytes};
  });
}

// Bytes of shared memory of a block in forward, in the passes of backward and in the gradients, on a GPU that has room
// for every tile. No GPU is asked, so that the tensors may be of any device, or without memory.
std::tuple<int64_t, int64_t, int64_t> dense_capsules_shared(Tensor u, Tensor weight, int64_t positions) {
  DenseArgs a = common_args(u, weight, {}, positions, 1, false, false);
  return dispatch_floating(dtype_of(u), [&]<typename scalar_t>() {
    return with_tile_of<scalar_t>(a, kSharedBytes, [&]<typename Tile>() {
      const Plan p = plan<Tile>(a);
      return std::tuple{p.forward_bytes, p.backward_bytes, p.gradient_bytes};
    });
  });
}

Results dense_capsules_fwd(Tensor u, Tensor weight, std::optional<Tensor> bias, int64_t positions, int64_t iterations,
                           bool leaky, bool return_coupling) {
  const Gpu gpu("dense_capsules", u);
  const int64_t B = u.size(0), I = u.size(1), J = weight.size(1), E = weight.size(3);
  Tensor v = empty(u, {B, J, E}), s = empty(u, {iterations, B, J, E}, accumulation_type(u));
  Tensor coupling = empty(u, {B, return_coupling ? I : 0, J});
  if (B == 0) return {v, s, coupling};
  DenseArgs a = common_args(u, weight, bias, positions, iterations, leaky, false);
  a.v = view_of<3>(v);
  a.s = view_of<4>(s);
  if (return_coupling) a.coupling = view_of<3>(coupling);
  with_tile(gpu, u, a, [&]<typename Tile>() {
    const Plan p = plan<Tile>(a);
    Tensor scratch = empty(u, {(a.chunks + 1) * B * J * E}, accumulation_type(u));
    a.partial = scratch.mutable_data_ptr();
    a.V = static_cast<typename Tile::T*>(a.partial) + a.chunks * B * J * E;
    launch_steps(gpu, dense_forward<Tile>, {a.tiles * a.chunks, p.threads, p.forward_bytes}, a, 2 * int(iterations));
  });
  return {v, s, coupling};
}

Results dense_capsules_bwd(Tensor grad_v, Tensor u, Tensor weight, std::optional<Tensor> bias, Tensor s,
                           int64_t positions, int64_t iterations, bool leaky, bool last_only) {
  const Gpu gpu("dense_capsules", u);
  const int64_t B = u.size(0), I = u.size(1), J = weight.size(1), D = u.size(2), E = weight.size(3);
  Tensor grad_u = empty(u, {B, I, D}), grad_weight = empty(u, {weight.size(0), J, D, E});
  Tensor grad_bias = bias ? empty(u, {J, E}) : empty(u, {0});
  if (B == 0) {
    torch::stable::zero_(grad_weight);
    torch::stable::zero_(grad_bias);
    return {grad_u, grad_weight, grad_bias};
  }
  DenseArgs a = common_args(u, weight, bias, positions, iterations, leaky, last_only);
  a.grad_v = view_of<3>(grad_v);
  a.s = view_of<4>(s);
  a.grad_u = view_of<3>(grad_u);
  a.grad_weight = view_of<4>(grad_weight);
  if (bias) a.grad_bias = view_of<2>(grad_bias);
  with_tile(gpu, u, a, [&]<typename Tile>() {
    using T = typename Tile::T;
    const Plan p = plan<Tile>(a);
    const bool in_parts = positions > 1 && (is_plain<Tile> || a.parts > 1);
    const int64_t all = B * J * E, items = a.groups + DenseSums<typename Tile::scalar_t>::bias_items(a);
    const Grid grid{is_plain<Tile> ? std::min<int64_t>(items, kItems) : items, p.threads, p.gradient_bytes};
    const int64_t passes = last_only ? 0 : iterations - 1;
    const int64_t sizes[] = {passes > 0 ? a.chunks * all : 0, (iterations - 1) * all, iterations * all,
                             passes > 0 ? all : 0, in_parts ? a.groups * J * D * E : 0,
                             is_plain<Tile> ? grid.blocks * B * iterations * 3 : 0};
    void** const places[] = {&a.partial, &a.V, &a.g, &a.total, &a.weight_parts, &a.stats};
    int64_t total = 0;
    for (int64_t size : sizes) total += ceil_div(size, 4) * 4;
    Tensor scratch = empty(u, {total}, accumulation_type(u));
    T* memory = static_cast<T*>(scratch.mutable_data_ptr());
    for (int n = 0; n < 6; memory += ceil_div(sizes[n], 4) * 4, ++n) *places[n] = sizes[n] ? memory : nullptr;
    const Grid passes_grid{std::max(a.tiles * a.chunks, ceil_div(B * J, p.threads / 32)), p.threads, p.backward_bytes};
    launch_steps(gpu, dense_backward<Tile>, passes_grid, a, 1 + 2 * int(passes));
    launch_steps(gpu, dense_gradients<Tile>, grid, a, in_parts ? 2 : 1);
  });
  return {grad_u, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(CAPS_GPU_OPS, m) {
  m.def(
      "dense_capsules_fwd(Tensor u, Tensor weight, Tensor? bias, int positions, int iterations, bool leaky, "
      "bool return_coupling) -> (Tensor, Tensor, Tensor)");
  m.def(
      "dense_capsules_bwd(Tensor grad_v, Tensor u, Tensor weight, Tensor? bias, Tensor s, int positions, "
      "int iterations, bool leaky, bool last_only) -> (Tensor, Tensor, Tensor)");
  m.def(
      "dense_capsules_plan(Tensor u, Tensor weight, int positions, int iterations) -> "
      "(int, int, int, bool, bool, int, int, int, int, int)");
  m.def("dense_capsules_shared(Tensor u, Tensor weight, int positions) -> (int, int, int)");
}

STABLE_TORCH_LIBRARY_IMPL(CAPS_GPU_OPS, CAPS_GPU_KEY, m) {
  m.impl("dense_capsules_fwd", TORCH_BOX(&dense_capsules_fwd));
  m.impl("dense_capsules_bwd", TORCH_BOX(&dense_capsules_bwd));
  m.impl("dense_capsules_plan", TORCH_BOX(&dense_capsules_plan));
}

STABLE_TORCH_LIBRARY_IMPL(CAPS_GPU_OPS, CompositeExplicitAutograd, m) {
  m.impl("dense_capsules_shared", TORCH_BOX(&dense_capsules_shared));
}

}  // namespace caps::gpu
