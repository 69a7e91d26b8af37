// `group_norm` on CUDA tensors.

#include "../checks.h"
#include "norm.h"
#include "tensors.h"

namespace a3fta::cuda {
namespace {

GroupNorm arguments(const Call& call, const Tensor& x, int64_t groups,
                    const OptionalTensor& weight, const OptionalTensor& bias,
                    int64_t activation) {
  check_groups(x, groups, activation);
  check_parameter("weight", weight, x.size(1), x);
  check_parameter("bias", bias, x.size(1), x);
  GroupNorm args{};
  args.x = x.data_ptr();
  args.weight = call.vector("weight", weight, x.size(1));
  args.bias = call.vector("bias", bias, x.size(1));
  args.samples = x.size(0);
  args.channels = x.size(1);
  args.positions = x.size(2);
  args.groups = groups;
  args.last = channels_last("x", x);
  args.activation = static_cast<int>(activation);
  return args;
}

void start(const Call& call, GroupNorm& args) {
  const Tensor workspace = call.wide(group_norm_workspace(call.dtype(), args));
  args.workspace = static_cast<float*>(workspace.data_ptr());
  group_norm(call.dtype(), args, call.stream());
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor x, int64_t groups, OptionalTensor weight,
                                           OptionalTensor bias, double eps, int64_t activation) {
  const Call call(x);
  GroupNorm args = arguments(call, x, groups, weight, bias, activation);
  const Tensor y = torch::stable::empty_like(x);
  const Tensor mean = call.wide(args.samples, groups);
  const Tensor rstd = call.wide(args.samples, groups);
  args.out = y.data_ptr();
  args.mean = static_cast<float*>(mean.data_ptr());
  args.rstd = static_cast<float*>(rstd.data_ptr());
  args.eps = static_cast<float>(eps);
  start(call, args);
  return {y, mean, rstd};
}

Tensor backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, OptionalTensor weight,
                OptionalTensor bias, int64_t activation) {
  const Call call(x);
  STD_TORCH_CHECK(mean.dim() == 2, "mean: expected shape (B, G), got ", shape_text(mean));
  const int64_t groups = mean.size(1);
  GroupNorm args = arguments(call, x, groups, weight, bias, activation);
  check_shape("dy", dy, {x.size(0), x.size(1), x.size(2)});
  check_like("dy", dy, x);
  STD_TORCH_CHECK(channels_last("dy", dy) == args.last, "dy: expected the strides of x");
  check_statistics(mean, rstd, {x.size(0), groups}, x);
  const Tensor dx = torch::stable::empty_like(x);
  if (x.numel() == 0) return dx;
  args.dy = dy.data_ptr();
  args.out = dx.data_ptr();
  args.mean = static_cast<float*>(mean.data_ptr());
  args.rstd = static_cast<float*>(rstd.data_ptr());
  start(call, args);
  return dx;
}

}  // namespace
}  // namespace a3fta::cuda

STABLE_TORCH_LIBRARY_IMPL(a3fta_native, A3FTA_CUDA_KEY, m) {
  m.impl("group_norm_forward", TORCH_BOX(&a3fta::cuda::forward));
  m.impl("group_norm_backward", TORCH_BOX(&a3fta::cuda::backward));
}
