// `adapter_bank` on CUDA tensors.

#include "adapter_bank.h"

#include "../math.h"
#include "tensors.h"

namespace a3fta::cuda {
namespace {

Tensor forward(Tensor h, Tensor residual, Tensor w_down, Tensor w_up, OptionalTensor b_down,
               OptionalTensor b_up, Tensor scale, Tensor index, int64_t activation) {
  const Call call(h);
  STD_TORCH_CHECK(h.dim() == 2 && w_down.dim() == 3 && index.dim() == 1,
                  "expected h (M, C), w_down (K, R, C) and index (B,)");
  const int64_t m = h.size(0), channels = h.size(1);
  AdapterBank args{};
  args.h = call.matrix("h", h, m, channels);
  args.residual = call.matrix("residual", residual, m, channels);
  args.samples = index.size(0);
  args.adapters = w_down.size(0);
  args.rank = w_down.size(1);
  STD_TORCH_CHECK(args.samples == 0 ? m == 0 : m % args.samples == 0, "index: its ", args.samples,
                  " samples do not divide ", m, " rows");
  STD_TORCH_CHECK(adapter_bank_fits(call.dtype(), args.rank), "w_down: its rank of ", args.rank,
                  " is too large for one turn");
  STD_TORCH_CHECK(activation >= 0 && activation < kActivations, "activation: expected 0 to ",
                  kActivations - 1, ", got ", activation);
  const auto of_bank = [&](const char* name, const Tensor& t,
                           std::initializer_list<int64_t> shape) {
    call.same(name, t);
    return call.dense(name, t, shape);
  };
  args.w_down = of_bank("w_down", w_down, {args.adapters, args.rank, channels});
  args.w_up = of_bank("w_up", w_up, {args.adapters, channels, args.rank});
  if (b_down.has_value()) args.b_down = of_bank("b_down", *b_down, {args.adapters, args.rank});
  if (b_up.has_value()) args.b_up = of_bank("b_up", *b_up, {args.adapters, channels});
  STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Float, "scale: expected float32");
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Int, "index: expected int32");
  args.scale = static_cast<const float*>(call.dense("scale", scale, {args.adapters}));
  args.index = static_cast<const int32_t*>(call.dense("index", index, {args.samples}));
  args.activation = static_cast<int>(activation);
  const Tensor y = call.empty(m, channels);
  args.y = whole(y);
  if (y.numel() > 0) adapter_bank(call.dtype(), args, call.stream());
  return y;
}

}  // namespace
}  // namespace a3fta::cuda

STABLE_TORCH_LIBRARY_IMPL(a3fta_native, A3FTA_CUDA_KEY, m) {
  m.impl("adapter_bank_forward", TORCH_BOX(&a3fta::cuda::forward));
}
