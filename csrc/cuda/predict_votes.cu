// predict_votes: û_ije = Σ_d u_id W_ijde, and its gradients. caps_kernels/ops/predict_votes has the mathematics.
//
// Columns (j, e) are handled in packs of n. A thread of `forward` has one pack of one lower capsule and kBatch samples. A
// block of `backward` has all packs of one type, a thread each, and goes over a chunk of that type's rows (b, p): gû is
// read once. Where packs are too few or too many for that, or numbers d too many, a warp of `backward_u` has one lower
// capsule and a few samples, its lanes taking turns at the columns; and a thread of `backward_weight` has one pack of one
// type and goes over a chunk of rows.
#include <caps/gpu.h>

namespace caps::gpu {
namespace {

struct VotesArgs {
  int64_t positions;
  View<3> u;           // [B, I, D]
  View<4> weight;      // [T, J, D, E]
  View<4> grad_votes;  // [B, I, J, E]; only in backward
  void* out;           // votes [B, I, J, E], or in backward grad_u [B, I, D], contiguous
  void* grad_weight;   // [T, J, D, E], contiguous
  void* partial;       // [chunks, T, J, D, E] in the type of sums, where there are several chunks
  int64_t chunk, chunks;  // rows of a chunk, and how many chunks
};

constexpr int kVotesThreads = 256;
constexpr int kDims = 8;  // of D at a time in backward

// The first number of column pack `c` (n columns) of a row of [.., J, E], or of [.., J, D, E] with a d.
template <int n, typename scalar_t>
CAPS_DEVICE scalar_t* column(const View<4>& view, int64_t first, int64_t second, int64_t c, int64_t E) {
  const int64_t j = c * n / E, e = c * n % E;
  return static_cast<scalar_t*>(view.data) + first * view.stride[0] + second * view.stride[1] + j * view.stride[2] +
         e * view.stride[3];
}

template <int n, typename scalar_t>
CAPS_DEVICE const scalar_t* weights(const VotesArgs& args, int64_t type, int64_t c) {
  const int64_t E = args.weight.size[3], j = c * n / E, e = c * n % E;
  return static_cast<const scalar_t*>(args.weight.data) + type * args.weight.stride[0] + j * args.weight.stride[1] +
         e * args.weight.stride[3];
}

template <typename scalar_t>
CAPS_DEVICE const scalar_t* inputs(const VotesArgs& args, int64_t b, int64_t i) {
  return static_cast<const scalar_t*>(args.u.data) + b * args.u.stride[0] + i * args.u.stride[1];
}

template <typename scalar_t, int n, int kBatch>
__global__ void __launch_bounds__(kVotesThreads) votes_forward(const __grid_constant__ VotesArgs args) {
  using T = Acc<scalar_t>;
  const int64_t B = args.u.size[0], I = args.u.size[1], D = args.u.size[2];
  const int64_t columns = args.weight.size[1] * args.weight.size[3] / n;
  const int64_t tiles = (B + kBatch - 1) / kBatch, groups = (I * columns + kVotesThreads - 1) / kVotesThreads;
  for (int64_t item = blockIdx.x; item < groups * tiles; item += gridDim.x) {
    const int64_t pack = item / tiles * kVotesThreads + threadIdx.x, first = item % tiles * kBatch;
    if (pack >= I * columns) continue;
    const int64_t i = pack / columns, c = pack % columns;
    const int count = int(B - first < kBatch ? B - first : kBatch);
    const scalar_t* w = weights<n, scalar_t>(args, i / args.positions, c);
    const scalar_t* u = inputs<scalar_t>(args, first, i);
    Pack<T, n> sum[kBatch] = {};
    for (int64_t d = 0; d < D; ++d) {
      const Pack<T, n> x = load<n>(w + d * args.weight.stride[2]);
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const T factor = b < count ? widen(u[b * args.u.stride[0] + d * args.u.stride[2]]) : T(0);
#pragma unroll
        for (int k = 0; k < n; ++k) sum[b][k] += factor * x[k];
      }
    }
    scalar_t* out = static_cast<scalar_t*>(args.out) + ((first * I + i) * columns + c) * n;
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (b < count) store<scalar_t, n>(out + b * I * columns * n, sum[b]);
    }
  }
}

