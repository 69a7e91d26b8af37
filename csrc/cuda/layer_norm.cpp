// `layer_norm` on CUDA tensors.

#include "../checks.h"
#include "norm.h"
#include "tensors.h"

namespace a3fta::cuda {
namespace {

LayerNorm arguments(const Call& call, const Tensor& x, const OptionalTensor& weight,
                    const OptionalTensor& bias) {
  check_rows("x", x);
  STD_TORCH_CHECK(x.size(1) > 0, "x: expected at least one channel, got shape ", shape_text(x));
  check_parameter("weight", weight, x.size(1), x);
  check_parameter("bias", bias, x.size(1), x);
  LayerNorm args{};
  args.x = call.matrix("x", x, x.size(0), x.size(1));
  args.weight = call.vector("weight", weight, x.size(1));
  args.bias = call.vector("bias", bias, x.size(1));
  return args;
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor x, OptionalTensor weight, OptionalTensor bias,
                                           double eps) {
  const Call call(x);
  LayerNorm args = arguments(call, x, weight, bias);
  const Tensor y = call.empty(args.x.rows, args.x.cols);
  const Tensor mean = call.wide(args.x.rows);
  const Tensor rstd = call.wide(args.x.rows);
  args.out = whole(y);
  args.mean = static_cast<float*>(mean.data_ptr());
  args.rstd = static_cast<float*>(rstd.data_ptr());
  args.eps = static_cast<float>(eps);
  layer_norm(call.dtype(), args, call.stream());
  return {y, mean, rstd};
}

Tensor backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, OptionalTensor weight) {
  const Call call(x);
  LayerNorm args = arguments(call, x, weight, std::nullopt);
  check_rows("dy", dy);
  args.dy = call.matrix("dy", dy, args.x.rows, args.x.cols);
  check_statistics(mean, rstd, {args.x.rows}, x);
  const Tensor dx = call.empty(args.x.rows, args.x.cols);
  if (args.x.rows == 0) return dx;
  args.out = whole(dx);
  args.mean = static_cast<float*>(mean.data_ptr());
  args.rstd = static_cast<float*>(rstd.data_ptr());
  layer_norm(call.dtype(), args, call.stream());
  return dx;
}

}  // namespace
}  // namespace a3fta::cuda

STABLE_TORCH_LIBRARY_IMPL(a3fta_native, A3FTA_CUDA_KEY, m) {
  m.impl("layer_norm_forward", TORCH_BOX(&a3fta::cuda::forward));
  m.impl("layer_norm_backward", TORCH_BOX(&a3fta::cuda::backward));
}
