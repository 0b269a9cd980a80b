// Views of tensors that the host part of csrc/cuda works out.
#pragma once

#include <caps/op.h>

namespace caps::gpu {

// Whether packs of n numbers along `dim` can be loaded whole: they are consecutive and aligned, wherever they start.
template <int rank>
bool can_load_wide(const View<rank>& view, int dim, int64_t n) {
  if (uintptr_t(view.data) % 16 != 0 || view.size[dim] % n != 0 || view.stride[dim] != 1) return false;
  for (int other = 0; other < rank; ++other) {
    if (other != dim && view.size[other] > 1 && view.stride[other] % n != 0) return false;
  }
  return true;
}

// The stride of dimensions first … last - 1 seen as one, or nothing where they cannot be.
inline std::optional<int64_t> merged_stride(const Tensor& tensor, int64_t first, int64_t last) {
  int64_t size = 1, stride = 1;
  for (int64_t n = last - 1; n >= first; --n) {
    if (tensor.size(n) == 1) continue;
    if (size == 1) stride = tensor.stride(n);
    else if (tensor.stride(n) != size * stride) return {};
    size *= tensor.size(n);
  }
  return stride;
}

// The tensor as [outer, size of dim, inner]; one that cannot be seen so is copied.
inline View<3> view_around(Tensor& tensor, int64_t dim) {
  auto outer = merged_stride(tensor, 0, dim), inner = merged_stride(tensor, dim + 1, tensor.dim());
  if (!outer || !inner) {
    tensor = torch::stable::contiguous(tensor);
    outer = merged_stride(tensor, 0, dim);
    inner = merged_stride(tensor, dim + 1, tensor.dim());
  }
  View<3> view{
      const_cast<void*>(tensor.const_data_ptr()), {1, tensor.size(dim), 1}, {*outer, tensor.stride(dim), *inner}};
  for (int64_t n = 0; n < dim; ++n) view.size[0] *= tensor.size(n);
  for (int64_t n = dim + 1; n < tensor.dim(); ++n) view.size[2] *= tensor.size(n);
  return view;
}

}  // namespace caps::gpu
