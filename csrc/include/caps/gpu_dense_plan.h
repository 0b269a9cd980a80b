// How the host cuts a call of dense_capsules on a GPU into items, and the table of tiles. Results depend on the cut, so
// it is a function of the shape alone (and of how much shared memory a block may have, where a tile would not fit).
#pragma once

#include <caps/gpu_dense.h>
#include <caps/gpu_dense_plain.h>
#include <caps/gpu_op.h>
#include <caps/gpu_view.h>

namespace caps::gpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Lanes of a warp, a power of 2, for so many pieces.
inline int lanes_for(int64_t pieces) {
  int lanes = 1;
  while (lanes < pieces && lanes < 32) lanes *= 2;
  return lanes;
}

// The least n with 2ⁿ ≥ size.
inline int power_of(int size) {
  int n = 0;
  while (1 << n < size) ++n;
  return n;
}

// Items that keep the GPU busy: two blocks for each of 132 processors.
constexpr int64_t kItems = 264;
constexpr int64_t kSharedBytes = 160 * 1024;  // that a block may take, as far as the GPU has them
constexpr int64_t kSumBytes = 48 * 1024;      // sums of gradients of matrices in shared memory, but for a single one

struct Plan {
  int threads;
  int64_t forward_bytes, backward_bytes, gradient_bytes;
};

// The table, by dtype: the first row whose E and J are large enough is taken.
//             e_lanes, rows, width, parents, warps, blocks, keep
template <typename scalar_t>
struct DenseTiles {  // 16 bits: samples, numbers and lanes of a fragment of m16n8k8
  using type =
      std::tuple<DenseTile<scalar_t, 4, 2, 4, 1, 10, 2, true, true>, DenseTile<scalar_t, 4, 2, 4, 4, 16, 1, false, true>,
                 DenseTile<scalar_t, 4, 2, 8, 1, 10, 2, true, true>>;
};
template <>
struct DenseTiles<float> {
  using type = std::tuple<DenseTile<float, 2, 2, 8, 1, 10, 2, true>, DenseTile<float, 4, 1, 4, 4, 16, 1, true>,
                          DenseTile<float, 4, 2, 8, 1, 10, 2, true>>;
};
template <>
struct DenseTiles<double> {
  using type = std::tuple<DenseTile<double, 4, 1, 4, 1, 16, 1, true>>;
};

// Stages of shared memory: four where two blocks can share a processor even so, or else two; 0 where these do not fit.
inline int stages_of(const DenseLayout& layout, int64_t limit) {
  if (layout.gradient_bytes(4, 1) <= limit / 2) return 4;
  return layout.gradient_bytes(2, 1) <= limit ? 2 : 0;
}

// Calls f.template operator()<Tile>() for the first tile of the table that fits, or else for the plain kernels.
//   limit: bytes of shared memory that a block may have
template <typename scalar_t, size_t row = 0, typename F>
auto with_tile_of(DenseArgs& a, int64_t limit, const F& f) {
  using Tiles = typename DenseTiles<scalar_t>::type;
  if constexpr (row == std::tuple_size_v<Tiles>) {
    return f.template operator()<DensePlain<scalar_t>>();
  } else {
    using Tile = std::tuple_element_t<row, Tiles>;
    constexpr int64_t many = int64_t{1} << 30;
    const int64_t B = a.u.size[0], I = a.u.size[1], J = a.weight.size[1], D = a.weight.size[2], E = a.weight.size[3];
    if (E <= Tile::kE && J <= Tile::kWarps * Tile::kParents && D < 1024 && B < many && I < many) {
      a.layout = DenseLayout::of<Tile>(J, D, E);
      a.stages = stages_of(a.layout, std::min(limit, kSharedBytes));
      a.layout.place(a.stages);
      if (a.stages > 0) return f.template operator()<Tile>();
    }
    return with_tile_of<scalar_t, row + 1>(a, limit, f);
  }
}

// Cuts a call into items.
template <typename Tile>
Plan plan(DenseArgs& a) {
  const int64_t B = a.u.size[0], I = a.u.size[1], J = a.weight.size[1], E = a.weight.size[3];
  const int64_t P = a.positions, types = I / P;
  Plan p{32 * Tile::kWarps, 0, 0, 32 * Tile::kWarps * int64_t(sizeof(typename Tile::T))};
  a.all = B * J * E;
  a.sum_lanes = lanes_for(E);
  a.tiles = ceil_div(B, Tile::kSamples);
  a.chunk = ceil_div(I, std::clamp<int64_t>(kItems / std::max<int64_t>(a.tiles, 1), 1, I));
  a.chunks = ceil_div(I, a.chunk);
  int64_t matrices = 1;  // whose sums a block of the gradients holds
  if constexpr (!is_plain<Tile>) {
    using S = typename Tile::scalar_t;
    const DenseLayout& layout = a.layout;
    const int64_t bytes = int64_t(layout.matrix) * layout.number_bytes;
    const int64_t room = std::min(kSharedBytes / 2, kSumBytes + layout.gradient_bytes(a.stages, 0));
    matrices = std::max<int64_t>(1, (room - layout.gradient_bytes(a.stages, 0)) / bytes);
    matrices = std::min(matrices, ceil_div(I, kItems));
    if (P > 1) matrices = 1;
    p = {32 * layout.warps, layout.route_bytes(a.stages, false), layout.route_bytes(a.stages, true),
         layout.gradient_bytes(a.stages, matrices)};
    a.wide_u = can_load_wide(a.u, 2, kWide<S>);
    a.wide_weight = can_load_wide(a.weight, 3, kWide<S>);
    a.u_shift = power_of(lanes_for(a.wide_u ? layout.D / Tile::kUnit : layout.D));
    a.d_shift = power_of(layout.D);
    a.weight_shift = power_of(lanes_for(a.wide_weight ? layout.E / Tile::kUnit : layout.E));
  }
  a.part = P > 1 ? ceil_div(P, std::clamp<int64_t>(kItems / types, 1, P)) : matrices;
  a.parts = P > 1 ? ceil_div(P, a.part) : 1;
  a.groups = P > 1 ? types * a.parts : ceil_div(I, a.part);
  return p;
}

}  // namespace caps::gpu
