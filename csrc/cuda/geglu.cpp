// `geglu` on CUDA tensors.

#include "geglu.h"

#include "tensors.h"

namespace a3fta::cuda {
namespace {

Geglu arguments(const Call& call, const Tensor& p, int64_t activation) {
  STD_TORCH_CHECK(p.dim() == 2 && p.size(1) % 2 == 0,
                  "p: expected a matrix of an even number of columns");
  Geglu args{};
  args.p = call.matrix("p", p, p.size(0), p.size(1));
  args.activation = static_cast<int>(activation);
  return args;
}

Tensor forward(Tensor p, int64_t activation) {
  const Call call(p);
  Geglu args = arguments(call, p, activation);
  const Tensor y = call.empty(args.p.rows, args.p.cols / 2);
  args.out = whole(y);
  if (y.numel() > 0) geglu(call.dtype(), args, call.stream());
  return y;
}

Tensor backward(Tensor dy, Tensor p, int64_t activation) {
  const Call call(p);
  Geglu args = arguments(call, p, activation);
  args.dy = call.matrix("dy", dy, args.p.rows, args.p.cols / 2);
  const Tensor dp = call.empty(args.p.rows, args.p.cols);
  args.out = whole(dp);
  if (dp.numel() > 0) geglu(call.dtype(), args, call.stream());
  return dp;
}

}  // namespace
}  // namespace a3fta::cuda

STABLE_TORCH_LIBRARY_IMPL(a3fta_native, A3FTA_CUDA_KEY, m) {
  m.impl("geglu_forward", TORCH_BOX(&a3fta::cuda::forward));
  m.impl("geglu_backward", TORCH_BOX(&a3fta::cuda::backward));
}
