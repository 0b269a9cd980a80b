// predict_votes: û_ije = Σ_d u_id W_tjde with t = i // P, and its gradients.
//
// The rows of type t are the vectors u_bi of all its input capsules i in all samples b: B·P of them, each times the
// same matrix, D x (J·E). Work is divided into chunks of a few types and a range of their rows ("split"). Vectors run
// along (j, e), which is contiguous in the votes; a matrix is used where it lies if E is whole vectors, else from a
// copy [D, J·E] with padding at the end alone.
#include <caps/kernel.h>

namespace caps {

struct VotesArgs {
  DType dtype;
  int64_t positions;    // P
  View<3> u;            // [B, I, D]
  View<4> weight;       // [T, J, D, E]
  View<4> votes;        // [B, I, J, E]: the result of forward, or the gradient given to backward
  View<3> grad_u;       // [B, I, D]
  View<4> grad_weight;  // [T, J, D, E]
  int64_t chunk_types;  // types a chunk
  int64_t splits;       // parts into which the rows of a type are divided …
  int64_t split_rows;   // … and rows a part, a multiple of kRowBlock
  bool streamed;        // forward: whether to write the votes past the cache
  void* partial;        // [T, splits, D, J·E]: sums of the parts, accumulation dtype; none for one part
};

constexpr int64_t kRowBlock = 64;
CAPS_KERNEL(votes_forward, VotesArgs)   // chunks
CAPS_KERNEL(votes_backward, VotesArgs)  // chunks
CAPS_KERNEL(votes_sum, VotesArgs)       // types: the parts' sums

}  // namespace caps

#ifdef CAPS_ISA

#include <caps/across_lanes.h>

namespace caps::CAPS_ISA {
namespace {

// sum[m][w] += Σ_k a[m, k] b[k, w]
//   a: numbers a_m apart for m, a_k apart for k;  b(k): address of a row of numbers;  offset: of `ways` vectors in a
//   row
template <int tile, int ways, typename V, typename T, typename Row>
CAPS_INLINE void multiply_add(V (&sum)[tile][ways], const T* a, int64_t a_m, int64_t a_k, const Row& b,
                              const int64_t* offset, int64_t size) {
  for (int64_t k = 0; k < size; ++k) {
    const T* row = b(k);
    V y[ways];
    CAPS_UNROLL
    for (int w = 0; w < ways; ++w) y[w] = load<V>(row + offset[w]);
    CAPS_UNROLL
    for (int m = 0; m < tile; ++m) {
      const V x = splat<V>(a[m * a_m + k * a_k]);
      CAPS_UNROLL
      for (int w = 0; w < ways; ++w) sum[m][w] += x * y[w];
    }
  }
}

template <typename scalar_t>
class Votes {
 public:
  using T = Acc<scalar_t>;
  using V = Vec<T>;
  static constexpr int L = kLanes<T>;
  static constexpr int kTile = kVectorBytes == 64 ? 8 : 4;
  static constexpr int kDims = L < 8 ? L : 8, kRows = L / kDims;  // grad_u of so many d and rows fills a vector

  // Asks for this thread's memory.
  explicit Votes(const VotesArgs& args)
      : args(args),
        P(args.positions),
        rows(args.u.size[0] * P),
        I(args.u.size[1]),
        types(args.weight.size[0]),
        J(args.weight.size[1]),
        D(args.weight.size[2]),
        E(args.weight.size[3]),
        vectors((J * E + L - 1) / L),
        padded(vectors * L),
        direct(std::is_same_v<scalar_t, T> && E % L == 0 && args.weight.stride[3] == 1),
        consecutive((E == 1 || args.votes.stride[3] == 1) && (J == 1 || args.votes.stride[2] == E)),
        direct_grads(std::is_same_v<scalar_t, T> && padded == J * E && consecutive) {
    const int64_t dims = (D + kDims - 1) / kDims * kDims, matrices = direct ? 0 : args.chunk_types;
    const int64_t numbers = matrices * dims * padded + kRowBlock * dims + kRowBlock * padded + dims * padded;
    T* memory = static_cast<T*>(scratch(Scratch::chunk, numbers * int64_t(sizeof(T)) + vectors * int64_t{8}));
    offsets = reinterpret_cast<int64_t*>(memory + numbers);
    matrix_copies = memory;
    inputs = matrix_copies + matrices * dims * padded;
    grads = inputs + kRowBlock * dims;
    sums = grads + kRowBlock * padded;
    d_stride = direct ? args.weight.stride[2] : padded;
    for (int64_t n = 0; n < vectors; ++n) {
      offsets[n] = direct ? n * L / E * args.weight.stride[1] + n * L % E : n * L;
    }
  }

