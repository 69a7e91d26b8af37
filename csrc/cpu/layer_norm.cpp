// layer_norm_forward and layer_norm_backward on the CPU.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "runtime.h"

namespace a3fta::cpu {
namespace {

LayerNormArgs arguments(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias) {
  check_rows("x", x);
  STD_TORCH_CHECK(x.size(1) > 0, "x: expected at least one channel, got shape ", shape_text(x));
  LayerNormArgs args{x.size(0), x.size(1)};
  args.affine = affine(weight, bias, x.size(1), x);
  args.x = matrix(x);
  return args;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_forward(
    Tensor x, OptionalTensor weight, OptionalTensor bias, double eps) {
  LayerNormArgs args = arguments(x, weight, bias);
  Tensor y = empty(x, {args.rows, args.channels});
  Tensor mean = empty(x, {args.rows}, wide(x)), rstd = empty(x, {args.rows}, wide(x));
  args.eps = eps;
  args.mean = mean.data_ptr();
  args.rstd = rstd.data_ptr();
  args.out = y.data_ptr();
  kernels().layer_norm_forward[dtype_of(x)](host(), args);
  return {y, mean, rstd};
}

Tensor layer_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, OptionalTensor weight) {
  LayerNormArgs args = arguments(x, weight, std::nullopt);
  check_rows("dy", dy);
  check_shape("dy", dy, {args.rows, args.channels});
  check_like("dy", dy, x);
  check_statistics(mean, rstd, {args.rows}, x);
  Tensor dx = empty(x, {args.rows, args.channels});
  args.dy = matrix(dy);
  args.mean = mean.data_ptr();
  args.rstd = rstd.data_ptr();
  args.out = dx.data_ptr();
  kernels().layer_norm_backward[dtype_of(x)](host(), args);
  return dx;
}

}  // namespace
}  // namespace a3fta::cpu

STABLE_TORCH_LIBRARY_IMPL(a3fta_native, CPU, m) {
  m.impl("layer_norm_forward", TORCH_BOX(&a3fta::cpu::layer_norm_forward));
  m.impl("layer_norm_backward", TORCH_BOX(&a3fta::cpu::layer_norm_backward));
}
