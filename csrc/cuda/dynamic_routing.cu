// dynamic_routing: routing by agreement over given votes, and its gradients. caps_kernels/ops/dynamic_routing has the
// mathematics, caps/gpu_routing.h the steps.
//
// Regimes: "registers" gives a warp a chunk of a sample, whose votes it takes into registers, "split" gives it to a
// block; either way the blocks of one cooperative launch share the chunks of all samples, with a grid barrier between
// steps. "samples" gives a block whole samples. A device without cooperative launches gets a launch for each step
// ("steps").
#include <caps/gpu_routing_warp.h>

namespace caps::gpu {
namespace {

// Blocks that share a processor at least: not so many that registers are spilled.
constexpr int kForwardBlocks = 2;
template <typename scalar_t>
constexpr int kBackwardBlocks = sizeof(Acc<scalar_t>) == 8 ? 1 : 2;

// Where registers hold the votes: that depends on the numbers of a lane.
template <typename scalar_t, int numbers>
constexpr int kWarpBlocks = sizeof(Acc<scalar_t>) == 4 && numbers <= 24 ? 2 : 1;

// Steps of forward: the pass and the finish of each iteration.
template <typename R>
CAPS_DEVICE void forward_steps(const RoutingArgs& args, Acc<typename R::Scalar>* memory) {
  for (int step = args.first_step; step < args.end_step; ++step) {
    const R routing(args, memory);
    if (step > args.first_step) routing.between_steps();
    if (step % 2 == 0) routing.forward_pass(step / 2);
    else routing.forward_finish(step / 2);
  }
}

// Steps of backward: the start, the pass and the finish of each iteration from the last but for the first, grad_votes,
// grad_bias.
template <typename R>
CAPS_DEVICE void backward_steps(const RoutingArgs& args, Acc<typename R::Scalar>* memory) {
  const int votes_step = args.last ? 1 : 2 * int(args.iterations) - 1;
  for (int step = args.first_step; step < args.end_step; ++step) {
    const R routing(args, memory);
    if (step > args.first_step) routing.between_steps();
    const int64_t t = args.iterations - (step + 1) / 2;
    if (step == 0) routing.backward_start();
    else if (step == votes_step) routing.backward_votes();
    else if (step > votes_step) routing.backward_bias();
    else if (step % 2 == 1) routing.backward_pass(t);
    else routing.backward_finish(t);
  }
}

// The memory of this block.
template <typename T>
CAPS_DEVICE T* memory_of(const RoutingArgs& args, unsigned char* shared) {
  return args.memory == nullptr ? reinterpret_cast<T*>(shared)
                                : static_cast<T*>(args.memory) + blockIdx.x * args.memory_size;
}

template <typename scalar_t, int n>
__global__ void __launch_bounds__(kRoutingThreads, kForwardBlocks)
    routing_forward(const __grid_constant__ RoutingArgs args) {
  CAPS_DYNAMIC_SHARED(shared);
  forward_steps<Routing<scalar_t, n>>(args, memory_of<Acc<scalar_t>>(args, shared));
}

template <typename scalar_t, int n>
__global__ void __launch_bounds__(kRoutingThreads, kBackwardBlocks<scalar_t>)
    routing_backward(const __grid_constant__ RoutingArgs args) {
  CAPS_DYNAMIC_SHARED(shared);
  backward_steps<Routing<scalar_t, n>>(args, memory_of<Acc<scalar_t>>(args, shared));
}

template <typename scalar_t, int n, int lanes, int packs>
__global__ void __launch_bounds__(kRoutingThreads, kWarpBlocks<scalar_t, n * packs>)
    routing_forward_warp(const __grid_constant__ RoutingArgs args) {
  forward_steps<RoutingWarp<scalar_t, n, lanes, packs>>(args, nullptr);
}

template <typename scalar_t, int n, int lanes, int packs>
__global__ void __launch_bounds__(kRoutingThreads, kWarpBlocks<scalar_t, n * packs>)
    routing_backward_warp(const __grid_constant__ RoutingArgs args) {
  backward_steps<RoutingWarp<scalar_t, n, lanes, packs>>(args, nullptr);
}

}  // namespace
}  // namespace caps::gpu

#include <caps/gpu_op.h>
#include <caps/gpu_view.h>

