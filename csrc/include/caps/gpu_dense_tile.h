// The passes of dense_capsules on a GPU in tiles, for sizes in the table of tiles.
#pragma once

#include <caps/gpu_dense_block.h>

namespace caps::gpu {

// A pass of forward: partial[chunk] of a tile becomes Σ c û over a chunk of lower capsules. In the first iteration c is
// the same throughout and is left to whoever adds the chunks.
template <typename Tile>
CAPS_DEVICE void route(DenseBlock<Tile>& block, int tile, int64_t chunk, bool first, bool last) {
  using Block = DenseBlock<Tile>;
  using T = typename Tile::T;
  const DenseArgs& args = block.args;
  const int64_t I = args.u.size[1], i0 = chunk * args.chunk, i1 = i0 + args.chunk < I ? i0 + args.chunk : I;
  typename Block::Values sums{};
  auto* coupling = static_cast<typename Tile::scalar_t*>(last ? args.coupling.data : nullptr);
  const auto put_coupling = [&](int r, int j, T c) {
    const int64_t b = int64_t(tile) * Tile::kSamples + r;
    if (coupling && b < args.u.size[0]) {
      coupling[(b * I + block.capsule()) * block.layout.J + j] = narrow<typename Tile::scalar_t>(c);
    }
  };
  block.start({int(i0), int(i1 - i0), tile, 1});
  if (first) {
    while (block.more()) {
      block.next();
      block.votes(sums);
      if (coupling) block.for_scores([&](int r, int j) { put_coupling(r, j, block.uniform()); });
    }
  }
  const typename Block::Vectors V(block, static_cast<const T*>(args.V), tile);
  while (block.more()) {
    block.next();
    typename Block::Values x{};
    block.votes(x);
    block.put_scores(x, V, block.scores(0));
    __syncthreads();
    block.forget();
    block.template softmax<false>(block.scores(0), block.scores(0), put_coupling);
    __syncthreads();
    block.forget();
    block.add_scaled(sums, block.scores(0), x);
  }
  block.finish();
  block.store_values(static_cast<T*>(args.partial) + chunk * args.all, tile, sums);
}

// A pass of backward for iteration t: partial[chunk] of a tile becomes Σ gb û.
template <typename Tile>
CAPS_DEVICE void route_backward(DenseBlock<Tile>& block, int tile, int64_t chunk, int64_t t) {
  using Block = DenseBlock<Tile>;
  using T = typename Tile::T;
  const DenseArgs& args = block.args;
  const int64_t I = args.u.size[1], i0 = chunk * args.chunk, i1 = i0 + args.chunk < I ? i0 + args.chunk : I;
  typename Block::Values sums{};
  const typename Block::Vectors V(block, static_cast<const T*>(args.V) + (t - 1) * args.all, tile);
  const typename Block::Vectors g(block, static_cast<const T*>(args.g) + t * args.all, tile);
  block.start({int(i0), int(i1 - i0), tile, 1});
  while (block.more()) {
    block.next();
    typename Block::Values x{};
    block.votes(x);
    block.put_scores(x, V, block.scores(0));
    block.forget();
    block.put_scores(x, g, block.scores(1));
    __syncthreads();
    block.forget();
    block.template softmax<true>(block.scores(0), block.scores(1), [](int, int, T) {});
    __syncthreads();
    block.forget();
    block.add_scaled(sums, block.scores(1), x);
  }
  block.finish();
  block.store_values(static_cast<T*>(args.partial) + chunk * args.all, tile, sums);
}

// The gradients of u and of the matrices of a group of lower capsules: for each capsule and tile of samples û, the
// coefficients of every iteration, gû, and its products with W and u.
template <typename Tile>
class DenseGradients {
  using Block = DenseBlock<Tile>;
  using Values = typename Block::Values;
  using S = typename Tile::scalar_t;
  using T = typename Tile::T;

 public:
  CAPS_DEVICE explicit DenseGradients(Block& b) : block_(b), args_(b.args) {}