// Adds up each of `count` numbers over the lanes; lane l is left with the sums count / 32 · l … in x[0] …. Steps are
// arguments of a template so that numbers stay in registers.
template <int count, int step = 16, typename T, int size>
CAPS_DEVICE void sum_over_lanes(T (&x)[size]) {
  static_assert(count % (2 * step) == 0);
  constexpr int half = count / 2;
  const bool upper = (int(threadIdx.x) % 32 & step) != 0;
#pragma unroll
  for (int k = 0; k < half; ++k) {
    const T kept = upper ? x[k + half] : x[k], sent = upper ? x[k] : x[k + half];
    x[k] = kept + __shfl_xor_sync(0xffffffffu, sent, step);
  }
  if constexpr (step > 1) sum_over_lanes<half, step / 2>(x);
}

// Where the sums of a pack of grad_weight begin, for number d0 of D: in the result, or with those of its chunk.
template <typename scalar_t, int n>
CAPS_DEVICE void store_sums(const VotesArgs& args, int64_t type, int64_t chunk, int64_t c, int64_t d0,
                            const Pack<Acc<scalar_t>, n> (&sums)[kDims]) {
  using T = Acc<scalar_t>;
  const int64_t D = args.u.size[2], J = args.weight.size[1], E = args.weight.size[3];
  const int64_t j = c * n / E, e = c * n % E, at = ((type * J + j) * D + d0) * E + e;
#pragma unroll
  for (int d = 0; d < kDims; ++d) {
    if (d0 + d >= D) continue;
    if (args.chunks == 1) store<scalar_t, n>(static_cast<scalar_t*>(args.grad_weight) + at + d * E, sums[d]);
    else store<T, n>(static_cast<T*>(args.partial) + chunk * args.weight.size[0] * J * D * E + at + d * E, sums[d]);
  }
}

template <typename scalar_t, int n>
__global__ void __launch_bounds__(kVotesThreads) votes_backward(const __grid_constant__ VotesArgs args) {
  using T = Acc<scalar_t>;
  constexpr int kRows = 32 / kDims;  // at a time: a number of grad_u for each lane
  CAPS_SHARED(T, of_warps, 2 * kVotesThreads);
  const int64_t I = args.u.size[1], D = args.u.size[2], E = args.weight.size[3], types = args.weight.size[0];
  const int64_t columns = args.weight.size[1] * E / n, rows = args.u.size[0] * args.positions;
  const int64_t c = threadIdx.x;
  const int lane = int(threadIdx.x) % 32, warps = int(blockDim.x) / 32, r = lane / kDims, d_of_lane = lane % kDims;
  for (int64_t item = blockIdx.x; item < types * args.chunks; item += gridDim.x) {
    const int64_t type = item % types, chunk = item / types, begin = chunk * args.chunk;
    const int64_t end = begin + args.chunk < rows ? begin + args.chunk : rows;
    Pack<T, n> w[kDims] = {}, grad_weight[kDims] = {};
    if (c < columns) {
#pragma unroll
      for (int d = 0; d < kDims; ++d) {
        if (d < D) w[d] = load<n>(weights<n, scalar_t>(args, type, c) + d * args.weight.stride[2]);
      }
    }
    T* shared = of_warps;  // two halves by turns: one barrier is then enough
    for (int64_t first = begin; first < end; first += kRows) {
      T grad_u[kRows * kDims] = {};
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        if (c >= columns || first + k >= end) continue;
        const int64_t b = (first + k) / args.positions, i = type * args.positions + (first + k) % args.positions;
        const Pack<T, n> x = load<n>(column<n, scalar_t>(args.grad_votes, b, i, c, E));
        const scalar_t* u = inputs<scalar_t>(args, b, i);
#pragma unroll
        for (int d = 0; d < kDims; ++d) {
          const T factor = d < D ? widen(u[d * args.u.stride[2]]) : T(0);
#pragma unroll
          for (int v = 0; v < n; ++v) {
            grad_weight[d][v] += factor * x[v];
            grad_u[k * kDims + d] += w[d][v] * x[v];
          }
        }
      }
      sum_over_lanes<kRows * kDims>(grad_u);
      shared[threadIdx.x] = grad_u[0];
      __syncthreads();
      if (int(threadIdx.x) < 32 && first + r < end && d_of_lane < D) {
        T sum = 0;
        for (int warp = 0; warp < warps; ++warp) sum += shared[warp * 32 + lane];
        const int64_t b = (first + r) / args.positions, i = type * args.positions + (first + r) % args.positions;
        static_cast<scalar_t*>(args.out)[(b * I + i) * D + d_of_lane] = narrow<scalar_t>(sum);
      }
      shared = shared == of_warps ? of_warps + kVotesThreads : of_warps;
    }
    if (c < columns) store_sums<scalar_t, n>(args, type, chunk, c, 0, grad_weight);
    __syncthreads();  // the next item begins with the first half
  }
}