namespace caps::gpu {
namespace {

// Chunks of all samples that keep a large GPU busy, and the memory that a block may take of a processor's. Neither is
// asked of the device: how sums are cut depends on the shape alone.
constexpr int64_t kManyChunks = 1024, kBlockBytes = 32 * 1024, kMostTile = 32;
// The same of warps; chunks of a sample, which one warp adds up again, and lower capsules of a chunk, for accuracy.
constexpr int64_t kManyWarps = 4096, kMostChunks = 64, kLongestChunk = 2048;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How a call is cut up; RoutingArgs has the meaning of the first five.
struct RoutingPlan {
  int64_t tile, chunk, chunks, columns, sharers;
  int64_t memory;  // numbers of a block
  bool shared;     // whether they lie in shared memory
  int64_t lanes = 0;
};

int64_t lanes_of(int64_t packs) {
  int64_t width = 1;
  while (width < 32 && width < packs) width *= 2;
  return width;
}

RoutingPlan warp_plan_for(const View<4>& votes, int64_t columns, int64_t lanes) {
  const int64_t B = votes.size[0], I = votes.size[1];
  const int64_t teams = 32 / lanes;
  const int64_t wanted = std::max(std::clamp<int64_t>(kManyWarps / std::max<int64_t>(1, B), 1, kMostChunks),
                                  divide_up(I, kLongestChunk));
  RoutingPlan plan{teams, divide_up(divide_up(I, wanted), teams) * teams, 0, columns, 0, 0, true, lanes};
  plan.chunks = divide_up(I, plan.chunk);
  return plan;
}

// coefficients: arrays [tile, J] that a block keeps beside the sums
RoutingPlan plan_for(const View<4>& votes, int64_t coefficients, int64_t votes_coefficients, int64_t n, int64_t bytes) {
  const auto [B, I, J, E] = votes.size;
  const int64_t columns = J * E / n, sharers = std::max<int64_t>(1, kRoutingThreads / columns);
  const auto memory = [&](int64_t tile) {
    return std::max(coefficients * tile * J + sharers * J * E, votes_coefficients * tile * J);
  };
  RoutingPlan plan{kMostTile, 0, 0, columns, sharers, 0, true};
  while (plan.tile > 1 && memory(plan.tile) * bytes > kBlockBytes) plan.tile /= 2;
  plan.shared = memory(plan.tile) * bytes <= kBlockBytes;
  if (!plan.shared) plan.tile = 8;
  plan.memory = memory(plan.tile);
  const int64_t wanted = std::min(divide_up(I, plan.tile), divide_up(kManyChunks, std::max<int64_t>(1, B)));
  plan.chunk = divide_up(divide_up(I, wanted), plan.tile) * plan.tile;
  plan.chunks = divide_up(I, plan.chunk);
  return plan;
}


// Runs the steps 0 … steps - 1 in as few launches as there may be. `apart`: the last step joins what whole samples left.
template <typename scalar_t>
void run_steps(const Gpu& gpu, void (*kernel)(RoutingArgs), RoutingArgs& args, const RoutingPlan& plan, int steps,
               bool apart, const Tensor& like) {
  const int64_t B = args.votes.size[0], bytes = sizeof(Acc<scalar_t>);
  args.chunk = plan.chunk;
  args.chunks = plan.chunks;
  args.tile = plan.tile;
  args.size = args.votes.size[2] * args.votes.size[3];
  args.columns = plan.columns;
  args.sharers = plan.sharers;
  args.memory_size = plan.memory;
  args.lanes = int(plan.lanes);
  Grid grid{std::max<int64_t>(1, B * plan.chunks), kRoutingThreads, plan.shared ? plan.memory * bytes : 0};
  const bool samples = plan.chunks == 1 && plan.lanes == 0;
  const int64_t resident = samples ? 0 : gpu.resident_blocks(kernel, grid);
  const bool cooperative = resident > 0;
  // Blocks beyond those that are resident wait for a place, or do not fit a grid barrier; they loop instead.
  const bool loop = !plan.shared || plan.lanes > 0;
  grid.blocks = std::min(grid.blocks, cooperative ? resident : loop ? int64_t(8) * gpu.processors() : kMaxBlocks);
  std::optional<Tensor> memory;
  if (!plan.shared) {
    memory = empty(like, {grid.blocks, plan.memory}, accumulation_type(like));
    args.memory = memory->mutable_data_ptr();
  }
  const int together = cooperative ? steps : samples ? steps - int(apart) : 1;
  for (int step = 0; step < steps; step += together) {
    args.first_step = step;
    args.end_step = std::min(steps, step + together);
    gpu.launch(kernel, grid, args, cooperative);
  }
}

// Lanes of a lower capsule and packs of a lane, where registers hold its votes.
template <int lanes_, int packs_>
struct Team {
  static constexpr int lanes = lanes_, packs = packs_;
};

// Calls f(plan, team) with the first team that holds the votes of a lower capsule; false where none does.
template <typename scalar_t, int n, typename F>
bool with_team(const View<4>& votes, const F& f) {
  const auto [B, I, J, E] = votes.size;
  const int64_t columns = J * E / n;
  const bool side_by_side = J == 1 || votes.stride[2] == E;
  if (n == 1 || !side_by_side || E / n > 32 || lanes_of(E / n) != E / n || B * I > 0x7fffffff) return false;
  const auto any = [&](auto... teams) {
    const auto take = [&](auto team) {
      constexpr int lanes = decltype(team)::lanes, packs = decltype(team)::packs;
      if (columns > lanes * packs || E / n > lanes) return false;
      f(warp_plan_for(votes, columns, lanes), team);
      return true;
    };
    return (take(teams) || ...);
  };
  if constexpr (n == 1) return false;
  else if constexpr (sizeof(scalar_t) == 8) return any(Team<16, 5>());
  else if constexpr (sizeof(scalar_t) == 4) return any(Team<8, 5>(), Team<32, 5>(), Team<32, 8>());
  else return any(Team<8, 3>(), Team<32, 4>());
}

RoutingArgs routing_args(const Tensor& votes, const std::optional<Tensor>& bias, int64_t iterations, bool leaky) {
  RoutingArgs args{};
  args.iterations = iterations;
  args.leaky = leaky;
  args.votes = view_of<4>(votes);
  if (bias) args.bias = view_of<2>(*bias);
  return args;
}

// Calls f.template operator()<scalar_t, n>() with the packs that votes can be read in.
template <typename F>
void dispatch_packs(const Tensor& tensor, RoutingArgs& args, const F& f) {
  dispatch_floating(dtype_of(tensor), [&]<typename scalar_t>() {
    constexpr int n = kWide<scalar_t>;
    const bool wide = can_load_wide(args.votes, 3, n);
    args.width = int(lanes_of(divide_up(args.votes.size[3], wide ? n : 1)));
    if (wide) f.template operator()<scalar_t, n>();
    else f.template operator()<scalar_t, 1>();
  });
}

std::tuple<Tensor, Tensor, Tensor> dynamic_routing_fwd(Tensor votes, std::optional<Tensor> bias, int64_t iterations,
                                                       bool leaky, bool return_coupling) {
  const Gpu gpu("dynamic_routing", votes);
  RoutingArgs args = routing_args(votes, bias, iterations, leaky);
  const auto [B, I, J, E] = args.votes.size;
  const auto type = accumulation_type(votes);
  Tensor v = empty(votes, {B, J, E}), s = empty(votes, {iterations, B, J, E}, type);
  Tensor coupling = empty(votes, {B, return_coupling ? I : 0, J});
  args.with_coupling = return_coupling;
  args.s = view_of<4>(s);
  args.v = v.mutable_data_ptr();
  args.coupling = coupling.mutable_data_ptr();
  if (B == 0) return {v, s, coupling};
  dispatch_packs(votes, args, [&]<typename scalar_t, int n>() {
    const auto run = [&](void (*kernel)(RoutingArgs), const RoutingPlan& plan) {
      Tensor partial = empty(votes, {B, plan.chunks, J, E}, type), total = empty(votes, {B, J, E}, type);
      args.partial = partial.mutable_data_ptr();
      args.total = total.mutable_data_ptr();
      run_steps<scalar_t>(gpu, kernel, args, plan, 2 * int(iterations), false, votes);
    };
    if (!with_team<scalar_t, n>(args.votes, [&](const RoutingPlan& plan, auto team) {
          run(routing_forward_warp<scalar_t, n, decltype(team)::lanes, decltype(team)::packs>, plan);
        })) {
      run(routing_forward<scalar_t, n>, plan_for(args.votes, 1, 0, n, sizeof(Acc<scalar_t>)));
    }
  });
  return {v, s, coupling};
}

std::tuple<Tensor, Tensor> dynamic_routing_bwd(Tensor grad_v, Tensor votes, std::optional<Tensor> bias, Tensor s,
                                               int64_t iterations, bool leaky, bool last) {
  const Gpu gpu("dynamic_routing", votes);
  RoutingArgs args = routing_args(votes, bias, iterations, leaky);
  const auto [B, I, J, E] = args.votes.size;
  const auto type = accumulation_type(votes);
  Tensor grad_votes = empty(votes, {B, I, J, E}), grad_bias = bias ? empty(votes, {J, E}) : empty(votes, {0});
  args.last = last;
  args.s = view_of<4>(s);
  args.grad_v = view_of<3>(grad_v);
  args.grad_votes = grad_votes.mutable_data_ptr();
  args.grad_bias = grad_bias.mutable_data_ptr();
  if (B == 0) return {grad_votes, bias ? torch::stable::fill_(grad_bias, 0) : grad_bias};
  dispatch_packs(votes, args, [&]<typename scalar_t, int n>() {
    const auto run = [&](void (*kernel)(RoutingArgs), const RoutingPlan& plan) {
      Tensor partial = empty(votes, {last ? 0 : B, plan.chunks, J, E}, type), total = empty(votes, {B, J, E}, type);
      Tensor totals = empty(votes, {iterations, B, J, E}, type), gradients = empty(votes, {iterations, B, J, E}, type);
      args.partial = partial.mutable_data_ptr();
      args.total = total.mutable_data_ptr();
      args.totals = totals.mutable_data_ptr();
      args.gradients = gradients.mutable_data_ptr();
      const int steps = (last ? 2 : 2 * int(iterations)) + int(bias.has_value());
      run_steps<scalar_t>(gpu, kernel, args, plan, steps, bias.has_value(), votes);
    };
    if (!with_team<scalar_t, n>(args.votes, [&](const RoutingPlan& plan, auto team) {
          run(routing_backward_warp<scalar_t, n, decltype(team)::lanes, decltype(team)::packs>, plan);
        })) {
      const int64_t kept = last ? 1 : 2 * (iterations - 1);
      run(routing_backward<scalar_t, n>, plan_for(args.votes, last ? 0 : 2, kept, n, sizeof(Acc<scalar_t>)));
    }
  });
  return {grad_votes, grad_bias};
}

// Bytes of shared memory of a block in forward and in backward through all iterations. No GPU is asked, so that the
// votes may be of any device, or without memory.
std::tuple<int64_t, int64_t> dynamic_routing_shared(Tensor votes, int64_t iterations) {
  RoutingArgs args = routing_args(votes, {}, iterations, false);
  int64_t forward = 0, backward = 0;
  dispatch_packs(votes, args, [&]<typename scalar_t, int n>() {
    constexpr int64_t bytes = sizeof(Acc<scalar_t>);
    const auto shared = [&](const RoutingPlan& plan) { return plan.shared ? plan.memory * bytes : 0; };
    if (with_team<scalar_t, n>(args.votes, [](const RoutingPlan&, auto) {})) return;
    forward = shared(plan_for(args.votes, 1, 0, n, bytes));
    backward = shared(plan_for(args.votes, 2, 2 * (iterations - 1), n, bytes));
  });
  return {forward, backward};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(CAPS_GPU_OPS, m) {
  m.def(
      "dynamic_routing_fwd(Tensor votes, Tensor? bias, int iterations, bool leaky, bool return_coupling)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "dynamic_routing_bwd(Tensor grad_v, Tensor votes, Tensor? bias, Tensor s, int iterations, bool leaky, bool last)"
      " -> (Tensor, Tensor)");
  m.def("dynamic_routing_shared(Tensor votes, int iterations) -> (int, int)");
}

STABLE_TORCH_LIBRARY_IMPL(CAPS_GPU_OPS, CAPS_GPU_KEY, m) {
  m.impl("dynamic_routing_fwd", TORCH_BOX(&dynamic_routing_fwd));
  m.impl("dynamic_routing_bwd", TORCH_BOX(&dynamic_routing_bwd));
}

STABLE_TORCH_LIBRARY_IMPL(CAPS_GPU_OPS, CompositeExplicitAutograd, m) {
  m.impl("dynamic_routing_shared", TORCH_BOX(&dynamic_routing_shared));
}

}  // namespace caps::gpu
