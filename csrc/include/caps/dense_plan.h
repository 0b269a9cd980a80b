// How the host cuts a call of dense_capsules into tasks and chooses what is kept between passes.
#pragma once

#include <caps/dense.h>
#include <caps/op.h>

namespace caps {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How the sizes of a call and the width of the vectors cut the work; never the number of threads.
struct Plan {
  int64_t B, I, J, D, E, item, lanes, tile;  // item: bytes of a number; tile: bytes of a tile
  bool rows;
};

// Lower capsules, rounded up to whole vectors.
inline int64_t whole_blocks(const Plan& p) { return ceil_div(p.I, p.lanes) * p.lanes; }

// Bytes of û in the regime of rows; p.tile is that of rows.
inline int64_t votes_bytes(const Plan& p) { return p.B * whole_blocks(p) * p.tile; }

// Few samples would leave most lanes of a tile empty, as a small E does those of a row. Shared matrices gain from tiles
// even so: they stay in cache.
inline bool takes_rows(const Plan& p, int64_t positions, int64_t iterations) {
  const int64_t votes = votes_bytes(p), u = p.B * p.I * p.D * p.item;
  const int64_t coefficients = 2 * (iterations - 1) * p.B * whole_blocks(p) * p.J * p.item;
  return positions == 1 && 2 * p.B * p.tile <= p.lanes * p.J * p.E * p.item && votes <= kVotesBudget &&
         u <= kPackBudget && votes + u + coefficients <= kKeptBudget;
}

// Bytes of u in tiles, or in the accumulation type.
inline int64_t packed_bytes(const DenseArgs& a, const Plan& p) {
  return (p.rows ? p.B : a.tiles * p.lanes) * p.I * p.D * p.item;
}

// Whether the kernels of rows read u where it lies.
inline bool takes_u_as_it_is(const DenseArgs& a, const Plan& p) {
  return p.rows && a.dtype == (p.item == 8 ? DType::float64 : DType::float32) && a.u.stride[2] == 1 &&
         a.u.stride[1] == p.D;
}

inline bool packs(const DenseArgs& a, const Plan& p) { return packed_bytes(a, p) <= kPackBudget; }

inline Plan plan(DenseArgs& a) {
  Plan p{};
  p.B = a.u.size[0];
  p.I = a.u.size[1];
  p.J = a.weight.size[1];
  p.D = a.u.size[2];
  p.E = a.weight.size[3];
  p.item = a.dtype == DType::float64 ? 8 : 4;
  p.lanes = vector_bytes() / p.item;
  p.tile = p.J * p.item * ceil_div(p.E, p.lanes) * p.lanes;
  p.rows = takes_rows(p, a.positions, a.iterations);
  if (!p.rows) p.tile = p.J * p.item * p.E * p.lanes;
  a.tiles = p.rows ? p.B : ceil_div(p.B, p.lanes);
  // û of four tiles should fit in the innermost cache with V and g of each tile. With 16 registers the reads of W that
  // two tiles share count more than that.
  a.routed_tiles = vector_bytes() < 64 || innermost_cache() >= 48 << 10 ? kPair : 1;
  // At least 32 tasks; what a chunk needs of W, and of u where that is not kept in tiles, in half of a level 2 cache;
  // partial sums within their budget. Chunks of rows are whole vectors of lower capsules, those of tiles groups of 4.
  const int64_t unit = p.rows ? p.lanes : 4;
  const int64_t numbers = p.D * (p.J * p.E + (packs(a, p) ? 0 : kPair * p.lanes));
  const int64_t enough = std::max(ceil_div(32, a.tiles), ceil_div(p.I * numbers * p.item, 640 << 10));
  const int64_t most = std::max<int64_t>(1, kPartialBudget / (p.tile * a.tiles));
  a.chunk = ceil_div(ceil_div(p.I, std::min({enough, most, ceil_div(p.I, unit)})), unit) * unit;
  a.chunks = ceil_div(p.I, a.chunk);
  a.types = p.I / a.positions;
  a.parts = a.positions == 1 ? 1 : std::clamp<int64_t>(32 / a.types, 1, ceil_div(a.positions, 4));
  a.part = ceil_div(ceil_div(a.positions, a.parts), 4) * 4;
  a.parts = ceil_div(a.positions, a.part);
  return p;
}

// Bytes of coefficients of one iteration: c or gb of every lower capsule and parent.
inline int64_t coefficient_bytes(const DenseArgs& a, const Plan& p) {
  return p.rows ? p.B * whole_blocks(p) * p.J * p.item : a.tiles * p.lanes * p.I * p.J * p.item;
}

// Whether backward keeps the coefficients of all iterations but the first.
inline bool keeps_coefficients(const DenseArgs& a, const Plan& p) {
  const int64_t coefficients = 2 * (a.iterations - 1) * coefficient_bytes(a, p);
  return p.rows || coefficients + (packs(a, p) ? packed_bytes(a, p) : 0) <= kKeptBudget;
}

}  // namespace caps
