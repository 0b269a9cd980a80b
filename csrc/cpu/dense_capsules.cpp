// dense_capsules: votes and dynamic routing in one, forward and backward. caps_kernels/ops/dense_capsules has the
// mathematics. Three regimes:
//
// Rows (caps/dense_rows*.h), for few samples: lanes lie along E, and û is computed once and kept, up to kVotesBudget.
//
// Quads (caps/dense_quads*.h), where û of a few samples stays in cache: lanes hold four numbers of E of each of a few
// samples. One group of samples after the other goes through all iterations, with û computed once and kept. In backward
// the groups leave the coefficients c and gb, and the last pass is that of tiles.
//
// Tiles (caps/dense_tiles*.h): samples lie in the SIMD lanes; û and its gradient exist for a few lower capsules and one
// tile of samples at a time. Forward: the samples of u are packed into tiles; an iteration is a pass over chunks of
// lower capsules for each tile, whose partial sums are then added in the order of the chunks. A pass takes a few lower
// capsules of one or two tiles at once, or one of one, in the order of quads (caps/spread_routing.h). Backward: the
// same passes for t = R … 2, which keep the coefficients c and gb (or not, beyond kKeptBudget: then they are computed
// again), and one last pass that forms gû = Σ_t c^t g^t + gb^t V^{t-1} from them and contracts it at once into grad_u
// and grad_weight.
#include <caps/dense.h>

namespace caps {

// Behind each kernel, what its chunks are.
CAPS_KERNEL(tiles_pack, DenseArgs)              // tiles · chunks
CAPS_KERNEL(tiles_route, DenseArgs)             // chunks · pairs of tiles
CAPS_KERNEL(tiles_finish_iteration, DenseArgs)  // tiles · J
CAPS_KERNEL(tiles_coupling, DenseArgs)          // tiles
CAPS_KERNEL(tiles_start_backward, DenseArgs)    // tiles
CAPS_KERNEL(tiles_route_backward, DenseArgs)    // chunks · pairs of tiles
CAPS_KERNEL(tiles_finish_backward, DenseArgs)   // tiles · J
CAPS_KERNEL(tiles_basis, DenseArgs)             // tiles · J
CAPS_KERNEL(tiles_gradients, DenseArgs)         // tasks of types and parts
CAPS_KERNEL(tiles_weight_parts, DenseArgs)      // types
CAPS_KERNEL(tiles_bias_gradient, DenseArgs)     // 1
CAPS_KERNEL(quads_predict, DenseArgs)           // chunks · bundles of quad tiles of the group
CAPS_KERNEL(quads_predict_backward, DenseArgs)  // chunks · bundles of quad tiles of the group
CAPS_KERNEL(quads_route, DenseArgs)             // chunks · bundles of quad tiles of the group
CAPS_KERNEL(quads_finish_iteration, DenseArgs)  // quad tiles of the group
CAPS_KERNEL(quads_coupling, DenseArgs)          // quad tiles
CAPS_KERNEL(quads_start_backward, DenseArgs)    // quad tiles
CAPS_KERNEL(quads_route_backward, DenseArgs)    // chunks · bundles of quad tiles of the group
CAPS_KERNEL(quads_finish_backward, DenseArgs)   // quad tiles of the group
CAPS_KERNEL(quads_to_tiles, DenseArgs)          // tiles
CAPS_KERNEL(rows_pack, DenseArgs)               // samples
CAPS_KERNEL(rows_predict, DenseArgs)            // chunks
CAPS_KERNEL(rows_predict_backward, DenseArgs)   // chunks
CAPS_KERNEL(rows_route, DenseArgs)              // chunks · samples
CAPS_KERNEL(rows_finish_iteration, DenseArgs)   // samples
CAPS_KERNEL(rows_coupling, DenseArgs)           // samples
CAPS_KERNEL(rows_start_backward, DenseArgs)     // samples
CAPS_KERNEL(rows_route_backward, DenseArgs)     // chunks · samples
CAPS_KERNEL(rows_finish_backward, DenseArgs)    // samples
CAPS_KERNEL(rows_gradients, DenseArgs)          // chunks
CAPS_KERNEL(rows_bias_gradient, DenseArgs)      // 1

}  // namespace caps

#ifdef CAPS_ISA

#include <caps/dense_quads_kernels.h>
#include <caps/dense_rows_kernels.h>
#include <caps/dense_tiles_kernels.h>

