// dynamic_routing: routing by agreement over stored votes û, and its gradients. caps_kernels/ops/dynamic_routing has
// the mathematics; its symbols are used here, with iterations t counted from 0.
//
// A sample's input capsules are taken in chunks, a chunk in groups of kGroup, a group in blocks of as many capsules as
// a vector has lanes (caps/block.h). Sums over i are taken within a group, then over the groups of a chunk, then
// pairwise over the chunks.
//
// Samples: a thread does all iterations of a sample, whose votes stay in its cache. Split: all threads do one iteration
// of all chunks of all samples, then the next. Both do the same sums in the same order.
#include <caps/kernel.h>

namespace caps {

// What a launch does, and what it is divided into.
enum class RoutingStep : int32_t {
  forward,          // samples
  forward_pass,     // chunks of all samples
  forward_finish,   // samples
  backward,         // samples
  backward_start,   // samples
  backward_pass,    // chunks of all samples
  backward_finish,  // samples
  backward_votes,   // chunks of all samples
  backward_bias,    // higher capsules
};

struct RoutingArgs {
  RoutingStep step;
  int64_t t;  // split: the iteration to be done
  DType dtype;
  int64_t iterations;
  bool leaky, last;
  bool remember;        // backward: keep c and gb of every iteration for the last pass, instead of computing them again
  View<4> votes;        // [B, I, J, E]
  View<4> s;            // [R, B, J, E], accumulation dtype; written by forward
  View<2> bias;         // [J, E]; no data where there is none
  View<3> v;            // [B, J, E], forward
  View<3> coupling;     // [B, I, J], forward; no data where it is not asked for
  View<3> grad_v;       // [B, J, E], backward
  View<4> grad_votes;   // [B, I, J, E], backward
  bool streamed;        // whether to write grad_votes past the cache
  void* bias_sums;      // [B, J, E], backward, accumulation dtype: Σ_t g^t of each sample; or none
  View<2> grad_bias;    // [J, E], backward
  int64_t chunk;        // input capsules a chunk, a multiple of kGroup
  void* samples;        // split: memory of all samples
  int64_t sample_size;  // numbers a sample has there

  CAPS_INLINE int64_t chunks() const { return (votes.size[1] + chunk - 1) / chunk; }
  CAPS_INLINE int64_t pairs() const { return 2 * (iterations - 1); }
  // Numbers that a sample needs, with E padded to a whole number of vectors.
  CAPS_INLINE int64_t numbers(int64_t padded) const {
    const int64_t J = votes.size[2], remembered = remember ? chunks() * chunk * J * pairs() : 0;
    return ((chunks() + 5 + pairs()) * J * padded + remembered + 15) / 16 * 16;
  }
};

constexpr int64_t kGroup = 64;
CAPS_KERNEL(routing_step, RoutingArgs)

}  // namespace caps

#ifdef CAPS_ISA

#include <caps/block.h>
#include <caps/softmax.h>
#include <caps/squash.h>

namespace caps::CAPS_ISA {
namespace {

// Memory of a sample; vectors are [J, padded].
template <typename T>
struct Sample {
  T* partial;  // [chunks, J, padded] sums of the chunks
  T* total;    // forward: V^t; backward: Σ of gV over the iterations done
  T *s, *v;
  T* first;       // backward: c^0 g^0
  T* gradient;    // backward: g^t
  T* pairs;       // backward: [2 (R - 1), J, padded]: g^t and V^{t-1} for t = R - 1 … 1
  T* remembered;  // backward: [blocks, 2 (R - 1), J, L]: c^t and gb^t in the same order
};

template <typename scalar_t>
class Routing {
 public:
  using T = Acc<scalar_t>;
  static constexpr int L = kLanes<T>;

  // Asks for this thread's memory.
  explicit Routing(const RoutingArgs& args)
      : args(args),
        I(args.votes.size[1]),
        J(args.votes.size[2]),
        E(args.votes.size[3]),
        chunks(args.chunks()),
        pair_count(args.pairs()),
        loops(loops_for<scalar_t>(E)),
        padded((E + loops.width - 1) / loops.width * loops.width),
        shape{J, E, padded},
        row(J * padded),
        uniform(T(1) / T(J + (args.leaky ? 1 : 0))) {
    const int64_t own = args.samples == nullptr ? args.numbers(padded) : 0;
    const int64_t coefficients = (pair_count > 2 ? pair_count : 2) * J * L;
    memory = static_cast<T*>(scratch(Scratch::chunk, (own + coefficients + (L + 1) * row + L) * int64_t(sizeof(T))));
    local_coefficients = memory + own;
    group_sum = local_coefficients + coefficients;
    staging = reinterpret_cast<scalar_t*>(group_sum + row);
  }