  void forward(int64_t chunk) {
    const int64_t first = chunk / args.splits * args.chunk_types, begin = chunk % args.splits * args.split_rows;
    const int64_t end_type = first + args.chunk_types < types ? first + args.chunk_types : types;
    const int64_t end = begin + args.split_rows < rows ? begin + args.split_rows : rows;
    for (int64_t t = first; t < end_type && begin < end; ++t) matrix(t, t - first);
    for (int64_t row = begin; row < end; row += kTile) {
      for (int64_t t = first; t < end_type; ++t) {
        const T* weight = direct ? matrix(t, 0) : matrix_copies + (t - first) * padded_dims() * padded;
        if (end - row >= kTile) votes_of<kTile>(weight, t, row);
        else {
          for (int64_t one = row; one < end; ++one) votes_of<1>(weight, t, one);
        }
      }
    }
    finish_streaming();
  }

  void backward(int64_t chunk) {
    const int64_t first = chunk / args.splits * args.chunk_types, split = chunk % args.splits;
    const int64_t end_type = first + args.chunk_types < types ? first + args.chunk_types : types;
    const int64_t begin = split * args.split_rows;
    const int64_t end = begin + args.split_rows < rows ? begin + args.split_rows : rows;
    for (int64_t t = first; t < end_type; ++t) {
      const T* weight = matrix(t, 0);
      for (int64_t n = 0; n < D * padded; ++n) sums[n] = 0;
      for (int64_t row = begin; row < end; row += kRowBlock) {
        const int64_t count = end - row < kRowBlock ? end - row : kRowBlock;
        read_inputs(t, row, count);
        read_grads(t, row, count);
        input_gradients(weight, t, row, count);
        weight_gradients(count);
      }
      if (args.splits == 1) write_weight_gradient(t, sums);
      else {
        T* to = static_cast<T*>(args.partial) + (t * args.splits + split) * D * J * E;
        for (int64_t d = 0; d < D; ++d) {
          for (int64_t n = 0; n < J * E; ++n) to[d * J * E + n] = sums[d * padded + n];
        }
      }
    }
  }

  // grad_weight of a type from its parts' sums.
  void sum(int64_t t) {
    for (int64_t d = 0; d < D; ++d) {
      const T* part = static_cast<const T*>(args.partial) + (t * args.splits * D + d) * J * E;
      T* total = sums + d * padded;
      for (int64_t n = 0; n < J * E; ++n) total[n] = part[n];
      for (int64_t split = 1; split < args.splits; ++split) {
        for (int64_t n = 0; n < J * E; ++n) total[n] += part[split * D * J * E + n];
      }
    }
    write_weight_gradient(t, sums);
  }

 private:
  int64_t padded_dims() const { return (D + kDims - 1) / kDims * kDims; }

  // Matrix t, with d_stride between the dimensions of u and a row's vectors at `offsets`.
  const T* matrix(int64_t t, int64_t slot) {
    const View<4>& weight = args.weight;
    const scalar_t* from = static_cast<const scalar_t*>(weight.data) + t * weight.stride[0];
    if (direct) return reinterpret_cast<const T*>(from);
    T* copy = matrix_copies + slot * padded_dims() * padded;
    for (int64_t d = 0; d < D; ++d) {
      for (int64_t j = 0; j < J; ++j) {
        copy_row(from + j * weight.stride[1] + d * weight.stride[2], weight.stride[3], copy + d * padded + j * E, E);
      }
      for (int64_t n = J * E; n < padded; ++n) copy[d * padded + n] = 0;
    }
    return copy;
  }

