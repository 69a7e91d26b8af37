// What the CPU registrations share: the kernels in use, and tensors as the kernels see them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../checks.h"
#include "kernels.h"

namespace a3fta::cpu {

const Kernels& kernels();
const Host& host();

inline DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return kFloat64;
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    default:
      STD_TORCH_CHECK(false, "expected a float64, float32, bfloat16 or float16 tensor");
  }
}

inline Matrix matrix(const Tensor& x) { return {x.data_ptr(), row_stride(x)}; }

inline const void* data_or_null(const std::optional<Tensor>& x) {
  return x.has_value() ? x->data_ptr() : nullptr;
}

inline Modulation modulation(
    const std::optional<Tensor>& gamma, const std::optional<Tensor>& beta) {
  const int64_t samples = gamma ? gamma->size(0) : beta ? beta->size(0) : 1;
  return {data_or_null(gamma), data_or_null(beta), samples};
}

}  // namespace a3fta::cpu