  void step(int64_t n) {
    switch (args.step) {
      case RoutingStep::forward: return forward(n);
      case RoutingStep::forward_pass: return forward_pass(n / chunks, n % chunks, args.t);
      case RoutingStep::forward_finish: return forward_finish(n, args.t);
      case RoutingStep::backward: return backward(n);
      case RoutingStep::backward_start: return backward_start(n);
      case RoutingStep::backward_pass: return backward_pass(n / chunks, n % chunks, args.t);
      case RoutingStep::backward_finish: return backward_finish(n, args.t);
      case RoutingStep::backward_votes: return backward_votes(n / chunks, n % chunks);
      case RoutingStep::backward_bias: return backward_bias(n);
    }
  }

 private:
  void forward(int64_t b) {
    for (int64_t t = 0; t < args.iterations; ++t) {
      for (int64_t chunk = 0; chunk < chunks; ++chunk) forward_pass(b, chunk, t);
      forward_finish(b, t);
    }
  }

  // The chunk's part of s^t.
  void forward_pass(int64_t b, int64_t chunk, int64_t t) {
    const Sample<T> sample = memory_of(b);
    T* c = local_coefficients;
    if (t == 0) fill(c, uniform, J * L);
    const bool wants_coupling = t == args.iterations - 1 && args.coupling.data != nullptr;
    sum_over_chunk(chunk, sample.partial + chunk * row, [&](int64_t i, int64_t count) {
      const Block<scalar_t> block = block_at(b, i, count);
      if (t > 0) couplings(block, sample.total, c);
      loops.add(block, c, group_sum, shape);
      if (wants_coupling) write_coupling(c, b, i, count);
    });
  }

  // s^t and v^t of a sample from the sums of its chunks.
  void forward_finish(int64_t b, int64_t t) {
    const Sample<T> sample = memory_of(b);
    sum_partials(sample);
    T* s = static_cast<T*>(args.s.data) + t * args.s.stride[0] + b * args.s.stride[1];
    for (int64_t j = 0; j < J; ++j) {
      const scalar_t* bias = static_cast<const scalar_t*>(args.bias.data) + j * args.bias.stride[0];
      T* of_j = sample.partial + j * padded;
      for (int64_t e = 0; e < E && args.bias.data != nullptr; ++e) of_j[e] += load_one(bias + e * args.bias.stride[1]);
      for (int64_t e = 0; e < E; ++e) s[j * E + e] = of_j[e];
      squash_row(of_j, sample.v + j * padded, padded);
    }
    if (t == 0) fill(sample.total, T(0), row);
    if (t < args.iterations - 1) return accumulate(sample.total, sample.v);
    scalar_t* v = static_cast<scalar_t*>(args.v.data) + b * J * E;
    for (int64_t j = 0; j < J; ++j) {
      for (int64_t e = 0; e < E; ++e) store_one(v + j * E + e, sample.v[j * padded + e]);
    }
  }

  void backward(int64_t b) {
    backward_start(b);
    for (int64_t t = args.iterations - 1; t > 0 && !args.last; --t) {
      for (int64_t chunk = 0; chunk < chunks; ++chunk) backward_pass(b, chunk, t);
      backward_finish(b, t);
    }
    for (int64_t chunk = 0; chunk < chunks; ++chunk) backward_votes(b, chunk);
  }

  // V^t of all iterations, and g of the last.
  void backward_start(int64_t b) {
    const Sample<T> sample = memory_of(b);
    const int64_t R = args.iterations;
    fill(sample.v, T(0), row);
    for (int64_t t = 0; t < R - 1; ++t) {
      T* total = pair(sample, t + 1) + row;
      read(args.s, t, b, sample.s);
      for (int64_t j = 0; j < J; ++j) {
        squash_row(sample.s + j * padded, total + j * padded, padded);
      }
      accumulate(total, sample.v);
      copy(sample.v, total, row);
    }
    fill(sample.first, T(0), row);
    View<4> grad_v{args.grad_v.data, {}, {0, args.grad_v.stride[0], args.grad_v.stride[1], args.grad_v.stride[2]}};
    read<scalar_t>(grad_v, 0, b, sample.total);
    set_gradient(sample, b, R - 1);
    fill(sample.total, T(0), row);
  }