template <typename scalar_t, int n, int kBatch>
__global__ void __launch_bounds__(kVotesThreads) votes_backward_u(const __grid_constant__ VotesArgs args) {
  using T = Acc<scalar_t>;
  const int64_t B = args.u.size[0], I = args.u.size[1], D = args.u.size[2], E = args.weight.size[3];
  const int64_t columns = args.weight.size[1] * E / n, tiles = (B + kBatch - 1) / kBatch;
  const int64_t slices = (D + kDims - 1) / kDims, warps = int64_t(gridDim.x) * (kVotesThreads / 32);
  const int lane = int(threadIdx.x) % 32;
  int64_t item = int64_t(blockIdx.x) * (kVotesThreads / 32) + threadIdx.x / 32;
  for (; item < I * slices * tiles; item += warps) {
    const int64_t first = item % tiles * kBatch, d0 = item / tiles % slices * kDims, i = item / tiles / slices;
    const int count = int(B - first < kBatch ? B - first : kBatch), dims = int(D - d0 < kDims ? D - d0 : kDims);
    T sum[kBatch * kDims] = {};
    for (int64_t c = lane; c < columns; c += 32) {
      const scalar_t* w = weights<n, scalar_t>(args, i / args.positions, c) + d0 * args.weight.stride[2];
      const scalar_t* g = column<n, scalar_t>(args.grad_votes, first, i, c, E);
      Pack<T, n> x[kBatch] = {};
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (b < count) x[b] = load<n>(g + b * args.grad_votes.stride[0]);
      }
#pragma unroll
      for (int d = 0; d < kDims; ++d) {
        if (d >= dims) continue;
        const Pack<T, n> w_d = load<n>(w + d * args.weight.stride[2]);
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
#pragma unroll
          for (int k = 0; k < n; ++k) sum[b * kDims + d] += w_d[k] * x[b][k];
        }
      }
    }
    sum_over_lanes<kBatch * kDims>(sum);
    constexpr int each = kBatch * kDims / 32;
#pragma unroll
    for (int k = 0; k < each; ++k) {
      const int b = (lane * each + k) / kDims, d = (lane * each + k) % kDims;
      if (b >= count || d >= dims) continue;
      static_cast<scalar_t*>(args.out)[((first + b) * I + i) * D + d0 + d] = narrow<scalar_t>(sum[k]);
    }
  }
}