  static CAPS_INLINE void copy_row(const scalar_t* from, int64_t stride, T* to, int64_t size) {
    int64_t n = 0;
    if (stride == 1) {
      for (; n + L <= size; n += L) store(to + n, load<V>(from + n));
      if (n < size) store_some(to + n, load_some<V>(from + n, size - n), size - n);
    } else {
      for (; n < size; ++n) to[n] = load_one(from + n * stride);
    }
  }

  // Input capsule and sample of a row.
  int64_t capsule_of(int64_t t, int64_t row) const { return t * P + row % P; }
  int64_t sample_of(int64_t row) const { return row / P; }

  // inputs[row][d]
  void read_inputs(int64_t t, int64_t first, int64_t count) {
    for (int64_t n = 0; n < count; ++n) {
      const scalar_t* from = static_cast<const scalar_t*>(args.u.data) + sample_of(first + n) * args.u.stride[0] +
                             capsule_of(t, first + n) * args.u.stride[1];
      copy_row(from, args.u.stride[2], inputs + n * D, D);
    }
  }

  // The addresses of the rows of grad_votes, or of copies of them.
  void read_grads(int64_t t, int64_t first, int64_t count) {
    const View<4>& votes = args.votes;
    for (int64_t n = 0; n < count; ++n) {
      const scalar_t* from = static_cast<const scalar_t*>(votes.data) + sample_of(first + n) * votes.stride[0] +
                             capsule_of(t, first + n) * votes.stride[1];
      if (direct_grads) {
        grad_rows[n] = reinterpret_cast<const T*>(from);
        continue;
      }
      T* copy = grads + n * padded;
      if (consecutive) copy_row(from, 1, copy, J * E);
      for (int64_t j = 0; j < J && !consecutive; ++j) {
        copy_row(from + j * votes.stride[2], votes.stride[3], copy + j * E, E);
      }
      for (int64_t m = J * E; m < padded; ++m) copy[m] = 0;
      grad_rows[n] = copy;
    }
  }

  // votes of `tile` rows.
  template <int tile>
  void votes_of(const T* weight, int64_t t, int64_t row) {
    read_inputs(t, row, tile);
    scalar_t* out[tile];
    for (int m = 0; m < tile; ++m) {
      out[m] = static_cast<scalar_t*>(args.votes.data) + (sample_of(row + m) * I + capsule_of(t, row + m)) * J * E;
    }
    int64_t n = 0;
    for (; n + 2 <= vectors; n += 2) votes_of_vectors<tile, 2>(weight, out, n);
    if (n < vectors) votes_of_vectors<tile, 1>(weight, out, n);
  }

  template <int tile, int ways>
  CAPS_INLINE void votes_of_vectors(const T* weight, scalar_t* const (&out)[tile], int64_t n) {
    V sum[tile][ways] = {};
    const int64_t stride = d_stride;
    const int64_t ahead = direct ? args.weight.stride[0] : 0;
    const auto row_of = [&](int64_t d) __attribute__((always_inline)) {
      if (tile == 1) {  // the matrix is used once: fetch the next
        CAPS_UNROLL
        for (int w = 0; w < ways; ++w) __builtin_prefetch(weight + d * stride + offsets[n + w] + ahead);
      }
      return weight + d * stride;
    };
    multiply_add(sum, inputs, D, 1, row_of, offsets + n, D);
    CAPS_UNROLL
    for (int m = 0; m < tile; ++m) {
      CAPS_UNROLL
      for (int w = 0; w < ways; ++w) write(out[m], n + w, sum[m][w]);
    }
  }

  CAPS_INLINE void write(scalar_t* row, int64_t n, V value) const {
    const int64_t at = n * L, count = J * E - at;
    if constexpr (std::is_same_v<scalar_t, T> && kCanStream<V>) {
      if (args.streamed) return stream(row + at, value);
    }
    if (count >= L) store(row + at, value);
    else store_some(row + at, value, count);
  }

