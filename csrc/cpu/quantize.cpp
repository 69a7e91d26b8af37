// quantize and dequantize on the CPU.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "runtime.h"

namespace a3fta::cpu {
namespace {

static_assert(kQuantizeBlock == kCodesPerRange);

std::tuple<Tensor, Tensor> quantize(Tensor x) {
  check_shape("x", x, {x.numel()});
  check_contiguous("x", x);
  const int64_t n = x.numel();
  Tensor codes = empty(x, {n}, ScalarType::Char);
  Tensor ranges = empty(x, {range_count(n), 2}, ScalarType::BFloat16);
  kernels().quantize[dtype_of(x)](
      host(), {n, x.data_ptr(), static_cast<int8_t*>(codes.data_ptr()), ranges.data_ptr()});
  return {codes, ranges};
}

Tensor dequantize(Tensor codes, Tensor ranges, ScalarType dtype) {
  check_quantized(codes, ranges);
  const int64_t n = codes.numel();
  Tensor x = empty(codes, {n}, dtype);
  kernels().dequantize[dtype_of(x)](
      host(), {n, static_cast<const int8_t*>(codes.data_ptr()), ranges.data_ptr(), x.data_ptr()});
  return x;
}

}  // namespace
}  // namespace a3fta::cpu

STABLE_TORCH_LIBRARY_IMPL(a3fta_native, CPU, m) {
  m.impl("quantize", TORCH_BOX(&a3fta::cpu::quantize));
  m.impl("dequantize", TORCH_BOX(&a3fta::cpu::dequantize));
}
