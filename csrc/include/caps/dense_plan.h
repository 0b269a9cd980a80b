// How the host cuts a call of dense_capsules into tasks and chooses what is kept between passes.
#pragma once

#include <caps/dense.h>
#include <caps/op.h>

namespace caps {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

enum class Regime { rows, quads, tiles };

// How the sizes of a call and the width of the vectors cut the work; never the number of threads.
struct Plan {
  int64_t B, I, J, D, E, item, lanes;  // item: bytes of a number
  Regime regime;
  int64_t samples, tiles;  // of a tile, be it of rows or quads, and how many of these there are
  int64_t tile;            // bytes of one, of [J] votes
  int64_t block;           // lower capsules up to a multiple of which û and coefficients are kept
};

inline int64_t quad(const Plan& p) { return std::min<int64_t>(p.lanes, 4); }

inline void set_regime(Plan& p, Regime regime) {
  const int64_t q = quad(p);
  int64_t vote = 0;
  p.regime = regime;
  switch (regime) {
    case Regime::rows: p.samples = 1, p.block = p.lanes, vote = ceil_div(p.E, p.lanes) * p.lanes; break;
    case Regime::quads: p.samples = p.lanes / q, p.block = q, vote = ceil_div(p.E, q) * p.lanes; break;
    case Regime::tiles: p.samples = p.lanes, p.block = 1, vote = p.E * p.lanes; break;
  }
  p.tiles = ceil_div(p.B, p.samples);
  p.tile = p.J * vote * p.item;
}

inline int64_t whole_blocks(const Plan& p) { return ceil_div(p.I, p.block) * p.block; }

// Bytes of û of some tiles, in the regimes that keep it.
inline int64_t votes_bytes(const Plan& p, int64_t tiles) { return tiles * whole_blocks(p) * p.tile; }

// Bytes of coefficients of one iteration: c or gb of every lower capsule and parent.
inline int64_t coefficient_bytes(const Plan& p) { return p.tiles * p.samples * whole_blocks(p) * p.J * p.item; }

// Few samples would leave most lanes of a tile empty, as a small E does those of a row. Shared matrices gain from tiles
// even so: they stay in cache.
inline bool takes_rows(const Plan& p, int64_t positions, int64_t iterations) {
  const int64_t votes = votes_bytes(p, p.B), u = p.B * p.I * p.D * p.item;
  return positions == 1 && 2 * p.B * p.tile <= p.lanes * p.J * p.E * p.item && votes <= kVotesBudget &&
         u <= kPackBudget && votes + u + 2 * (iterations - 1) * coefficient_bytes(p) <= kKeptBudget;
}

// Bytes of û of a group of quad tiles, at most: it is at most 12 MiB of kKeptBudget.
inline int64_t group_budget() { return outer_cache() / 8 * 3; }

// Quad tiles in a group: whole bundles, of few samples or, where more are small, in half of the budget. A number of 8
// bytes counts as two.
inline int64_t group_of(const Plan& p) {
  const int64_t least = ceil_div(kGroupSamples * 4 / p.item, p.samples);
  const int64_t many = group_budget() / 2 / votes_bytes(p, 1), bundle = quad_bundle(vector_bytes());
  return std::min(p.tiles, std::max(least, many / bundle * bundle));
}

// Whether tiles would leave less than a fifth of their lanes empty.
inline bool fills_tiles(const Plan& p) { return 4 * ceil_div(p.B, p.lanes) * p.lanes <= 5 * p.B; }

// Whether tiles of few empty lanes are faster than quads: where the innermost cache has 48 KiB, making û again costs
// less than reading it from the cache that cores share. So it was on an Intel Xeon, with two multiply-adds a cycle and
// a large, slow shared cache; other processors with 48 KiB were not tried.
inline bool prefers_tiles(const Plan& p) {
  return vector_bytes() == 64 && innermost_cache() >= 48 << 10 && fills_tiles(p);
}

// Whether û of two lower capsules of two tiles fits in the innermost cache with V, g and the sums of these.
inline bool fits_pairs(const Plan& p, bool backward) {
  return (kRouted + (backward ? 3 : 2) * kPair) * p.J * p.E * vector_bytes() <= innermost_cache();
}

// Whether a routing pass over tiles takes one lower capsule of one tile at a time, in quads: where its û fits in the
// innermost cache with u spread, V, g and the sums, as that of two capsules of two tiles does not, and where E fills
// the registers.
inline bool takes_spread(const Plan& p, bool backward) {
  const int64_t tile = p.J * p.E * vector_bytes(), arrays = backward ? 4 : 3;
  return vector_bytes() == 64 && innermost_cache() >= 48 << 10 && p.E % quad(p) == 0 && p.E >= 4 * quad(p) &&
         arrays * tile + quad(p) * p.D * vector_bytes() <= innermost_cache() / 8 * 7 && !fits_pairs(p, backward);
}

// û of a group and W, which every group reads, must stay in cache, and a third of a quad's lanes at most be empty. In
// backward, where û is needed once less, making it again in full tiles costs no more than reading it while D is small.
inline bool takes_quads(const Plan& p, int64_t types, bool backward) {
  const int64_t votes = votes_bytes(p, group_of(p)), matrices = types * p.J * p.D * p.E * p.item;
  return !prefers_tiles(p) && votes <= group_budget() && votes + matrices <= outer_cache() / 8 * 5 &&
         2 * ceil_div(p.E, quad(p)) * quad(p) <= 3 * p.E && (!backward || p.D >= 12 || !fills_tiles(p));
}

// Bytes of u in tiles, or in the accumulation type.
inline int64_t packed_bytes(const DenseArgs& a, const Plan& p) {
  return (p.regime == Regime::rows ? p.B : a.tiles * p.lanes) * p.I * p.D * p.item;
}

// Whether the kernels of rows read u where it lies.
inline bool takes_u_as_it_is(const DenseArgs& a, const Plan& p) {
  return p.regime == Regime::rows && a.dtype == (p.item == 8 ? DType::float64 : DType::float32) && a.u.stride[2] == 1 &&
         a.u.stride[1] == p.D;
}

inline bool packs(const DenseArgs& a, const Plan& p) { return packed_bytes(a, p) <= kPackBudget; }

inline Plan plan(DenseArgs& a, bool backward) {
  Plan p{};
  p.B = a.u.size[0];
  p.I = a.u.size[1];
  p.J = a.weight.size[1];
  p.D = a.u.size[2];
  p.E = a.weight.size[3];
  p.item = a.dtype == DType::float64 ? 8 : 4;
  p.lanes = vector_bytes() / p.item;
  set_regime(p, Regime::quads);
  const bool fits_quads = takes_quads(p, a.weight.size[0], backward);
  set_regime(p, Regime::rows);
  const bool fits_rows = takes_rows(p, a.positions, a.iterations);
  // What is kept must be needed again after it was made, unless rows would keep it too. With four samples quads have
  // full lanes, whatever the vectors, but in backward they need the last pass of tiles.
  const bool read_again = a.iterations >= (backward ? 3 : 2);
  if (fits_quads && (fits_rows ? !backward && p.B >= 4 : read_again)) set_regime(p, Regime::quads);
  else if (!fits_rows) set_regime(p, Regime::tiles);
  const bool rows = p.regime == Regime::rows, quads = p.regime == Regime::quads;
  a.tiles = rows ? p.B : ceil_div(p.B, p.lanes);
  a.quad_tiles = quads ? p.tiles : 0;
  a.group = quads ? group_of(p) : 0;
  // û of four tiles should fit in the innermost cache with V and g of each tile. With 16 registers the reads of W that
  // two tiles share count more than that.
  a.routed_tiles = vector_bytes() < 64 || innermost_cache() >= 48 << 10 ? kPair : 1;
  // Where they leave that cache anyway, four capsules of two tiles share more.
  const bool many = vector_bytes() == 64 && a.routed_tiles == kPair && !fits_pairs(p, backward);
  a.routed = many ? kPair * kRouted : kRouted;
  a.spread = p.regime == Regime::tiles && takes_spread(p, backward);
  // At least 16 tasks, few since what other cores wrote is slow to add, or 32 of rows. Where matrices are read again,
  // by other tiles or from copies, what a chunk needs of W, and of u where that is not kept in tiles, in half of a
  // level 2 cache; elsewhere at most 256 votes to a sum, for the sake of its digits. Partial sums within their budget.
  // Chunks of rows are whole vectors of lower capsules, those of quads whole blocks, those of tiles groups of 4.
  const int64_t unit = quads ? p.block : rows ? p.lanes : 4, at_work = quads ? a.group : a.tiles;
  const int64_t shared = ceil_div(at_work, quads ? quad_bundle(vector_bytes()) : rows ? 1 : kPair);
  const int64_t numbers = p.D * (p.J * p.E + (packs(a, p) || quads ? 0 : kPair * p.lanes));
  const bool again = shared > 1 || a.dtype == DType::bfloat16 || a.dtype == DType::float16;
  const int64_t enough = std::max(ceil_div(rows ? 32 : 16, shared),
                                  again ? ceil_div(p.I * numbers * p.item, 640 << 10) : ceil_div(p.I, 256));
  const int64_t most = std::max<int64_t>(1, kPartialBudget / (p.tile * at_work));
  const auto cut = [&](int64_t chunks) { return ceil_div(ceil_div(p.I, chunks), unit) * unit; };
  // Tasks of quads are few, and one less than an even number leaves a thread of two idle for its length.
  a.chunk = std::max({quads ? p.I / enough / unit * unit : cut(enough), cut(most), unit});
  a.chunks = ceil_div(p.I, a.chunk);
  a.types = p.I / a.positions;
  a.parts = a.positions == 1 ? 1 : std::clamp<int64_t>(32 / a.types, 1, ceil_div(a.positions, 4));
  a.part = ceil_div(ceil_div(a.positions, a.parts), 4) * 4;
  a.parts = ceil_div(a.positions, a.part);
  return p;
}

// Whether backward keeps the coefficients of all iterations but the first. û of quads and u in tiles take turns.
inline bool keeps_coefficients(const DenseArgs& a, const Plan& p) {
  const int64_t votes = p.regime == Regime::quads ? votes_bytes(p, a.group) : 0,
                u = packs(a, p) ? packed_bytes(a, p) : 0;
  return p.regime == Regime::rows || 2 * (a.iterations - 1) * coefficient_bytes(p) + std::max(votes, u) <= kKeptBudget;
}

}  // namespace caps