template <typename scalar_t, int n>
__global__ void __launch_bounds__(kVotesThreads) votes_backward_weight(const __grid_constant__ VotesArgs args) {
  using T = Acc<scalar_t>;
  const int64_t D = args.u.size[2], J = args.weight.size[1], E = args.weight.size[3], types = args.weight.size[0];
  const int64_t columns = J * E / n, slices = (D + kDims - 1) / kDims, rows = args.u.size[0] * args.positions;
  const int64_t packs = types * slices * columns, step = int64_t(gridDim.x) * kVotesThreads;
  int64_t item = int64_t(blockIdx.x) * kVotesThreads + threadIdx.x;
  for (; item < packs * args.chunks; item += step) {
    const int64_t c = item % columns, d0 = item / columns % slices * kDims, type = item / columns / slices % types;
    const int64_t chunk = item / packs, begin = chunk * args.chunk;
    const int64_t end = begin + args.chunk < rows ? begin + args.chunk : rows;
    const int dims = int(D - d0 < kDims ? D - d0 : kDims);
    Pack<T, n> sum[kDims] = {};
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / args.positions, i = type * args.positions + row % args.positions;
      const Pack<T, n> x = load<n>(column<n, scalar_t>(args.grad_votes, b, i, c, E));
      const scalar_t* u = inputs<scalar_t>(args, b, i) + d0 * args.u.stride[2];
#pragma unroll
      for (int d = 0; d < kDims; ++d) {
        const T factor = d < dims ? widen(u[d * args.u.stride[2]]) : T(0);
#pragma unroll
        for (int k = 0; k < n; ++k) sum[d][k] += factor * x[k];
      }
    }
    store_sums<scalar_t, n>(args, type, chunk, c, d0, sum);
  }
}

// grad_weight from the sums of chunks, in their order.
template <typename scalar_t>
__global__ void __launch_bounds__(kVotesThreads) votes_add_chunks(const __grid_constant__ VotesArgs args) {
  using T = Acc<scalar_t>;
  const int64_t size = args.weight.size[0] * args.weight.size[1] * args.weight.size[2] * args.weight.size[3];
  const int64_t step = int64_t(gridDim.x) * kVotesThreads;
  for (int64_t k = int64_t(blockIdx.x) * kVotesThreads + threadIdx.x; k < size; k += step) {
    T sum = 0;
    for (int64_t chunk = 0; chunk < args.chunks; ++chunk) sum += static_cast<const T*>(args.partial)[chunk * size + k];
    static_cast<scalar_t*>(args.grad_weight)[k] = narrow<scalar_t>(sum);
  }
}

}  // namespace
}  // namespace caps::gpu

#include <caps/gpu_op.h>
#include <caps/gpu_view.h>

