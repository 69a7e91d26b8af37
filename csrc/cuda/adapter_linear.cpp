// `adapter_linear` on CUDA tensors: the skinny halves beside a library GEMM, and the wide products
// in kernels of this library.

#include "adapter_linear.h"

#include "adapter.h"
#include "hopper_gemm.h"
#include "product.h"
#include "tensors.h"

namespace a3fta::cuda {
namespace {

std::tuple<Tensor, Tensor> down(Tensor h, Tensor w_down, OptionalTensor b_down,
                                OptionalTensor gamma, OptionalTensor beta, int64_t activation) {
  const Call call(h);
  const int64_t m = h.size(0);
  const int64_t rank = w_down.size(0);
  const Tensor a = call.empty(m, rank);
  const Tensor z = call.empty(m, rank);
  AdapterForward args{};
  args.h = call.matrix("h", h, m, h.size(1));
  args.w_down = call.matrix("w_down", w_down, rank, h.size(1));
  args.b_down = call.vector("b_down", b_down, rank);
  args.modulation = call.modulation(gamma, beta, m, rank);
  args.activation = static_cast<int>(activation);
  args.a = whole(a);
  args.z = whole(z);
  adapter_forward(call.dtype(), args, call.stream());
  return {a, z};
}

Tensor up(Tensor z, Tensor v, OptionalTensor bias, OptionalTensor residual) {
  const Call call(z);
  const int64_t m = z.size(0);
  const int64_t n = v.size(0);
  const int64_t rank = z.size(1);
  const Tensor y = call.empty(m, n);
  Product args{};
  args.a = call.matrix("z", z, m, rank);
  args.b = call.matrix("v", v, n, rank);
  args.bias = call.vector("bias", bias, n);
  args.residual = call.matrix("residual", residual, m, n);
  args.y = whole(y);
  product(call.dtype(), true, args, call.stream());
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> dz(Tensor dy, Tensor a, Tensor v,
                                                      OptionalTensor gamma, OptionalTensor beta,
                                                      int64_t activation, bool need_dw) {
  const Call call(dy);
  const int64_t m = dy.size(0);
  const int64_t n = dy.size(1);
  const int64_t rank = v.size(1);
  const BottleneckGradients found = bottleneck_gradients(
      call, call.matrix("dy", dy, m, n), Matrix{}, call.matrix("a", a, m, rank),
      call.matrix("v", v, n, rank), gamma, beta, activation, need_dw, Matrix{}, Matrix{});
  return {found.da, found.up.product, found.up.sums, found.dgamma, found.dbeta};
}

void add_dh(Tensor dh, Tensor da, Tensor w_down) {
  const Call call(dh);
  const int64_t m = dh.size(0);
  const int64_t channels = dh.size(1);
  const int64_t rank = da.size(1);
  Product args{};
  args.a = call.matrix("da", da, m, rank);
  args.b = call.matrix("w_down", w_down, rank, channels);
  args.y = call.matrix("dh", dh, m, channels);
  args.residual = args.y;
  product(call.dtype(), false, args, call.stream());
}

std::tuple<Tensor, Tensor> dw_down(Tensor da, Tensor h) {
  const Call call(da);
  const int64_t m = da.size(0);
  const RowProductResult found = row_product(call, call.matrix("da", da, m, da.size(1)),
                                             call.matrix("h", h, m, h.size(1)));
  return {found.product, found.sums};
}

// The wide products, each by the best kernel that takes it.
void forward_in_one(const Call& call, const AdapterLinearForward& args) {
  if (hopper_takes(call.dtype(), args)) {
    hopper_adapter_linear(call.dtype(), args, call.stream());
  } else {
    adapter_linear_forward(call.dtype(), args, call.stream());
  }
}

void wide_product(const Call& call, bool transposed, const Product& args) {
  if (hopper_takes(call.dtype(), transposed, args)) {
    hopper_product(call.dtype(), transposed, args, call.stream());
  } else {
    product(call.dtype(), transposed, args, call.stream());
  }
}

void check_slice(int64_t start, int64_t length, int64_t columns) {
  STD_TORCH_CHECK(start >= 0 && start + length <= columns, "start: columns ", start, " .. ",
                  start + length, " do not lie in the projection's ", columns, " inputs");
}

std::tuple<Tensor, Tensor> linear_forward(Tensor h, Tensor weight, OptionalTensor bias,
                                          Tensor w_down, Tensor v, OptionalTensor b_down,
                                          OptionalTensor gamma, OptionalTensor beta,
                                          OptionalTensor residual, int64_t start,
                                          int64_t activation) {
  const Call call(h);
  const int64_t m = h.size(0);
  const int64_t n = weight.size(0);
  const int64_t rank = w_down.size(0);
  const int64_t channels = w_down.size(1);
  check_slice(start, channels, h.size(1));
  const Tensor y = call.empty(m, n);
  const Tensor a = call.empty(m, rank);
  AdapterLinearForward args{};
  args.h = call.matrix("h", h, m, h.size(1));
  args.weight = call.matrix("weight", weight, n, h.size(1));
  args.w_down = call.matrix("w_down", w_down, rank, channels);
  args.v = call.matrix("v", v, n, rank);
  args.bias = call.vector("bias", bias, n);
  args.b_down = call.vector("b_down", b_down, rank);
  args.modulation = call.modulation(gamma, beta, m, rank);
  args.residual = call.matrix("residual", residual, m, n);
  args.start = start;
  args.activation = static_cast<int>(activation);
  args.y = whole(y);
  args.a = whole(a);
  if (adapter_linear_fits(call.dtype(), rank)) {
    forward_in_one(call, args);
    return {y, a};
  }
  // a rank too large for shared memory: z through device memory, then one K-concat product
  const Tensor z = call.empty(m, rank);
  AdapterForward first{};
  first.h = columns(args.h, start, channels, call.dtype());
  first.w_down = args.w_down;
  first.b_down = args.b_down;
  first.modulation = args.modulation;
  first.activation = args.activation;
  first.a = args.a;
  first.z = whole(z);
  adapter_forward(call.dtype(), first, call.stream());
  Product second{};
  second.a = args.h;
  second.b = args.weight;
  second.a2 = first.z;
  second.b2 = args.v;
  second.bias = args.bias;
  second.residual = args.residual;
  second.y = args.y;
  wide_product(call, true, second);
  return {y, a};
}

Tensor linear_concat(Tensor h, Tensor weight, OptionalTensor bias, Tensor z, Tensor v,
                     OptionalTensor residual) {
  const Call call(h);
  const int64_t m = h.size(0);
  const int64_t n = weight.size(0);
  const int64_t rank = v.size(1);
  const Tensor y = call.empty(m, n);
  Product args{};
  args.a = call.matrix("h", h, m, h.size(1));
  args.b = call.matrix("weight", weight, n, h.size(1));
  args.a2 = call.matrix("z", z, m, rank);
  args.b2 = call.matrix("v", v, n, rank);
  args.bias = call.vector("bias", bias, n);
  args.residual = call.matrix("residual", residual, m, n);
  args.y = whole(y);
  wide_product(call, true, args);
  return y;
}

Tensor linear_backward_dh(Tensor dy, Tensor da, Tensor weight, Tensor w_down, int64_t start) {
  const Call call(dy);
  const int64_t m = dy.size(0);
  const int64_t rank = da.size(1);
  const int64_t channels = w_down.size(1);
  check_slice(start, channels, weight.size(1));
  const Tensor dh = call.empty(m, weight.size(1));
  Product args{};
  args.a = call.matrix("dy", dy, m, weight.size(0));
  args.b = call.matrix("weight", weight, weight.size(0), weight.size(1));
  args.a2 = call.matrix("da", da, m, rank);
  args.b2 = call.matrix("w_down", w_down, rank, channels);
  args.start = start;
  args.y = whole(dh);
  wide_product(call, false, args);
  return dh;
}

}  // namespace
}  // namespace a3fta::cuda

STABLE_TORCH_LIBRARY_IMPL(a3fta_native, A3FTA_CUDA_KEY, m) {
  m.impl("adapter_down", TORCH_BOX(&a3fta::cuda::down));
  m.impl("adapter_up", TORCH_BOX(&a3fta::cuda::up));
  m.impl("adapter_dz", TORCH_BOX(&a3fta::cuda::dz));
  m.impl("adapter_dh_", TORCH_BOX(&a3fta::cuda::add_dh));
  m.impl("adapter_dw_down", TORCH_BOX(&a3fta::cuda::dw_down));
  m.impl("adapter_linear_forward", TORCH_BOX(&a3fta::cuda::linear_forward));
  m.impl("adapter_linear_concat", TORCH_BOX(&a3fta::cuda::linear_concat));
  m.impl("adapter_linear_backward_dh", TORCH_BOX(&a3fta::cuda::linear_backward_dh));
}