  // c^t and gb^t, and the chunk's part of gV^{t-1}.
  void backward_pass(int64_t b, int64_t chunk, int64_t t) {
    const Sample<T> sample = memory_of(b);
    sum_over_chunk(chunk, sample.partial + chunk * row, [&](int64_t i, int64_t count) {
      const Block<scalar_t> block = block_at(b, i, count);
      T* c = args.remember ? remembered(sample, i, t) : local_coefficients;
      coefficients(block, pair(sample, t), c);
      loops.add(block, c + J * L, group_sum, shape);
    });
  }

  // g^{t-1} of a sample from the sums of its chunks.
  void backward_finish(int64_t b, int64_t t) {
    const Sample<T> sample = memory_of(b);
    sum_partials(sample);
    accumulate(sample.total, sample.partial);
    set_gradient(sample, b, t - 1);
  }

  // grad_votes of a chunk.
  void backward_votes(int64_t b, int64_t chunk) {
    const Sample<T> sample = memory_of(b);
    const int64_t end = end_of(chunk);
    for (int64_t i = chunk * args.chunk; i < end; i += L) {
      const int64_t count = end - i < L ? end - i : L;
      const T* c = args.remember ? remembered(sample, i, args.iterations - 1) : local_coefficients;
      if (!args.remember && pair_count > 0) {
        const Block<scalar_t> block = block_at(b, i, count);
        if (args.last) couplings(block, sample.pairs + row, local_coefficients);
        for (int64_t n = 0; n < pair_count && !args.last; n += 2) {
          coefficients(block, sample.pairs + n * row, local_coefficients + n * J * L);
        }
      }
      scalar_t* out = static_cast<scalar_t*>(args.grad_votes.data) + (b * I + i) * J * E;
      const bool direct = count == L && E == padded;
      const Block<scalar_t> block =
          direct ? Block<scalar_t>{out, J * E, E, 0, args.streamed} : Block<scalar_t>{staging, row, padded};
      loops.combine(block, sample.first, c, sample.pairs, args.last ? pair_count > 0 : pair_count, shape);
      if (!direct) write_rows(staging, out, count, shape);
    }
    finish_streaming();
  }

  // grad_bias of one higher capsule, with samples added up in groups of 32.
  void backward_bias(int64_t j) const {
    const int64_t B = args.votes.size[0];
    const T* sums = static_cast<const T*>(args.bias_sums) + j * E;
    for (int64_t e = 0; e < E; ++e) {
      T total = 0;
      for (int64_t first = 0; first < B; first += 32) {
        T group = 0;
        for (int64_t b = first; b < B && b < first + 32; ++b) group += sums[b * J * E + e];
        total += group;
      }
      store_one(static_cast<scalar_t*>(args.grad_bias.data) + j * E + e, total);
    }
  }

  static void fill(T* to, T value, int64_t count) {
    for (int64_t n = 0; n < count; ++n) to[n] = value;
  }
  static void copy(T* to, const T* from, int64_t count) {
    for (int64_t n = 0; n < count; ++n) to[n] = from[n];
  }
  void accumulate(T* to, const T* from) const {
    for (int64_t n = 0; n < row; ++n) to[n] += from[n];
  }

  Sample<T> memory_of(int64_t b) const {
    T* base = args.samples == nullptr ? memory : static_cast<T*>(args.samples) + b * args.sample_size;
    T* vectors = base + chunks * row;
    T* pairs = vectors + 5 * row;
    return {base,
            vectors,
            vectors + row,
            vectors + 2 * row,
            vectors + 3 * row,
            vectors + 4 * row,
            pairs,
            pairs + pair_count * row};
  }
  // g^t, followed by V^{t-1}.
  T* pair(const Sample<T>& sample, int64_t t) const { return sample.pairs + 2 * (args.iterations - 1 - t) * row; }
  // c^t of the block that begins with capsule i, followed by its gb^t.
  T* remembered(const Sample<T>& sample, int64_t i, int64_t t) const {
    return sample.remembered + (i / L * pair_count + 2 * (args.iterations - 1 - t)) * J * L;
  }
  int64_t end_of(int64_t chunk) const { return (chunk + 1) * args.chunk < I ? (chunk + 1) * args.chunk : I; }

  // sum = Σ over the blocks of a chunk of what `add_block` adds to group_sum.
  template <typename F>
  void sum_over_chunk(int64_t chunk, T* sum, const F& add_block) {
    const int64_t end = end_of(chunk);
    fill(sum, T(0), row);
    for (int64_t group = chunk * args.chunk; group < end; group += kGroup) {
      fill(group_sum, T(0), row);
      const int64_t group_end = group + kGroup < end ? group + kGroup : end;
      for (int64_t i = group; i < group_end; i += L) add_block(i, group_end - i < L ? group_end - i : L);
      accumulate(sum, group_sum);
    }
  }