  // One group: `part` lower capsules, whose matrices are their own or one that they share.
  CAPS_DEVICE void run(int group) {
    const int I = int(args_.u.size[1]), P = int(args_.positions), part = int(args_.part), parts = int(args_.parts);
    const bool shared = P > 1;
    const int type = group / parts, end = shared ? (type + 1) * P : I;
    const int i0 = shared ? type * P + group % parts * part : group * part;
    const int i1 = i0 + part < end ? i0 + part : end;
    __syncthreads();
    for (int n = block_.thread; n < (shared ? 1 : i1 - i0) * block_.layout.matrix; n += int(blockDim.x)) {
      sums()[n] = 0;
    }
    block_.start({i0, i1 - i0, 0, int(args_.tiles)});
    while (block_.more()) {
      block_.next();
      capsule();
    }
    block_.finish();
    __syncthreads();
    put_sums(group);
  }

 private:
  CAPS_DEVICE T* grad_u() const { return block_.rest(); }
  CAPS_DEVICE T* sums() const { return block_.rest() + block_.layout.grad_u_size; }
  // V or g of an iteration.
  CAPS_DEVICE const T* vectors(const void* from, int t) const { return static_cast<const T*>(from) + t * args_.all; }

  CAPS_DEVICE void capsule() {
    const int R = int(args_.iterations), tile = block_.tile();
    Values grad{}, x{};
    if (!args_.last_only || R == 1) {
      block_.load_values(vectors(args_.g, 0), tile, grad);
      const T c = block_.uniform();
#pragma unroll
      for (int k = 0; k < Tile::kParents; ++k) {
#pragma unroll
        for (int m = 0; m < Tile::kRows; ++m) {
#pragma unroll
          for (int n = 0; n < Tile::kWidth; ++n) grad[k][m][n] *= c;
        }
      }
    }
    if (R > 1) block_.votes(x);
    for (int t = args_.last_only && R > 1 ? R - 1 : 1; t < R; ++t) {
      const typename Block::Vectors V_t(block_, vectors(args_.V, t - 1), tile), g_t(block_, vectors(args_.g, t), tile);
      block_.put_scores(x, V_t, block_.scores(0));
      block_.forget();
      block_.put_scores(x, g_t, block_.scores(1));
      __syncthreads();
      block_.forget();
      block_.template softmax<true>(block_.scores(0), block_.scores(1), [](int, int, T) {});
      __syncthreads();
      block_.forget();
      block_.add_scaled(grad, block_.scores(0), g_t);
      block_.forget();
      if (!args_.last_only) block_.add_scaled(grad, block_.scores(1), V_t);
      __syncwarp();  // the lane that writes the next score is not the only one of its warp that reads this one
    }
    block_.forget();
    for (int d0 = 0; d0 < block_.layout.depth; d0 += kStep) put_grad_u(grad, d0);
    block_.forget();
    T* sums = this->sums() + (args_.positions > 1 ? 0 : block_.in_group() * block_.layout.matrix);
#pragma unroll (Tile::kParents == 1 ? 2 : 1)
    for (int d = 0; d < block_.layout.D; ++d) add_grad_weight(grad, d, sums);
    __syncthreads();
    block_.forget();
    write_grad_u(tile);
  }

