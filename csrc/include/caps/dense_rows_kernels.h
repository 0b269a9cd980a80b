// The kernels of dense_capsules sample by sample.
// Only for code compiled with CAPS_ISA.
#pragma once

#include <caps/dense_form.h>
#include <caps/dense_rows.h>

namespace caps::CAPS_ISA {
namespace {

template <typename S, typename F>
CAPS_INLINE void with_rows(const DenseArgs& args, const S& memory_size, const F& body) {
  with_form<Rows>(args, memory_size, body);
}

constexpr auto no_memory = [](const auto&) { return int64_t{0}; };

}  // namespace

void rows_pack(const DenseArgs& args, int64_t begin, int64_t end) {
  with_rows(args, no_memory, [&]<typename T>(const Rows<T>& l, const auto&, T*) {
    dispatch_floating(args.dtype, [&]<typename scalar_t>() {
      if constexpr (std::is_same_v<Acc<scalar_t>, T>) {
        const auto* u = static_cast<const scalar_t*>(args.u.data);
        for (int64_t n = begin * l.I; n < end * l.I; ++n) {
          widen_row(u + n / l.I * args.u.stride[0] + n % l.I * args.u.stride[1], args.u.stride[2], l.D, l.u(0, n));
        }
      }
    });
  });
}

void rows_predict(const DenseArgs& args, int64_t begin, int64_t end) {
  with_rows(args, no_memory, [&](const auto& l, auto& weights, auto*) {
    for (int64_t chunk = begin; chunk < end; ++chunk) predict_chunk(l, weights, chunk, true);
  });
}

// û, and while it is at hand the pass of the last iteration, for which all is known.
void rows_predict_backward(const DenseArgs& args, int64_t begin, int64_t end) {
  with_rows(args, no_memory, [&](const auto& l, auto& weights, auto*) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      if (args.iterations == 1) continue;
      predict_chunk(l, weights, chunk, false);
      for (int64_t b = 0; b < l.B; ++b) route_chunk_backward(l, chunk, b, args.iterations - 1);
    }
  });
}

void rows_route(const DenseArgs& args, int64_t begin, int64_t end) {
  with_rows(
      args, [](const auto& l) { return l.row; },
      [&](const auto& l, auto&, auto* memory) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t chunk = task / l.B, b = task % l.B, i = chunk * args.chunk;
          auto* sums = l.partial(chunk, b);
          for (int64_t n = 0; n < l.size; ++n) sums[n] = 0;
          auto* c = args.keep ? l.kept(0, b, i) : memory;
          route_rows<false>(l.votes(b, i), blocks_of(l, chunk), l.z, l.V(0, b), memory, sums, args.keep, c, memory);
        }
      });
}

void rows_finish_iteration(const DenseArgs& args, int64_t begin, int64_t end) {
  with_rows(args, no_memory, [&](const auto& l, auto&, auto*) {
    for (int64_t b = begin; b < end; ++b) finish_iteration(l, b);
  });
}

void rows_coupling(const DenseArgs& args, int64_t begin, int64_t end) {
  with_rows(args, no_memory, [&]<typename T>(const Rows<T>& l, auto&, T*) {
    dispatch_floating(args.dtype, [&]<typename scalar_t>() {
      if constexpr (std::is_same_v<Acc<scalar_t>, T>) {
        auto* out = static_cast<scalar_t*>(args.coupling.data) + begin * l.I * l.J;
        for (int64_t b = begin; b < end; ++b) {
          for (int64_t i = 0; i < l.I; ++i) {
            for (int64_t j = 0; j < l.J; ++j) {
              store_one(out++, args.iterations == 1 ? l.uniform() : l.kept(0, b, i)[j * l.lanes + i % l.lanes]);
            }
          }
        }
      }
    });
  });
}

void rows_start_backward(const DenseArgs& args, int64_t begin, int64_t end) {
  with_rows(args, no_memory, [&](const auto& l, auto&, auto*) {
    for (int64_t b = begin; b < end; ++b) start_backward(l, b);
  });
}

void rows_route_backward(const DenseArgs& args, int64_t begin, int64_t end) {
  with_rows(args, no_memory, [&](const auto& l, auto&, auto*) {
    for (int64_t task = begin; task < end; ++task) route_chunk_backward(l, task / l.B, task % l.B, args.t);
  });
}

void rows_finish_backward(const DenseArgs& args, int64_t begin, int64_t end) {
  with_rows(args, no_memory, [&](const auto& l, auto&, auto*) {
    for (int64_t b = begin; b < end; ++b) finish_backward(l, b);
  });
}

void rows_gradients(const DenseArgs& args, int64_t begin, int64_t end) {
  const auto aligned = [](int64_t size) { return (size + 15) / 16 * 16; };
  const auto matrices = [&](const auto& l) { return aligned(l.J * l.D * l.E); };
  const auto memory_size = [&](const auto& l) { return matrices(l) + aligned(l.B * l.D) + 4 * l.size; };
  with_rows(args, memory_size, [&](const auto& l, auto& weights, auto* memory) {
    auto* grad_u = memory + matrices(l);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      chunk_gradients(l, weights, chunk, memory, grad_u, grad_u + aligned(l.B * l.D));
    }
    finish_streaming();
  });
}

void rows_bias_gradient(const DenseArgs& args, int64_t, int64_t) {
  with_rows(args, no_memory, [&]<typename T>(const Rows<T>& l, auto&, T*) {
    dispatch_floating(args.dtype, [&]<typename scalar_t>() {
      if constexpr (std::is_same_v<Acc<scalar_t>, T>) {
        for (int64_t n = 0; n < l.J * l.E; ++n) {
          T sum = 0;
          for (int64_t t = args.last_only ? args.iterations - 1 : 0; t < args.iterations; ++t) {
            for (int64_t b = 0; b < l.B; ++b) sum += l.g(t, b)[n / l.E * l.width + n % l.E];
          }
          store_one(static_cast<scalar_t*>(args.grad_bias.data) + n, sum);
        }
      }
    });
  });
}

}  // namespace caps::CAPS_ISA
