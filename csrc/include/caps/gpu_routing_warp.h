// The passes of dynamic_routing where the votes of a lower capsule fit the registers of a few lanes ("registers").
//
// A warp takes a chunk of a sample alone, so that no barrier of the block stands between a load and its use. A team of
// `lanes` takes a lower capsule, whose J · E votes lie side by side: lane l holds packs l, l + lanes, … of n votes. A
// higher capsule has `width` packs, a power of 2, so the sums of a vote are over `width` lanes and the softmax over
// packs and then over the lanes that differ in j. Every vote is loaded once in a pass, and distances between packs are
// known to the compiler: addresses take no registers. Sums of a chunk stay in registers until its end.
#pragma once

#include <caps/gpu_routing.h>

namespace caps::gpu {

// n numbers as they lie in memory: less to hold than in the type of sums.
template <typename scalar_t, int n>
struct Raw {
  using W = std::conditional_t<n == 1, scalar_t, Word<n* int(sizeof(scalar_t))>>;
  static constexpr int kCount = n * int(sizeof(scalar_t)) / int(sizeof(W));
  W words[kCount];

  CAPS_DEVICE void load(const scalar_t* from) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) words[k] = reinterpret_cast<const W*>(from)[k];
  }
  CAPS_DEVICE Pack<Acc<scalar_t>, n> wide() const {
    scalar_t numbers[n];
    __builtin_memcpy(numbers, words, sizeof(numbers));
    Pack<Acc<scalar_t>, n> result;
#pragma unroll
    for (int k = 0; k < n; ++k) result[k] = widen(numbers[k]);
    return result;
  }
};

template <typename scalar_t, int n, int lanes, int packs>
struct RoutingWarp : Routing<scalar_t, n> {
  using Base = Routing<scalar_t, n>;
  using T = Acc<scalar_t>;
  using Base::args, Base::B, Base::I, Base::J, Base::size, Base::lane, Base::warp, Base::uniform;
  using Numbers = Pack<T, n>[packs];
  using Votes = Raw<scalar_t, n>[packs];
  static constexpr int kTeams = 32 / lanes, kStep = lanes * n;

  const int team, at;  // this lane's, and the first of its numbers in [J, E]
  const int held;      // packs that it has; it is in the softmax with one of each

  CAPS_DEVICE RoutingWarp(const RoutingArgs& args, T* memory)
      : Base(args, memory),
        team(lane / lanes),
        at(lane % lanes * n),
        held((int(args.columns) - lane % lanes + lanes - 1) / lanes) {}

  // f(b, chunk, first capsule, how many) for the chunks of this warp. Neighbouring chunks go to different processors,
  // for there may be fewer chunks than warps. B · I is less than 2³¹ here.
  template <typename F>
  CAPS_DEVICE void each_chunk(const F& f) const {
    const unsigned chunks = unsigned(args.chunks), length = unsigned(args.chunk), step = gridDim.x * kRoutingWarps;
    for (unsigned k = unsigned(warp) * gridDim.x + blockIdx.x; k < unsigned(B) * chunks; k += step) {
      const unsigned chunk = k % chunks, first = chunk * length;
      f(int(k / chunks), int(chunk), int(first), int(first + length < I ? length : unsigned(I) - first));
    }
  }

  // f(l, whether there is such a capsule, its votes) for capsules first + l of a chunk, one a team. Lanes without a
  // capsule have votes of 0. Where the votes are not needed, nothing is loaded.
  template <typename F>
  CAPS_DEVICE void each_child(int b, int first, int count, bool needed, const F& f) const {
    const scalar_t* from = this->vote(b, first + team, 0, 0) + at;
    for (int start = 0; start < count; start += kTeams) {
      const bool there = start + team < count;
      Votes votes;
#pragma unroll
      for (int k = 0; k < packs; ++k) {
        votes[k] = {};
        if (needed && there && k < held) votes[k].load(from + k * kStep);
      }
      from += kTeams * args.votes.stride[1];
      f(start + team, there, votes);
    }
  }

  // This lane's packs of x [J, E], given from `at` on; 0 where it holds none.
  CAPS_DEVICE Pack<T, n> pack_of(const T* x, int k) const { return k < held ? load<n>(x + k * kStep) : Pack<T, n>{}; }

