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

struct DenseArgs {
  View<3> u, v, coupling, grad_v, grad_u;
  View<4> weight, s, grad_weight;
  View<2> bias, grad_bias;  // data is null where there is none, as for coupling
  int64_t positions, iterations;
  bool leaky, last_only;              // last_only: routing_grad="last"
  bool wide_u, wide_weight;           // rows of d, of e, are consecutive and aligned to 16 bytes
  int64_t tiles, chunk, chunks;       // passes: items of a tile of samples and a chunk of lower capsules
  int64_t part, parts, groups;        // gradients: items of `part` lower capsules; `parts` of them to a shared matrix
  int64_t stages;                     // lower capsules whose W and u are in shared memory, in use or on their way
  int64_t begin, end;                 // the steps this launch does, a grid barrier between each two
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
  static_assert(!tensor_cores || (e_lanes == 4 && rows == 2), "lanes as in the fragments of m16n8k8");
  static_assert(width % kVec == 0 && kSampleLanes >= width);
};

// Where things are in shared memory, counted in numbers. An odd number of 16 bytes to a row keeps lanes that read
// neighbouring rows at once on different banks.
template <typename Tile>
struct DenseLayout {
  static constexpr int kUnit = kWide<typename Tile::scalar_t>;
  static constexpr int kWeightRow = Tile::kTensorCores ? (Tile::kE / kUnit | 1) * kUnit : Tile::kE;
  int J, D, E, depth, warps, u_row, u_size, weight_size, score_row, score_size;

  CAPS_BOTH DenseLayout(int64_t j, int64_t d, int64_t e)
      : J(int(j)),
        D(int(d)),
        E(int(e)),
        depth((D + Tile::kDepth - 1) / Tile::kDepth * Tile::kDepth),
        warps((J + Tile::kParents - 1) / Tile::kParents),
        u_row((depth / kUnit | 1) * kUnit),
        u_size(Tile::kSamples * u_row),
        weight_size(J * depth * kWeightRow),
        score_row(J | 1),
        score_size(Tile::kSamples * score_row) {}

  CAPS_BOTH int64_t matrix() const { return int64_t(J) * D * Tile::kE; }
  CAPS_BOTH int64_t stage_bytes() const { return int64_t(u_size + weight_size) * sizeof(typename Tile::scalar_t); }
  // Bytes of shared memory of a pass, and of the gradients with sums for `matrices` matrices.
  CAPS_BOTH int64_t route_bytes(int64_t stages, bool backward) const {
    return stages * stage_bytes() + (backward ? 2 : 1) * int64_t(score_size) * sizeof(typename Tile::T);
  }
  CAPS_BOTH int64_t gradient_bytes(int64_t stages, int64_t matrices) const {
    const int64_t grad_u = int64_t(warps) * Tile::kSamples * depth;
    return route_bytes(stages, true) + (grad_u + matrices * matrix()) * int64_t(sizeof(typename Tile::T));
  }
};

}  // namespace caps::gpu
