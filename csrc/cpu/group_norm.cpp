// group_norm_forward and group_norm_backward on the CPU.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "runtime.h"

namespace a3fta::cpu {
namespace {

GroupNormArgs arguments(
    const Tensor& x, int64_t groups, const OptionalTensor& weight, const OptionalTensor& bias,
    int64_t activation) {
  check_groups(x, groups, activation);
  GroupNormArgs args{x.size(0), x.size(1), x.size(2), groups};
  args.last = channels_last("x", x);
  args.activation = int(activation);
  args.affine = affine(weight, bias, x.size(1), x);
  args.x = x.data_ptr();
  return args;
}

std::tuple<Tensor, Tensor, Tensor> group_norm_forward(
    Tensor x, int64_t groups, OptionalTensor weight, OptionalTensor bias, double eps,
    int64_t activation) {
  GroupNormArgs args = arguments(x, groups, weight, bias, activation);
  Tensor y = torch::stable::empty_like(x);
  Tensor mean = empty(x, {x.size(0), groups}, wide(x));
  Tensor rstd = empty(x, {x.size(0), groups}, wide(x));
  args.eps = eps;
  args.mean = mean.data_ptr();
  args.rstd = rstd.data_ptr();
  args.out = y.data_ptr();
  kernels().group_norm_forward[dtype_of(x)](host(), args);
  return {y, mean, rstd};
}

Tensor group_norm_backward(
    Tensor dy, Tensor x, Tensor mean, Tensor rstd, OptionalTensor weight, OptionalTensor bias,
    int64_t activation) {
  STD_TORCH_CHECK(mean.dim() == 2, "mean: expected shape (B, G), got ", shape_text(mean));
  const int64_t groups = mean.size(1);
  GroupNormArgs args = arguments(x, groups, weight, bias, activation);
  check_shape("dy", dy, {x.size(0), x.size(1), x.size(2)});
  check_like("dy", dy, x);
  STD_TORCH_CHECK(channels_last("dy", dy) == args.last, "dy: expected the strides of x");
  check_statistics(mean, rstd, {x.size(0), groups}, x);
  Tensor dx = torch::stable::empty_like(x);
  args.dy = dy.data_ptr();
  args.mean = mean.data_ptr();
  args.rstd = rstd.data_ptr();
  args.out = dx.data_ptr();
  kernels().group_norm_backward[dtype_of(x)](host(), args);
  return dx;
}

}  // namespace
}  // namespace a3fta::cpu

STABLE_TORCH_LIBRARY_IMPL(a3fta_native, CPU, m) {
  m.impl("group_norm_forward", TORCH_BOX(&a3fta::cpu::group_norm_forward));
  m.impl("group_norm_backward", TORCH_BOX(&a3fta::cpu::group_norm_backward));
}