  // Σ_je gû W of a warp's parents, for kStep numbers d.
  CAPS_DEVICE void put_grad_u(const Values& grad, int d0) const {
    T result[Tile::kRows][kStep] = {};
    const S* w = block_.weight();
#pragma unroll
    for (int k = 0; k < Tile::kParents; ++k) {
      if (!block_.has(k)) continue;
#pragma unroll
      for (int d = 0; d < kStep; ++d) {
        const S* at = w + (block_.parent(k) * block_.layout.depth + d0 + d) * Tile::kWeightRow;
#pragma unroll
        for (int n = 0; n < Tile::kWidth; n += Tile::kVec) {
          const Pack<T, Tile::kVec> w_e = load_pack<Tile::kVec>(at + block_.number(n));
#pragma unroll
          for (int m = 0; m < Tile::kRows; ++m) {
#pragma unroll
            for (int v = 0; v < Tile::kVec; ++v) result[m][d] += grad[k][m][n + v] * w_e[v];
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < Tile::kRows; ++m) {
      T* to = grad_u() + (block_.warp * Tile::kSamples + block_.row(m)) * block_.layout.depth + d0;
#pragma unroll
      for (int d = 0; d < kStep; ++d) {
        const T sum = group_sum(result[m][d], Tile::kLanes);
        if (block_.e_lane == 0) to[d] = sum;
      }
    }
  }

  // Adds the warps in their order.
  CAPS_DEVICE void write_grad_u(int tile) const {
    const auto& out = args_.grad_u;
    const int D = block_.layout.D, size = Tile::kSamples * block_.layout.depth;
    for (int n = block_.thread; n < Tile::kSamples << args_.d_shift; n += int(blockDim.x)) {
      const int row = n >> args_.d_shift, d = n - (row << args_.d_shift);
      const int64_t b = int64_t(tile) * Tile::kSamples + row;
      if (b >= args_.u.size[0]) break;
      if (d >= D) continue;
      T sum = 0;
      for (int warp = 0; warp < block_.warps(); ++warp) sum += grad_u()[warp * size + row * block_.layout.depth + d];
      static_cast<S*>(out.data)[(b * out.size[1] + block_.capsule()) * D + d] = narrow<S>(sum);
    }
  }

  // Adds Σ_b u gû of a number d to the sums of a matrix: over a thread's samples, then over lanes, which halve the
  // numbers e they hold at each step until one is left, and then add it up.
  CAPS_DEVICE void add_grad_weight(const Values& grad, int d, T* sums) const {
    T u[Tile::kRows];
#pragma unroll
    for (int m = 0; m < Tile::kRows; ++m) u[m] = widen(block_.u()[block_.row(m) * block_.layout.u_row + d]);
#pragma unroll
    for (int k = 0; k < Tile::kParents; ++k) {
      if (!block_.has(k)) continue;
      T part[Tile::kWidth] = {};
#pragma unroll
      for (int m = 0; m < Tile::kRows; ++m) {
#pragma unroll
        for (int n = 0; n < Tile::kWidth; ++n) part[n] += u[m] * grad[k][m][n];
      }
      const int n = scatter_sum<Tile::kWidth, 16>(part, 0);
      // Lanes that differ in what is left of the bits of samples hold the same sum.
      if (block_.row0 % (Tile::kSampleLanes / Tile::kWidth) == 0) {
        sums[(block_.parent(k) * block_.layout.D + d) * Tile::kE + block_.number(n)] += part[0];
      }
    }
  }

  // part[0] becomes the sum over sample lanes of number n, which is returned.
  template <int size, int bit>
  CAPS_DEVICE int scatter_sum(T (&part)[Tile::kWidth], int n) const {
    if constexpr (bit < Tile::kLanes) {
      return n;
    } else if constexpr (size == 1) {
      part[0] += __shfl_xor_sync(0xffffffffu, part[0], bit);
      return scatter_sum<1, bit / 2>(part, n);
    } else {
      const bool upper = block_.thread % 32 & bit;
#pragma unroll
      for (int k = 0; k < size / 2; ++k) {
        const T other = upper ? part[k] : part[k + size / 2];
        part[k] = (upper ? part[k + size / 2] : part[k]) + __shfl_xor_sync(0xffffffffu, other, bit);
      }
      return scatter_sum<size / 2, bit / 2>(part, n + (upper ? size / 2 : 0));
    }
  }

  // The sums of a group's matrices, or of its part of one.
  CAPS_DEVICE void put_sums(int group) const {
    const int64_t size = int64_t(block_.layout.J) * block_.layout.D * block_.layout.E;
    if (args_.weight_parts) return put(static_cast<T*>(args_.weight_parts) + group * size, sums());
    const bool shared = args_.positions > 1;
    for (int n = 0; n < (shared ? 1 : block_.group_size()); ++n) {
      const int64_t matrix = shared ? group : int64_t(group) * args_.part + n;
      put(static_cast<S*>(args_.grad_weight.data) + matrix * size, sums() + n * block_.layout.matrix);
    }
  }

  // The sums of one matrix, to [J, D, E].
  template <typename out_t>
  CAPS_DEVICE void put(out_t* to, const T* sums) const {
    const int E = block_.layout.E, rows = block_.layout.J * block_.layout.D;
    for (int n = block_.thread; n < rows * E; n += int(blockDim.x)) {
      to[n] = narrow<out_t>(sums[n / E * Tile::kE + n % E]);
    }
  }

  static constexpr int kStep = Tile::kUnit < 4 ? Tile::kUnit : 4;
  Block& block_;
  const DenseArgs& args_;
};

}  // namespace caps::gpu