  // The chunks' sums, added pairwise, in place of the first.
  void sum_partials(const Sample<T>& sample) const {
    for (int64_t step = 1; step < chunks; step *= 2) {
      for (int64_t chunk = 0; chunk + step < chunks; chunk += 2 * step) {
        accumulate(sample.partial + chunk * row, sample.partial + (chunk + step) * row);
      }
    }
  }

  void couplings(const Block<scalar_t>& block, const T* total, T* c) const {
    loops.dots(block, total, c, shape);
    softmax(c, J, args.leaky);
  }

  // c^t and gb^t from g^t and V^{t-1}.
  void coefficients(const Block<scalar_t>& block, const T* pair, T* c) const {
    couplings(block, pair + row, c);
    loops.dots(block, pair, c + J * L, shape);
    softmax_backward(c, c + J * L, J);
  }

  // g^t from the gradient that reaches v^t, which is in `total`.
  void set_gradient(const Sample<T>& sample, int64_t b, int64_t t) {
    T* gradient = t > 0 ? pair(sample, t) : sample.gradient;
    read(args.s, t, b, sample.s);
    for (int64_t j = 0; j < row; j += padded) {
      squash_row_backward(sample.total + j, sample.s + j, gradient + j, padded);
    }
    for (int64_t n = 0; n < row && t == 0; ++n) sample.first[n] = uniform * gradient[n];
    if (args.bias_sums == nullptr) return;
    T* bias = static_cast<T*>(args.bias_sums) + b * J * E;
    for (int64_t j = 0; j < J; ++j) {
      for (int64_t e = 0; e < E; ++e) {
        const T before = t == args.iterations - 1 ? T(0) : bias[j * E + e];
        bias[j * E + e] = before + gradient[j * padded + e];
      }
    }
  }

  // x = view[t, b], padded with zeros.
  template <typename from_t = T>
  void read(const View<4>& view, int64_t t, int64_t b, T* x) const {
    const from_t* from = static_cast<const from_t*>(view.data) + t * view.stride[0] + b * view.stride[1];
    for (int64_t j = 0; j < J; ++j) {
      for (int64_t e = 0; e < padded; ++e) {
        x[j * padded + e] = e < E ? load_one(from + j * view.stride[2] + e * view.stride[3]) : T(0);
      }
    }
  }

  // Rows of the block of `count` capsules that begins with i.
  Block<scalar_t> block_at(int64_t b, int64_t i, int64_t count) {
    const View<4>& votes = args.votes;
    scalar_t* from = static_cast<scalar_t*>(votes.data) + b * votes.stride[0] + i * votes.stride[1];
    return read_block(from, votes.stride[1], votes.stride[2], votes.stride[3], count, shape, staging);
  }

  void write_coupling(const T* c, int64_t b, int64_t i, int64_t count) const {
    scalar_t* to = static_cast<scalar_t*>(args.coupling.data) + (b * I + i) * J;
    for (int64_t k = 0; k < count; ++k) {
      for (int64_t j = 0; j < J; ++j) store_one(to + k * J + j, c[j * L + k]);
    }
  }

  const RoutingArgs& args;
  const int64_t I, J, E, chunks, pair_count;
  const LoopTable<scalar_t> loops;
  const int64_t padded;  // E rounded up to whole vectors
  const BlockShape shape;
  const int64_t row;  // J · padded
  const T uniform;    // a coupling of the first iteration
  T *memory, *local_coefficients, *group_sum;
  scalar_t* staging;
};

}  // namespace

void routing_step(const RoutingArgs& args, int64_t begin, int64_t end) {
  dispatch_floating(args.dtype, [&]<typename scalar_t>() {
    Routing<scalar_t> routing(args);
    for (int64_t n = begin; n < end; ++n) routing.step(n);
  });
}

}  // namespace caps::CAPS_ISA

#else

#include <caps/op.h>

