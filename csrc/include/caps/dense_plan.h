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

// Few samples would leave most lanes of a tile empty, as a small E does those of a row. Shared matrices gain from tiles
// even so: they stay in cache.
inline bool takes_rows(int64_t B, int64_t I, int64_t J, int64_t D, int64_t E, int64_t positions, int64_t item) {
  const int64_t lanes = vector_bytes() / item, width = ceil_div(E, lanes) * lanes;
  return positions == 1 && 2 * B * width <= lanes * E && B * I * J * width * item <= kVotesBudget &&
         B * I * D * item <= kPackBudget;
}

// Bytes of u in tiles, or in the accumulation type.
inline int64_t packed_bytes(const DenseArgs& a, const Plan& p) {
  return (p.rows ? p.B : a.tiles * p.lanes) * p.I * p.D * p.item;
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
  p.rows = takes_rows(p.B, p.I, p.J, p.D, p.E, a.positions, p.item);
  p.tile = p.J * p.item * (p.rows ? ceil_div(p.E, p.lanes) * p.lanes : p.E * p.lanes);
  a.tiles = p.rows ? p.B : ceil_div(p.B, p.lanes);
  // At least 32 tasks; what a chunk needs of W, and of u where that is not kept in tiles, in half of a level 2 cache;
  // partial sums within their budget. Chunks of rows are whole vectors of lower capsules, those of tiles groups of 4.
  const int64_t unit = p.rows ? p.lanes : 4;
  const int64_t numbers = p.D * (p.J * p.E + (packs(a, p) ? 0 : kPair * p.lanes));
  const int64_t enough = std::max(ceil_div(32, a.tiles), ceil_div(p.I * numbers * p.item, 512 << 10));
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
  return p.rows ? p.B * ceil_div(p.I, p.lanes) * p.lanes * p.J * p.item : a.tiles * p.lanes * p.I * p.J * p.item;
}

// Whether backward keeps the coefficients of all iterations but the first.
inline bool keeps_coefficients(const DenseArgs& a, const Plan& p) {
  const int64_t coefficients = 2 * (a.iterations - 1) * coefficient_bytes(a, p);
  return p.rows || coefficients + (packs(a, p) ? packed_bytes(a, p) : 0) <= kKeptBudget;
}

}  // namespace caps