  // grad_u: Σ_je W_jde g_je of each row, lanes along (j, e) until the very end.
  void input_gradients(const T* weight, int64_t t, int64_t first, int64_t count) {
    // The same sample's row of the next type, or a row that comes soon.
    const int64_t ahead = direct_grads ? (P == 1 ? 1 : 16) * args.votes.stride[1] : 0;
    for (int64_t n = 0; n < count; n += kRows) {
      for (int64_t d = 0; d < D; d += kDims) {
        const int64_t dims = D - d < kDims ? D - d : kDims;
        V sum[kRows][kDims] = {};
        const T* w[kDims];
        const T* g[kRows];
        for (int m = 0; m < kDims; ++m) w[m] = weight + (d + (m < dims ? m : 0)) * d_stride;
        for (int r = 0; r < kRows; ++r) g[r] = grad_rows[n + r < count ? n + r : n];
        for (int64_t v = 0; v < vectors; ++v) {
          V y[kRows];
          CAPS_UNROLL
          for (int r = 0; r < kRows; ++r) {
            y[r] = load<V>(g[r] + v * L);
            if (d == 0) __builtin_prefetch(g[r] + v * L + ahead);
          }
          CAPS_UNROLL
          for (int m = 0; m < kDims; ++m) {
            const V x = load<V>(w[m] + offsets[v]);
            CAPS_UNROLL
            for (int r = 0; r < kRows; ++r) sum[r][m] += x * y[r];
          }
        }
        const V lanes =
            sums_of_rows<V>([&](int64_t k) __attribute__((always_inline)) { return sum[k / kDims][k % kDims]; });
        T result[L];
        store(result, lanes);
        for (int r = 0; r < kRows && n + r < count; ++r) {
          const int64_t row = first + n + r;
          scalar_t* to = static_cast<scalar_t*>(args.grad_u.data) + (sample_of(row) * I + capsule_of(t, row)) * D + d;
          for (int m = 0; m < dims; ++m) store_one(to + m, result[r * kDims + m]);
        }
      }
    }
  }

  // sums[d] += Σ_rows u_d g
  void weight_gradients(int64_t count) {
    int64_t d = 0;
    for (; d + kTile <= D; d += kTile) weight_gradients_of<kTile>(d, count);
    for (; d < D; ++d) weight_gradients_of<1>(d, count);
  }

  template <int tile>
  void weight_gradients_of(int64_t d, int64_t count) {
    int64_t n = 0;
    for (; n + 2 <= vectors; n += 2) weight_gradients_of_vectors<tile, 2>(d, count, n);
    if (n < vectors) weight_gradients_of_vectors<tile, 1>(d, count, n);
  }

  template <int tile, int ways>
  CAPS_INLINE void weight_gradients_of_vectors(int64_t d, int64_t count, int64_t n) {
    V sum[tile][ways] = {};
    const int64_t offset[2] = {n * L, n * L + L};
    const auto row_of = [&](int64_t k) __attribute__((always_inline)) { return grad_rows[k]; };
    multiply_add(sum, inputs + d, 1, D, row_of, offset, count);
    CAPS_UNROLL
    for (int m = 0; m < tile; ++m) {
      CAPS_UNROLL
      for (int w = 0; w < ways; ++w) {
        T* to = sums + (d + m) * padded + (n + w) * L;
        store(to, load<V>(to) + sum[m][w]);
      }
    }
  }

  void write_weight_gradient(int64_t t, const T* from) const {
    scalar_t* to = static_cast<scalar_t*>(args.grad_weight.data) + t * J * D * E;
    for (int64_t j = 0; j < J; ++j) {
      for (int64_t d = 0; d < D; ++d, to += E) {
        const T* row = from + d * padded + j * E;
        int64_t e = 0;
        for (; e + L <= E; e += L) store(to + e, load<V>(row + e));
        if (e < E) store_some(to + e, load_some<V>(row + e, E - e), E - e);
      }
    }
  }

  const VotesArgs& args;
  const int64_t P, rows, I, types, J, D, E, vectors, padded;
  const bool direct;        // matrices are used where they lie
  const bool consecutive;   // rows of votes are J·E consecutive numbers …
  const bool direct_grads;  // … and used where they lie
  int64_t d_stride;
  int64_t* offsets;
  T *matrix_copies, *inputs, *grads, *sums;
  const T* grad_rows[kRowBlock];
};

template <typename F>
void each(const VotesArgs& args, int64_t begin, int64_t end, const F& work) {
  dispatch_floating(args.dtype, [&]<typename scalar_t>() {
    Votes<scalar_t> votes(args);
    for (int64_t n = begin; n < end; ++n) work(votes, n);
  });
}

}  // namespace

void votes_forward(const VotesArgs& args, int64_t begin, int64_t end) {
  each(args, begin, end, [](auto& votes, int64_t chunk) { votes.forward(chunk); });
}
void votes_backward(const VotesArgs& args, int64_t begin, int64_t end) {
  each(args, begin, end, [](auto& votes, int64_t chunk) { votes.backward(chunk); });
}
void votes_sum(const VotesArgs& args, int64_t begin, int64_t end) {
  each(args, begin, end, [](auto& votes, int64_t t) { votes.sum(t); });
}

}  // namespace caps::CAPS_ISA