namespace caps {
namespace {

constexpr int64_t kChunkNumbers = 64 * 1024;

// Everything but the outputs. What a sample needs is computed for the widest padding, that of 16 numbers.
RoutingArgs routing_args(const Tensor& votes, const std::optional<Tensor>& bias, int64_t iterations, bool leaky) {
  RoutingArgs args{};
  args.dtype = dtype_of(votes);
  args.iterations = iterations;
  args.leaky = leaky;
  args.votes = view_of<4>(votes);
  if (bias) args.bias = view_of<2>(*bias);
  const int64_t capsule = std::max<int64_t>(1, args.votes.size[2] * args.votes.size[3]);
  args.chunk = std::max(kGroup, kChunkNumbers / capsule / kGroup * kGroup);
  return args;
}

int64_t number_size(const RoutingArgs& args) { return args.dtype == DType::float64 ? 8 : 4; }

// Memory of all samples, and `extra` bytes after it.
void* allocate_samples(RoutingArgs& args, int64_t extra) {
  args.sample_size = args.numbers((args.votes.size[3] + 15) / 16 * 16);
  const int64_t bytes = args.votes.size[0] * args.sample_size * number_size(args);
  char* memory = static_cast<char*>(scratch(Scratch::call, bytes + extra));
  args.samples = memory;
  return memory + bytes;
}

void run(RoutingStep step, RoutingArgs& args, int64_t count, int64_t work) {
  args.step = step;
  launch(routing_step, args, count, work);
}

// About how long a pass over the votes of one lower capsule takes, in nanoseconds.
int64_t work_of_capsule(const RoutingArgs& args) { return args.votes.size[2] * (args.votes.size[3] + 15) / 16 * 2; }

std::tuple<Tensor, Tensor, Tensor> dynamic_routing_fwd(Tensor votes, std::optional<Tensor> bias, int64_t iterations,
                                                       bool leaky, bool return_coupling, bool split) {
  RoutingArgs args = routing_args(votes, bias, iterations, leaky);
  const auto [B, I, J, E] = args.votes.size;
  Tensor v = empty(votes, {B, J, E}), s = empty(votes, {iterations, B, J, E}, accumulation_type(votes));
  Tensor coupling = empty(votes, {B, return_coupling ? I : 0, J});
  args.v = view_of<3>(v);
  args.s = view_of<4>(s);
  if (return_coupling) args.coupling = view_of<3>(coupling);
  if (!split) {
    run(RoutingStep::forward, args, B, iterations * I * work_of_capsule(args));
    return {v, s, coupling};
  }
  allocate_samples(args, 0);
  for (args.t = 0; args.t < iterations; ++args.t) {
    run(RoutingStep::forward_pass, args, B * args.chunks(), args.chunk * work_of_capsule(args));
    run(RoutingStep::forward_finish, args, B, args.chunks() * work_of_capsule(args));
  }
  return {v, s, coupling};
}

std::tuple<Tensor, Tensor> dynamic_routing_bwd(Tensor grad_v, Tensor votes, std::optional<Tensor> bias, Tensor s,
                                               int64_t iterations, bool leaky, bool last, bool split, bool remember) {
  RoutingArgs args = routing_args(votes, bias, iterations, leaky);
  args.last = last;
  args.remember = remember && !last;
  args.grad_v = view_of<3>(grad_v);
  args.s = view_of<4>(s);
  const auto [B, I, J, E] = args.votes.size;
  Tensor grad_votes = empty(votes, {B, I, J, E}), grad_bias = bias ? empty(votes, {J, E}) : empty(votes, {0});
  args.grad_votes = view_of<4>(grad_votes);
  args.streamed = worth_streaming(grad_votes) && E * number_size(args) % 64 == 0;
  const int64_t sums_size = bias ? B * J * E * number_size(args) : 0;
  void* sums = split ? allocate_samples(args, sums_size) : scratch(Scratch::call, sums_size);
  if (bias) {
    args.bias_sums = sums;
    args.grad_bias = view_of<2>(grad_bias);
  }
  const int64_t work = work_of_capsule(args);
  if (!split) {
    run(RoutingStep::backward, args, B, 3 * iterations * I * work);
  } else {
    run(RoutingStep::backward_start, args, B, 10 * iterations * work);
    for (args.t = last ? 0 : iterations - 1; args.t > 0; --args.t) {
      run(RoutingStep::backward_pass, args, B * args.chunks(), 2 * args.chunk * work);
      run(RoutingStep::backward_finish, args, B, (args.chunks() + 10) * work);
    }
    run(RoutingStep::backward_votes, args, B * args.chunks(), 2 * args.chunk * work);
  }
  if (bias) run(RoutingStep::backward_bias, args, J, B * E / 4);
  return {grad_votes, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(caps_kernels_cpp, m) {
  m.def(
      "dynamic_routing_fwd(Tensor votes, Tensor? bias, int iterations, bool leaky, bool return_coupling, bool split)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "dynamic_routing_bwd(Tensor grad_v, Tensor votes, Tensor? bias, Tensor s, int iterations, bool leaky, bool last, "
      "bool split, bool remember) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(caps_kernels_cpp, CPU, m) {
  m.impl("dynamic_routing_fwd", TORCH_BOX(&dynamic_routing_fwd));
  m.impl("dynamic_routing_bwd", TORCH_BOX(&dynamic_routing_bwd));
}

}  // namespace caps

#endif