#else

#include <caps/dense_plan.h>

namespace caps {
namespace {

// Hands out parts of one piece of scratch: first asked for with no memory, to learn the size.
struct Shelf {
  char* memory = nullptr;
  int64_t used = 0;
  void* take(int64_t bytes) {
    void* at = memory ? memory + used : nullptr;
    used += ceil_div(bytes, 64) * 64;
    return at;
  }
};

template <typename F>
void with_scratch(const F& place) {
  Shelf shelf;
  place(shelf);
  shelf = {static_cast<char*>(scratch(Scratch::call, shelf.used + 64)), 0};
  place(shelf);
}

DenseArgs common_args(const Tensor& u, const Tensor& weight, const std::optional<Tensor>& bias, int64_t positions,
                      int64_t iterations, bool leaky, bool last_only) {
  DenseArgs a{};
  a.dtype = dtype_of(u);
  a.u = view_of<3>(u);
  a.weight = view_of<4>(weight);
  if (bias) a.bias = view_of<2>(*bias);
  a.positions = positions;
  a.iterations = iterations;
  a.leaky = leaky;
  a.last_only = last_only;
  return a;
}

// How a call would run, for whoever asks: the regimes of forward and of backward, where 3 stands for tiles that take
// one lower capsule at a time, and whether the latter computes the coefficients again, each a digit.
int64_t dense_capsules_regime(Tensor u, Tensor weight, int64_t positions, int64_t iterations) {
  DenseArgs a = common_args(u, weight, {}, positions, iterations, false, false);
  if (u.size(0) == 0) return 220;
  const auto digit = [&](const Plan& p) { return int64_t(p.regime) + (a.spread ? 1 : 0); };
  const int64_t forward = digit(plan(a, false));
  const Plan p = plan(a, true);
  return 100 * forward + 10 * digit(p) + (keeps_coefficients(a, p) ? 0 : 1);
}

// About how many nanoseconds the kernels take.
struct Work {
  int64_t pack;                    // a task of the packing kernels
  int64_t predict, route, finish;  // a chunk's û of one tile, an iteration over it; a tile at the end of an iteration