  // out[k] = û_ij · x_j; every lane of a vote has it.
  template <typename F>
  CAPS_DEVICE void dots(const Votes& votes, const F& x, T (&out)[packs]) const {
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      const Pack<T, n> vote = votes[k].wide(), other = x(k);
      out[k] = 0;
#pragma unroll
      for (int m = 0; m < n; ++m) out[k] += vote[m] * other[m];
    }
    for (int step = args.width / 2; step > 0; step /= 2) {
#pragma unroll
      for (int k = 0; k < packs; ++k) out[k] += __shfl_xor_sync(0xffffffffu, out[k], step);
    }
  }

  // The sum over the lanes of a team that differ in j.
  CAPS_DEVICE T sum_over_parents(T x) const {
    for (int step = args.width; step < lanes; step *= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
  }

  // x becomes its softmax over j, and 0 beyond J.
  CAPS_DEVICE void softmax(T (&x)[packs]) const {
    T most = args.leaky ? T(0) : T(-INFINITY), sum = 0;
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      x[k] = k < held ? x[k] : T(-INFINITY);
      most = larger(x[k], most);
    }
    for (int step = args.width; step < lanes; step *= 2) {
      most = larger(most, __shfl_xor_sync(0xffffffffu, most, step));
    }
#pragma unroll
    for (int k = 0; k < packs; ++k) sum += x[k] = exp(x[k] - most);
    const T inverse = 1 / (sum_over_parents(sum) + (args.leaky ? exp(-most) : T(0)));
#pragma unroll
    for (int k = 0; k < packs; ++k) x[k] *= inverse;
  }

  // gc becomes gb = c (gc - Σ_j c gc).
  CAPS_DEVICE void softmax_gradient(const T (&c)[packs], T (&gc)[packs]) const {
    T mean = 0;
#pragma unroll
    for (int k = 0; k < packs; ++k) mean += c[k] * gc[k];
    mean = sum_over_parents(mean);
#pragma unroll
    for (int k = 0; k < packs; ++k) gc[k] = c[k] * (gc[k] - mean);
  }

  CAPS_DEVICE void add(const T (&factor)[packs], const Votes& votes, Numbers& sums) const {
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      const Pack<T, n> vote = votes[k].wide();
#pragma unroll
      for (int m = 0; m < n; ++m) sums[k][m] += factor[k] * vote[m];
    }
  }

  // The chunk's sum from those of the teams, in pairs.
  CAPS_DEVICE void put_chunk(int64_t b, int64_t chunk, Numbers& sums) const {
    for (int step = lanes; step < 32; step *= 2) {
#pragma unroll
      for (int k = 0; k < packs; ++k) {
#pragma unroll
        for (int m = 0; m < n; ++m) sums[k][m] += __shfl_xor_sync(0xffffffffu, sums[k][m], step);
      }
    }
    T* to = static_cast<T*>(args.partial) + (b * args.chunks + chunk) * size + at;
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      if (team == 0 && k < held) store<T, n>(to + k * kStep, sums[k]);
    }
  }

  CAPS_DEVICE void put_coupling(int b, int i, const T (&c)[packs]) const {
    const int pack = lane % lanes;
    scalar_t* to = static_cast<scalar_t*>(args.coupling) + (b * I + i) * J + pack / args.width;
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      if (pack % args.width == 0 && k < held) to[k * (lanes / args.width)] = narrow<scalar_t>(c[k]);
    }
  }

  // s^t of chunks, and the coupling coefficients in the last iteration.
  CAPS_DEVICE void forward_pass(int64_t t) const {
    const bool with_coupling = args.with_coupling && t == args.iterations - 1;
    each_chunk([&](int b, int chunk, int first, int count) {
      Numbers total, sums{};
#pragma unroll
      for (int k = 0; k < packs; ++k) {
        total[k] = t > 0 ? pack_of(static_cast<const T*>(args.total) + b * size + at, k) : Pack<T, n>{};
      }
      each_child(b, first, count, true, [&](int l, bool there, const Votes& votes) {
        T c[packs];
        if (t > 0) {
          dots(votes, [&](int k) { return total[k]; }, c);
          softmax(c);
        } else {
#pragma unroll
          for (int k = 0; k < packs; ++k) c[k] = uniform;
        }
        if (with_coupling && there) put_coupling(b, first + l, c);
        add(c, votes, sums);
      });
      put_chunk(b, chunk, sums);
    });
  }

  // gV^{t-1} of chunks.
  CAPS_DEVICE void backward_pass(int64_t t) const {
    each_chunk([&](int b, int chunk, int first, int count) {
      const T *total = this->totals_of(t - 1, b) + at, *g = this->gradients_of(t, b) + at;
      Numbers sums{};
      each_child(b, first, count, true, [&](int, bool, const Votes& votes) {
        T c[packs], gb[packs];
        dots(votes, [&](int k) { return pack_of(total, k); }, c);
        dots(votes, [&](int k) { return pack_of(g, k); }, gb);
        softmax(c);
        softmax_gradient(c, gb);
        add(gb, votes, sums);
      });
      put_chunk(b, chunk, sums);
    });
  }

  // grad_votes: Σ_t c^t g^t + gb^t V^{t-1}, from votes that are read once.
  CAPS_DEVICE void backward_votes() const {
    const int R = int(args.iterations), begin = args.last && R > 1 ? R - 1 : 1;
    const bool with_first = !args.last || R == 1;
    each_chunk([&](int b, int, int first, int count) {
      scalar_t* out = static_cast<scalar_t*>(args.grad_votes) + (b * I + first) * size + at;
      each_child(b, first, count, R > 1, [&](int l, bool there, const Votes& votes) {
        Numbers sums{};
        if (with_first) add_first(b, sums);
        const T *total = this->totals_of(begin - 1, b) + at, *g = this->gradients_of(begin, b) + at;
        for (int t = begin; t < R; ++t) {
          add_iteration(total, g, votes, sums);
          total += B * size;
          g += B * size;
        }
#pragma unroll
        for (int k = 0; k < packs; ++k) {
          if (there && k < held) store<scalar_t, n>(out + l * size + k * kStep, sums[k]);
        }
      });
    });
  }

  CAPS_DEVICE void add_first(int64_t b, Numbers& sums) const {
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      const Pack<T, n> g = pack_of(this->gradients_of(0, b) + at, k);
#pragma unroll
      for (int m = 0; m < n; ++m) sums[k][m] = uniform * g[m];
    }
  }

  CAPS_DEVICE void add_iteration(const T* total, const T* g, const Votes& votes, Numbers& sums) const {
    T c[packs], gb[packs];
    dots(votes, [&](int k) { return pack_of(total, k); }, c);
    softmax(c);
    if (!args.last) {
      dots(votes, [&](int k) { return pack_of(g, k); }, gb);
      softmax_gradient(c, gb);
    }
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      const Pack<T, n> of_g = pack_of(g, k), of_total = args.last ? Pack<T, n>{} : pack_of(total, k);
      const T factor = args.last ? T(0) : gb[k];
#pragma unroll
      for (int m = 0; m < n; ++m) sums[k][m] += c[k] * of_g[m] + factor * of_total[m];
    }
  }
};

}  // namespace caps::gpu
