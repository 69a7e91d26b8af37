// `quantize` and `dequantize` on CUDA tensors.

#include "quantize.h"

#include "../checks.h"
#include "tensors.h"

namespace a3fta::cuda {
namespace {

Quantized parts(const Tensor& codes, const Tensor& ranges) {
  return {static_cast<int8_t*>(codes.data_ptr()), ranges.data_ptr(), codes.numel()};
}

std::tuple<Tensor, Tensor> quantize_vector(Tensor x) {
  const Call call(x);
  const int64_t n = x.numel();
  check_shape("x", x, {n});
  check_contiguous("x", x);
  const Tensor codes = empty(x, {n}, ScalarType::Char);
  const Tensor ranges = empty(x, {range_count(n), 2}, ScalarType::BFloat16);
  if (n > 0) quantize(call.dtype(), x.data_ptr(), parts(codes, ranges), call.stream());
  return {codes, ranges};
}

Tensor dequantize_vector(Tensor codes, Tensor ranges, ScalarType dtype) {
  check_quantized(codes, ranges);
  Tensor x = empty(codes, {codes.numel()}, dtype);
  const Call call(x);
  if (x.numel() > 0) dequantize(call.dtype(), parts(codes, ranges), x.data_ptr(), call.stream());
  return x;
}

}  // namespace
}  // namespace a3fta::cuda

STABLE_TORCH_LIBRARY_IMPL(a3fta_native, A3FTA_CUDA_KEY, m) {
  m.impl("quantize", TORCH_BOX(&a3fta::cuda::quantize_vector));
  m.impl("dequantize", TORCH_BOX(&a3fta::cuda::dequantize_vector));
}
