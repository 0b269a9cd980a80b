// What the host part of an op uses: torch's stable ABI, views of tensors, outputs, threads.
#pragma once

#include <caps/kernel.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>

namespace caps {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The index of the instruction set in use, in the order of CAPS_FOR_EACH_ISA.
int current_isa();

// Bytes of a core's innermost data cache, 0 where unknown.
int64_t innermost_cache();

// Bytes of the cache that cores share, as far as they are counted on: at most 32 MiB.
int64_t outer_cache();

// Bytes of its vectors.
inline int64_t vector_bytes() { return int64_t{16} << current_isa(); }

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Double: return DType::float64;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    default: STD_TORCH_CHECK(false, "caps_kernels: expected float32, float64, float16 or bfloat16");
  }
}

// The dtype in which sums are taken.
inline ScalarType accumulation_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <int rank>
View<rank> view_of(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == rank, "caps_kernels: expected ", rank, " dimensions, got ", tensor.dim());
  View<rank> view{const_cast<void*>(tensor.const_data_ptr()), {}, {}};
  for (int n = 0; n < rank; ++n) {
    view.size[n] = tensor.size(n);
    view.stride[n] = tensor.stride(n);
  }
  return view;
}

// A contiguous tensor to be filled, of the dtype of `like` unless one is given.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> size, std::optional<ScalarType> dtype = {}) {
  return torch::stable::new_empty(like, {size.begin(), size.size()}, dtype);
}

// Whether a result is so large that it is better written past the cache, and is aligned to cache lines.
inline bool worth_streaming(const Tensor& result) {
  constexpr int64_t large = int64_t{32} << 20;
  return result.numel() * int64_t(result.element_size()) >= large && uintptr_t(result.const_data_ptr()) % 64 == 0;
}

// Runs a kernel on chunks 0 … chunks - 1, in torch's threads. Which chunks there are must depend on the shapes alone,
// and each must write what no other writes: then results do not depend on the number of threads.
//   work: about how many nanoseconds a chunk takes; threads are not woken for less than 20 µs of work each
template <typename Args>
void launch(const KernelTable<Args>& kernel, const Args& args, int64_t chunks, int64_t work) {
  const int64_t grain = std::max<int64_t>(1, 20000 / std::max<int64_t>(1, work));
  const auto chosen = kernel.of[current_isa()];
  torch::stable::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) { chosen(args, begin, end); });
}

}  // namespace caps