  Work(const DenseArgs& a, const Plan& p) {
    const int64_t multiplications = a.chunk * p.J * p.E / (p.regime == Regime::tiles ? 1 : p.lanes);
    pack = (p.regime == Regime::rows ? p.I : a.chunk) * p.D * 8;
    predict = multiplications * p.D / 4;
    route = 2 * multiplications;
    finish = p.J * p.E * (a.chunks + 16);
    if (p.regime == Regime::quads) finish /= 4;
  }
};

// Pairs of tiles, or bundles of the quad tiles of a group.
int64_t pairs_of(const DenseArgs& a, const Plan& p, int64_t group) {
  return p.regime == Regime::quads ? ceil_div(group, quad_bundle(vector_bytes())) : ceil_div(a.tiles, kPair);
}

void forward_passes(DenseArgs& a, const Plan& p, bool return_coupling) {
  const Work work(a, p);
  const int64_t bundle = quad_bundle(vector_bytes());
  for (a.first = 0; a.first == 0 || a.first < a.quad_tiles; a.first += std::max<int64_t>(a.group, 1)) {
    const int64_t group = std::min(a.group, a.quad_tiles - a.first), pairs = pairs_of(a, p, group);
    for (a.t = 0; a.t < a.iterations; ++a.t) {
      a.keep = return_coupling && a.t == a.iterations - 1;
      switch (p.regime) {
        case Regime::rows:
          if (a.t == 0) launch(rows_predict, a, a.chunks, work.predict * p.B);
          else launch(rows_route, a, a.chunks * p.B, work.route);
          launch(rows_finish_iteration, a, a.tiles, work.finish);
          break;
        case Regime::quads:
          if (a.t == 0) launch(quads_predict, a, a.chunks * pairs, bundle * work.predict);
          else launch(quads_route, a, a.chunks * pairs, bundle * work.route);
          launch(quads_finish_iteration, a, group, work.finish);
          break;
        case Regime::tiles:
          launch(tiles_route, a, a.chunks * pairs, 2 * work.predict + work.route);
          launch(tiles_finish_iteration, a, a.tiles * p.J, work.finish / p.J);
          break;
      }
    }
  }
}

// The passes of iterations R … 2, which leave the coefficients.
void backward_passes(DenseArgs& a, const Plan& p) {
  const Work work(a, p);
  const int64_t last = a.iterations - 1, bundle = quad_bundle(vector_bytes());
  for (a.first = 0; a.first == 0 || a.first < a.quad_tiles; a.first += std::max<int64_t>(a.group, 1)) {
    const int64_t group = std::min(a.group, a.quad_tiles - a.first), pairs = pairs_of(a, p, group);
    if (p.regime == Regime::rows) {
      a.t = last;
      launch(rows_predict_backward, a, a.chunks, (work.predict + 2 * work.route) * p.B);
    }
    for (a.t = last; a.t >= 1; --a.t) {
      // Couplings that are constants have no gradient: only those of the last iteration are needed, if they are kept.
      if (a.last_only && (!a.keep || a.t < last)) break;
      switch (p.regime) {
        case Regime::rows:
          if (a.t < last) launch(rows_route_backward, a, a.chunks * p.B, 2 * work.route);
          if (!a.last_only) launch(rows_finish_backward, a, a.tiles, work.finish);
          break;
        case Regime::quads:
          if (a.t == last)
            launch(quads_predict_backward, a, a.chunks * pairs, bundle * (work.predict + 2 * work.route));
          else launch(quads_route_backward, a, a.chunks * pairs, bundle * 2 * work.route);
          if (!a.last_only) launch(quads_finish_backward, a, group, work.finish);
          break;
        case Regime::tiles:
          launch(tiles_route_backward, a, a.chunks * pairs, 2 * work.predict + work.route);
          if (!a.last_only) launch(tiles_finish_backward, a, a.tiles * p.J, work.finish / p.J);
          break;
      }
    }
  }
}

using Forward = std::tuple<Tensor, Tensor, Tensor>;

Forward dense_capsules_fwd(Tensor u, Tensor weight, std::optional<Tensor> bias, int64_t positions, int64_t iterations,
                           bool leaky, bool return_coupling) {
  const int64_t B = u.size(0), I = u.size(1), J = weight.size(1), D = u.size(2), E = weight.size(3);
  Tensor v = empty(u, {B, J, E}), s = empty(u, {iterations, B, J, E}, accumulation_type(u));
  Tensor coupling = empty(u, {B, return_coupling ? I : 0, J});
  if (B == 0) return {v, s, coupling};
  DenseArgs a = common_args(u, weight, bias, positions, iterations, leaky, false);
  a.v = view_of<3>(v);
  a.s = view_of<4>(s);
  if (return_coupling) a.coupling = view_of<3>(coupling);
  const Plan p = plan(a, false);
  const bool rows = p.regime == Regime::rows, quads = p.regime == Regime::quads;
  const int64_t tiles = quads ? a.group : p.tiles, at_work = tiles * p.tile;
  const bool pack = !quads && packs(a, p) && !takes_u_as_it_is(a, p);
  with_scratch([&](Shelf& shelf) {
    a.u_tiles = pack ? shelf.take(packed_bytes(a, p)) : nullptr;
    a.u_step = I * D;
    a.votes = p.regime == Regime::tiles ? nullptr : shelf.take(votes_bytes(p, tiles));
    a.partial = shelf.take(a.chunks * at_work);
    a.total = shelf.take(at_work);
    a.s_tiles = shelf.take(at_work);
    a.V = shelf.take(at_work);
    a.coefficients = return_coupling ? shelf.take(coefficient_bytes(p)) : nullptr;
  });
  if (rows && !pack) a.u_tiles = a.u.data, a.u_step = a.u.stride[0];
  if (pack) launch(rows ? rows_pack : tiles_pack, a, rows ? B : a.tiles * a.chunks, Work(a, p).pack);
  forward_passes(a, p, return_coupling);
  if (return_coupling) launch(rows ? rows_coupling : quads ? quads_coupling : tiles_coupling, a, p.tiles, I * J * 8);
  return {v, s, coupling};
}

using Backward = std::tuple<Tensor, Tensor, Tensor>;

Backward dense_capsules_bwd(Tensor grad_v, Tensor u, Tensor weight, std::optional<Tensor> bias, Tensor s,
                            int64_t positions, int64_t iterations, bool leaky, bool last_only) {
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
  a.stream_u = grad_u.numel() * int64_t(grad_u.element_size()) >= kStreamedBytes;
  a.stream = worth_streaming(grad_weight) && E * int64_t(grad_weight.element_size()) % 64 == 0;
  if (bias) a.grad_bias = view_of<2>(grad_bias);
  const Plan p = plan(a, true);
  const bool rows = p.regime == Regime::rows, quads = p.regime == Regime::quads;
  const int64_t all = p.tiles * p.tile, in_tiles = rows ? 0 : a.tiles * J * E * p.lanes * p.item;
  a.keep = keeps_coefficients(a, p);
  const bool pack = packs(a, p) && !takes_u_as_it_is(a, p);
  void* packed = nullptr;
  with_scratch([&](Shelf& shelf) {
    a.partial = shelf.take(a.chunks * (quads ? a.group * p.tile : all));
    a.total = shelf.take(all);
    a.s_tiles = shelf.take(iterations * all);
    a.V = shelf.take(iterations * all);
    a.g = shelf.take(iterations * all);
    a.V_in_tiles = quads ? shelf.take(iterations * in_tiles) : nullptr;
    a.g_in_tiles = quads ? shelf.take(iterations * in_tiles) : nullptr;
    a.basis = shelf.take((2 * iterations - 1) * in_tiles);
    a.coefficients = a.keep ? shelf.take(2 * (iterations - 1) * coefficient_bytes(p)) : nullptr;
    a.weight_parts = a.parts > 1 ? shelf.take(a.types * a.parts * J * D * E * p.item) : nullptr;
    // û of quads is needed before u in tiles.
    Shelf end = shelf;
    packed = pack ? shelf.take(packed_bytes(a, p)) : nullptr;
    Shelf& votes = quads ? end : shelf;
    a.votes = p.regime == Regime::tiles ? nullptr : votes.take(votes_bytes(p, quads ? a.group : p.tiles));
    shelf.used = std::max(shelf.used, votes.used);
  });
  a.u_tiles = rows && !pack ? a.u.data : packed;
  a.u_step = rows && !pack ? a.u.stride[0] : I * D;
  const Work work(a, p);
  const auto pack_u = [&] {
    if (pack) launch(rows ? rows_pack : tiles_pack, a, rows ? B : a.tiles * a.chunks, work.pack);
  };
  if (!quads) pack_u();
  launch(rows    ? rows_start_backward
         : quads ? quads_start_backward
                 : tiles_start_backward,
         a, p.tiles, J * E * 16 * iterations);
  backward_passes(a, p);
  if (quads) {
    launch(quads_to_tiles, a, a.tiles, J * E * 16 * iterations);
    a.V = a.V_in_tiles;
    a.g = a.g_in_tiles;
    pack_u();
  }
  if (rows) {
    launch(rows_gradients, a, a.chunks, 3 * work.predict * B);
  } else {
    launch(tiles_basis, a, a.tiles * J, E * iterations * 4);
    const int64_t tasks = positions == 1 ? ceil_div(a.types, 4) : a.types * a.parts;
    const int64_t capsules = positions == 1 ? 4 : a.part;
    launch(tiles_gradients, a, tasks, capsules * a.tiles * J * E * (2 * D + 5) / 4);
    if (a.weight_parts) launch(tiles_weight_parts, a, a.types, a.parts * J * D * E / 8);
  }
  if (bias) launch(rows ? rows_bias_gradient : tiles_bias_gradient, a, 1, 1);
  return {grad_u, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(caps_kernels_cpp, m) {
  m.def(
      "dense_capsules_fwd(Tensor u, Tensor weight, Tensor? bias, int positions, int iterations, bool leaky, "
      "bool return_coupling) -> (Tensor, Tensor, Tensor)");
  m.def(
      "dense_capsules_bwd(Tensor grad_v, Tensor u, Tensor weight, Tensor? bias, Tensor s, int positions, "
      "int iterations, bool leaky, bool last_only) -> (Tensor, Tensor, Tensor)");
  m.def("dense_capsules_regime(Tensor u, Tensor weight, int positions, int iterations) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(caps_kernels_cpp, CPU, m) {
  m.impl("dense_capsules_regime", TORCH_BOX(&dense_capsules_regime));
  m.impl("dense_capsules_fwd", TORCH_BOX(&dense_capsules_fwd));
  m.impl("dense_capsules_bwd", TORCH_BOX(&dense_capsules_bwd));
}

}  // namespace caps

#endif