namespace caps::gpu {
namespace {

// Threads that fill a large GPU, and rows after which a sum is left to a chunk of its own, for its digits.
constexpr int64_t kFullGpu = 128 * 1024, kLeastRows = 32, kMostRows = 1024;

// Packs of a row for which a warp is worth while in `backward`.
constexpr int64_t kLeastColumns = 16;

Grid blocks_for(int64_t items, int64_t items_a_block) {
  return {std::min(kMaxBlocks, (items + items_a_block - 1) / items_a_block), kVotesThreads};
}

// Calls f.template operator()<scalar_t, n>() with the packs that all of the tensors can be read in.
template <typename F>
void dispatch_packs(const Tensor& u, const View<4>& weight, const View<4>* grad_votes, const F& f) {
  dispatch_floating(dtype_of(u), [&]<typename scalar_t>() {
    constexpr int n = kWide<scalar_t>;
    const bool wide = can_load_wide(weight, 3, n) && (grad_votes == nullptr || can_load_wide(*grad_votes, 3, n));
    if (wide) f.template operator()<scalar_t, n>();
    else f.template operator()<scalar_t, 1>();
  });
}

Tensor predict_votes_fwd(Tensor u, Tensor weight, int64_t positions) {
  const Gpu gpu("predict_votes", u);
  VotesArgs args{};
  args.positions = positions;
  args.u = view_of<3>(u);
  args.weight = view_of<4>(weight);
  const auto [T, J, D, E] = args.weight.size;
  const int64_t B = u.size(0), I = u.size(1);
  Tensor votes = empty(u, {B, I, J, E});
  args.out = votes.mutable_data_ptr();
  dispatch_packs(u, args.weight, nullptr, [&]<typename scalar_t, int n>() {
    const int64_t groups = (I * J * E / n + kVotesThreads - 1) / kVotesThreads;
    constexpr int few = 2, many = 16;
    if (B <= few) gpu.launch(votes_forward<scalar_t, n, few>, blocks_for(B > 0 ? groups : 0, 1), args);
    else gpu.launch(votes_forward<scalar_t, n, many>, blocks_for(groups * ((B + many - 1) / many), 1), args);
  });
  return votes;
}

std::tuple<Tensor, Tensor> predict_votes_bwd(Tensor grad_votes, Tensor u, Tensor weight, int64_t positions) {
  const Gpu gpu("predict_votes", u);
  VotesArgs args{};
  args.positions = positions;
  args.u = view_of<3>(u);
  args.weight = view_of<4>(weight);
  args.grad_votes = view_of<4>(grad_votes);
  const auto [T, J, D, E] = args.weight.size;
  const int64_t B = u.size(0), I = u.size(1), slices = (D + kDims - 1) / kDims, rows = B * positions;
  Tensor grad_u = empty(u, {B, I, D}), grad_weight = empty(weight, {T, J, D, E});
  dispatch_packs(u, args.weight, &args.grad_votes, [&]<typename scalar_t, int n>() {
    // The packs are counted as if they were wide, so that the sums are the same for all strides.
    const int64_t packs = T * slices * std::max<int64_t>(1, J * E / kWide<scalar_t>);
    const int64_t wanted = std::min(kFullGpu / packs, (rows + kLeastRows - 1) / kLeastRows);
    const int64_t chunks = std::max<int64_t>({1, wanted, (rows + kMostRows - 1) / kMostRows});
    args.chunk = std::max<int64_t>(1, (rows + chunks - 1) / chunks);
    args.chunks = std::max<int64_t>(1, (rows + args.chunk - 1) / args.chunk);
    args.out = grad_u.mutable_data_ptr();
    args.grad_weight = grad_weight.mutable_data_ptr();
    Tensor partial = empty(u, {args.chunks > 1 ? args.chunks : 0, T * J * D * E}, accumulation_type(u));
    args.partial = partial.mutable_data_ptr();
    const int64_t columns = J * E / n;
    if (slices == 1 && columns >= kLeastColumns && columns <= kVotesThreads) {
      const Grid grid{std::min(kMaxBlocks, T * args.chunks), int(columns + 31) / 32 * 32};
      gpu.launch(votes_backward<scalar_t, n>, grid, args);
    } else {
      constexpr int batch = n > 4 ? 4 : 8;
      const int64_t items = I * slices * ((B + batch - 1) / batch);
      gpu.launch(votes_backward_u<scalar_t, n, batch>, blocks_for(items, kVotesThreads / 32), args);
      gpu.launch(votes_backward_weight<scalar_t, n>, blocks_for(T * slices * columns * args.chunks, kVotesThreads), args);
    }
    if (args.chunks > 1) gpu.launch(votes_add_chunks<scalar_t>, blocks_for(T * J * D * E, kVotesThreads), args);
  });
  return {grad_u, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(CAPS_GPU_OPS, m) {
  m.def("predict_votes_fwd(Tensor u, Tensor weight, int positions) -> Tensor");
  m.def("predict_votes_bwd(Tensor grad_votes, Tensor u, Tensor weight, int positions) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(CAPS_GPU_OPS, CAPS_GPU_KEY, m) {
  m.impl("predict_votes_fwd", TORCH_BOX(&predict_votes_fwd));
  m.impl("predict_votes_bwd", TORCH_BOX(&predict_votes_bwd));
}

}  // namespace caps::gpu
