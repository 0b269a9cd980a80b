// What the host and the kernels of dense_capsules pass between them.
#pragma once

#include <caps/kernel.h>

namespace caps {

// Bytes of scratch: 64 MiB in all, and besides them copies of the total inputs s and, twice in tiles and three times in
// quads, of V and g [R, B, J, E].
constexpr int64_t kKeptBudget = int64_t{56}
                                << 20;  // coefficients kept between passes, with u in tiles or rows and û where kept
constexpr int64_t kPackBudget = int64_t{16} << 20;    // u in tiles; beyond it every pass makes those it needs
constexpr int64_t kPartialBudget = int64_t{8} << 20;  // partial sums, but for a single chunk
constexpr int64_t kVotesBudget = int64_t{32} << 20;   // of it, û of rows
constexpr int64_t kGroupSamples = 8;                  // least number of samples in a group of quad tiles
constexpr int kPair = 2;                              // neighbouring tiles that share one read of W
constexpr int kRouted = 4;                            // lower capsules that share one read of V, g and the sums
constexpr int64_t kGroup = 8;                         // tiles whose gû stay in cache together

// Neighbouring quad tiles that share one read of W, a bundle: those of 8 samples in float32.
CAPS_INLINE constexpr int quad_bundle(int64_t vector_bytes) { return vector_bytes == 64 ? 2 : 4; }

// Bytes of grad_u from which it is written past the caches. Its lines are written whole, but the rows of a tile often
// lie a multiple of a page apart, and so in few sets of a cache, which would first have to read them.
constexpr int64_t kStreamedBytes = int64_t{2} << 20;

struct DenseArgs {
  DType dtype;  // of all tensors but s
  View<3> u, v, coupling, grad_v, grad_u;
  View<4> weight, s, grad_weight;
  View<2> bias, grad_bias;  // data is null where there is none, as for coupling
  int64_t positions, iterations;
  bool leaky, last_only;  // last_only: routing_grad="last"
  bool stream, stream_u;  // grad_weight, grad_u are so large that they are better written past the caches

  int64_t tiles;               // of samples; in the regime of rows each sample is one
  int64_t routed_tiles;        // of them, that a routing pass takes at once: 1 or kPair
  int64_t routed;              // tiles times lower capsules that it does
  bool spread;                 // routing passes over tiles take one, and one lower capsule (caps/spread_routing.h)
  int64_t chunk, chunks;       // lower capsules are cut into `chunks` of `chunk`
  int64_t types, parts, part;  // last pass over tiles: tasks of 4 types, or of `part` positions of one type
  int64_t quad_tiles;          // of samples, in the regime of quads; else 0
  int64_t first, group;        // of them, those at work: up to `group` from `first` on
  int64_t t;                   // the iteration, from 0
  bool keep;                   // coefficients (backward), couplings (forward, last iteration)
  // Scratch, numbers of the accumulation type. A tile is [J·E][lanes], or [J][E rounded up] in the regime of rows.
  void* u_tiles;          // [tiles][I·D], or null beyond kPackBudget
  int64_t u_step;         // rows only: from one sample of u_tiles, which may be u itself, to the next
  void* votes;            // rows: [B][I, rounded up to whole vectors] tiles; quads: [group][I, up to whole blocks]
  void* partial;          // [chunks][tiles] tiles
  void* total;            // [tiles] tiles: forward v; backward Σ gV
  void *s_tiles, *V, *g;  // [R][tiles] tiles; forward uses one of s_tiles and V
  void* coefficients;  // backward [R - 1][c, gb][tiles][I·J], forward [tiles][I·J]; I up to whole blocks but in tiles
  void *V_in_tiles, *g_in_tiles;  // quads only: V and g for the last pass, which is that of tiles
  void* basis;         // last pass over tiles: of each tile [J·E][2R - 1] vectors, g^1 and of t = 2 … R g^t and V^{t-1}
  void* weight_parts;  // [types][parts][J·D·E], null where parts is 1
};

}  // namespace caps
