// What the CPU registrations share: the kernels in use, and tensors as the kernels see them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

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

inline const void* data_or_null(const OptionalTensor& x) {
  return x.has_value() ? x->data_ptr() : nullptr;
}

inline Modulation modulation(const OptionalTensor& gamma, const OptionalTensor& beta) {
  const int64_t samples = gamma ? gamma->size(0) : beta ? beta->size(0) : 1;
  return {data_or_null(gamma), data_or_null(beta), samples};
}

inline Affine affine(
    const OptionalTensor& weight, const OptionalTensor& bias, int64_t channels, const Tensor& x) {
  check_parameter("weight", weight, channels, x);
  check_parameter("bias", bias, channels, x);
  const auto is_wide = [&](const OptionalTensor& p) {
    return p.has_value() && p->scalar_type() == wide(x);
  };
  return {data_or_null(weight), data_or_null(bias), is_wide(weight), is_wide(bias)};
}

}  // namespace a3fta::cpu
