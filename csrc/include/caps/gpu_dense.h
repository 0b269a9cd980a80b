// What the host and the kernels of dense_capsules on a GPU pass between them, and the tiles in which the kernels work.
//
// A block takes a tile of samples and runs over lower capsules, one at a time: û of one capsule, [samples][J][E], is
// spread over the registers of its threads. Warps share out the parents, lanes the samples and the numbers e:
//   lane l has samples l / e_lanes + m · 32 / e_lanes (m < rows), parents warp + k · warps (k < parents) and numbers
//   e = (n / vec) · e_lanes · vec + l % e_lanes · vec + n % vec (n < width).
#pragma once

#include <caps/gpu.h>

namespace caps::gpu {

#define CAPS_BOTH __host__ __device__ inline

constexpr int kSoftmaxLanes = 8;  // lanes that share a softmax

// Where things are in shared memory, counted in numbers. An odd number of 16 bytes to a row keeps lanes that read
// neighbouring rows at once on different banks. The host works it out: what kernels read from their arguments takes no
// registers.
struct DenseLayout {
  int J, D, E, depth, warps, u_row, u_size, weight_size, score_row, score_size;
  int matrix, grad_u_size;                      // sums of a matrix, and of all warps for grad_u
  int weight_bytes, stage_bytes, number_bytes;  // of W, and with u, of one lower capsule; of a number of sums
  int u_at, scores_at, rest_at;                 // bytes before u, the scores and what lies behind them; W comes first

  template <typename Tile>
  static DenseLayout of(int64_t J, int64_t D, int64_t E) {
    DenseLayout a{};
    a.J = int(J);
    a.D = int(D);
    a.E = int(E);
    a.depth = (a.D + Tile::kDepth - 1) / Tile::kDepth * Tile::kDepth;
    a.warps = (a.J + Tile::kParents - 1) / Tile::kParents;
    a.u_row = (a.depth / Tile::kUnit | 1) * Tile::kUnit;
    a.u_size = Tile::kSamples * a.u_row;
    a.weight_size = a.J * a.depth * Tile::kWeightRow;
    a.score_row = a.J | 1;
    a.score_size = Tile::kSamples * a.score_row;
    a.matrix = a.J * a.D * Tile::kE;
    a.grad_u_size = a.warps * Tile::kSamples * a.depth;
    a.weight_bytes = a.weight_size * int(sizeof(typename Tile::scalar_t));
    a.stage_bytes = a.weight_bytes + a.u_size * int(sizeof(typename Tile::scalar_t));
    a.number_bytes = int(sizeof(typename Tile::T));
    return a;
  }

  // Where things begin with `stages` lower capsules in memory.
  void place(int stages) {
    u_at = stages * weight_bytes;
    scores_at = stages * stage_bytes;
    rest_at = scores_at + 2 * score_size * number_bytes;
  }

  // Bytes of shared memory of a pass, and of the gradients with sums for `matrices` matrices.
  int64_t route_bytes(int64_t stages, bool backward) const {
    return stages * stage_bytes + (backward ? 2 : 1) * int64_t(score_size) * number_bytes;
  }
  int64_t gradient_bytes(int64_t stages, int64_t matrices) const {
    return route_bytes(stages, true) + (grad_u_size + matrices * matrix) * number_bytes;
  }
};

struct DenseArgs {
  View<3> u, v, coupling, grad_v, grad_u;
  View<4> weight, s, grad_weight;
  View<2> bias, grad_bias;  // data is null where there is none, as for coupling
  int64_t positions, iterations;
  int64_t all;                        // B · J · E
  bool leaky, last_only;              // last_only: routing_grad="last"
  bool wide_u, wide_weight;           // rows of d, of e, are consecutive and aligned to 16 bytes
  int u_shift, weight_shift;          // so many lanes, as powers of 2, share the copy of a row of d, of e
  int d_shift;                        // the least power of 2 that is not below D
  int sum_lanes;                      // lanes along e where a warp has a vector
  int64_t tiles, chunk, chunks;       // passes: items of a tile of samples and a chunk of lower capsules
  int64_t part, parts, groups;        // gradients: items of `part` lower capsules; `parts` of them to a shared matrix
  DenseLayout layout;                 // of tiles
  int stages;                         // lower capsules whose W and u are in shared memory, in use or on their way
  int begin, end;                     // the steps this launch does, a grid barrier between each two
  // Scratch, numbers of the type of sums.
  void* partial;       // [chunks][B][J][E]
  void* V;             // forward [B][J][E]: Σ v so far; backward [R - 1][B][J][E]: V^1 …
  void* g;             // [R][B][J][E]
  void* total;         // [B][J][E]: Σ gV so far
  void* weight_parts;  // [groups][J][D][E], or null where the gradients' items write their matrices whole
  void* stats;         // plain gradients: [blocks][B][R][3]
};

// A row of the table of tiles.
//   e_lanes, rows, width, parents: above;   warps: the most in a block;   blocks: that share a processor in forward
//   keep: V and g of a tile stay in registers while a block runs over lower capsules; else they are read again for each
//   tensor_cores: products by m16n8k8, or else by FMA
template <typename scalar, int e_lanes, int rows, int width, int parents, int warps, int blocks, bool keep,
          bool tensor_cores = false>
struct DenseTile {
  using scalar_t = scalar;
  using T = Acc<scalar>;
  static constexpr int kLanes = e_lanes, kRows = rows, kWidth = width, kParents = parents;
  static constexpr int kSampleLanes = 32 / e_lanes, kSamples = kSampleLanes * rows, kE = e_lanes * width;
  static constexpr int kWarps = warps, kBlocks = blocks;
  static constexpr bool kKeep = keep, kTensorCores = tensor_cores;
  static constexpr int kVec = tensor_cores ? 2 : kWide<T>;
  static constexpr int kDepth = tensor_cores ? 8 : kWide<scalar>;  // D is padded with zeros to a multiple of it
  static constexpr int kUnit = kWide<scalar>;  // numbers of an asynchronous copy
  static constexpr int kWeightRow = tensor_cores ? (kE / kUnit | 1) * kUnit : kE;  // in shared memory
  static_assert(!tensor_cores || (e_lanes == 4 && rows == 2), "lanes as in the fragments of m16n8k8");
  static_assert(width % kVec == 0 && kSampleLanes >= width);
};

}  // namespace caps::gpu