#else

#include <caps/op.h>

namespace caps {
namespace {

constexpr int64_t kChunksWanted = 64;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

VotesArgs votes_args(const Tensor& u, const Tensor& weight, int64_t positions) {
  VotesArgs args{};
  args.dtype = dtype_of(u);
  args.positions = positions;
  args.u = view_of<3>(u);
  args.weight = view_of<4>(weight);
  const int64_t rows = args.u.size[0] * positions, types = args.weight.size[0];
  // Without shared positions, the rows of a few types are neighbours in the votes.
  args.chunk_types = positions == 1 ? 4 : 1;
  const int64_t type_chunks = divide_up(types, args.chunk_types);
  const int64_t blocks = std::max<int64_t>(1, divide_up(rows, kRowBlock));
  const int64_t parts = std::min(blocks, divide_up(kChunksWanted, std::max<int64_t>(1, type_chunks)));
  args.split_rows = divide_up(blocks, parts) * kRowBlock;
  args.splits = std::max<int64_t>(1, divide_up(rows, args.split_rows));
  return args;
}

int64_t chunks_of(const VotesArgs& args) { return divide_up(args.weight.size[0], args.chunk_types) * args.splits; }

// About how long a chunk takes, in nanoseconds.
int64_t work_of_chunk(const VotesArgs& args) {
  const auto [types, J, D, E] = args.weight.size;
  const int64_t rows = std::min(args.split_rows, args.u.size[0] * args.positions);
  return args.chunk_types * (rows + 4) * J * (D + 2) * (E + 15) / 16 / 3;
}

Tensor predict_votes_fwd(Tensor u, Tensor weight, int64_t positions) {
  VotesArgs args = votes_args(u, weight, positions);
  Tensor votes = empty(u, {u.size(0), u.size(1), weight.size(1), weight.size(3)});
  args.votes = view_of<4>(votes);
  args.streamed = worth_streaming(votes) && weight.size(1) * weight.size(3) * int64_t(votes.element_size()) % 64 == 0;
  launch(votes_forward, args, u.size(0) == 0 ? 0 : chunks_of(args), work_of_chunk(args));
  return votes;
}

std::tuple<Tensor, Tensor> predict_votes_bwd(Tensor grad_votes, Tensor u, Tensor weight, int64_t positions) {
  VotesArgs args = votes_args(u, weight, positions);
  Tensor grad_u = torch::stable::new_empty(u, u.sizes()),
         grad_weight = torch::stable::new_empty(weight, weight.sizes());
  args.votes = view_of<4>(grad_votes);
  args.grad_u = view_of<3>(grad_u);
  args.grad_weight = view_of<4>(grad_weight);
  const int64_t size = weight.numel() * (args.dtype == DType::float64 ? 8 : 4);
  if (args.splits > 1) args.partial = scratch(Scratch::call, size * args.splits);
  launch(votes_backward, args, chunks_of(args), 2 * work_of_chunk(args));
  if (args.splits > 1) launch(votes_sum, args, args.weight.size[0], size / args.weight.size[0] * args.splits / 8);
  return {grad_u, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(caps_kernels_cpp, m) {
  m.def("predict_votes_fwd(Tensor u, Tensor weight, int positions) -> Tensor");
  m.def("predict_votes_bwd(Tensor grad_votes, Tensor u, Tensor weight, int positions) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(caps_kernels_cpp, CPU, m) {
  m.impl("predict_votes_fwd", TORCH_BOX(&predict_votes_fwd));
  m.impl("predict_votes_bwd", TORCH_BOX(&predict_votes_bwd));
}

}  // namespace caps

#endif
