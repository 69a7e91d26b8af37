// `adapter` on CUDA tensors: outputs, workspaces, the order of the launches.

#include "adapter.h"

#include "product.h"
#include "row_sums.h"
#include "tensors.h"

namespace a3fta::cuda {

RowProductResult row_product(const Call& call, const Matrix& left, const Matrix& right) {
  const int64_t m = left.rows;
  const int64_t n = left.cols;
  const int64_t r = right.cols;
  RowProductResult result{call.wide(n, r), call.wide(n)};
  const int64_t parts = row_product_parts(m, n, r);
  const Tensor workspace = call.wide(parts > 1 ? parts * (n * r + n) : 0);
  row_product(call.dtype(),
              RowProduct{left, right, static_cast<float*>(result.product.data_ptr()),
                         static_cast<float*>(result.sums.data_ptr()),
                         static_cast<float*>(workspace.data_ptr())},
              call.stream());
  return result;
}

BottleneckGradients bottleneck_gradients(const Call& call, const Matrix& dy, const Matrix& a,
                                         const Matrix& w_up, const OptionalTensor& gamma,
                                         const OptionalTensor& beta, int64_t activation,
                                         bool need_dw, const Matrix& w_down, const Matrix& dh) {
  const int64_t m = dy.rows;
  const int64_t rank = w_up.cols;
  const bool need_samples = need_dw && (gamma.has_value() || beta.has_value());
  BottleneckGradients result{call.empty(m, rank), {call.none(), call.none()}, call.none(),
                             call.none()};
  const Tensor z = call.empty(need_dw ? m : 0, rank);
  const Tensor dz = call.wide(need_samples ? m : 0, rank);

  AdapterBackward args{};
  args.dy = dy;
  args.a = a;
  args.w_up = w_up;
  args.modulation = call.modulation(gamma, beta, m, rank);
  args.activation = static_cast<int>(activation);
  args.da = whole(result.da);
  if (need_dw) args.z = whole(z);
  if (need_samples) args.dz = static_cast<float*>(dz.data_ptr());
  if (dh.data != nullptr && adapter_fits(call.dtype(), rank)) {
    args.w_down = w_down;
    args.dh = dh;
  }
  adapter_backward(call.dtype(), args, call.stream());
  if (dh.data != nullptr && args.dh.data == nullptr) {
    Product back{};
    back.a = args.da;
    back.b = w_down;
    back.residual = dy;
    back.y = dh;
    product(call.dtype(), false, back, call.stream());
  }
  if (need_dw) result.up = row_product(call, dy, whole(z));
  if (need_samples) {
    const int64_t samples = (gamma.has_value() ? gamma : beta)->size(0);
    if (gamma.has_value()) result.dgamma = call.wide(samples, rank);
    if (beta.has_value()) result.dbeta = call.wide(samples, rank);
    const int64_t parts = sample_sum_parts(m, samples, rank);
    const Tensor workspace = call.wide(parts * 2 * samples * rank);
    SampleSums sums{};
    sums.dz = args.dz;
    sums.a = a;
    sums.activation = args.activation;
    sums.samples = samples;
    if (gamma.has_value()) sums.dgamma = static_cast<float*>(result.dgamma.data_ptr());
    if (beta.has_value()) sums.dbeta = static_cast<float*>(result.dbeta.data_ptr());
    sums.workspace = static_cast<float*>(workspace.data_ptr());
    sample_sums(call.dtype(), sums, call.stream());
  }
  return result;
}

namespace {

std::tuple<Tensor, Tensor> forward(Tensor h, Tensor w_down, Tensor w_up, OptionalTensor b_down,
                                   OptionalTensor b_up, OptionalTensor gamma, OptionalTensor beta,
                                   int64_t activation) {
  const Call call(h);
  const int64_t m = h.size(0);
  const int64_t channels = h.size(1);
  const int64_t rank = w_down.size(0);
  const Tensor y = call.empty(m, channels);
  const Tensor a = call.empty(m, rank);
  const bool fits = adapter_fits(call.dtype(), rank);
  const Tensor z = call.empty(fits ? 0 : m, rank);

  AdapterForward args{};
  args.h = call.matrix("h", h, m, channels);
  args.w_down = call.matrix("w_down", w_down, rank, channels);
  args.b_down = call.vector("b_down", b_down, rank);
  args.modulation = call.modulation(gamma, beta, m, rank);
  args.activation = static_cast<int>(activation);
  args.a = whole(a);
  const Matrix up = call.matrix("w_up", w_up, channels, rank);
  const Vector b = call.vector("b_up", b_up, channels);
  if (fits) {
    args.w_up = up;
    args.b_up = b;
    args.y = whole(y);
    if (adapter_rows_fits(call.dtype(), args)) {
      adapter_rows_forward(call.dtype(), args, call.stream());
    } else {
      adapter_forward(call.dtype(), args, call.stream());
    }
  } else {
    args.z = whole(z);
    adapter_forward(call.dtype(), args, call.stream());
    Product back{};
    back.a = args.z;
    back.b = up;
    back.bias = b;
    back.residual = args.h;
    back.y = whole(y);
    product(call.dtype(), true, back, call.stream());
  }
  return {y, a};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor dy, Tensor h, Tensor a, Tensor w_down, Tensor w_up, OptionalTensor gamma,
    OptionalTensor beta, int64_t activation, bool need_dh, bool need_dw) {
  const Call call(h);
  const int64_t m = h.size(0);
  const int64_t channels = h.size(1);
  const int64_t rank = w_down.size(0);
  const Tensor dh = need_dh ? call.empty(m, channels) : call.none();
  const Matrix h_rows = call.matrix("h", h, m, channels);
  const Matrix down = call.matrix("w_down", w_down, rank, channels);
  const BottleneckGradients middle = bottleneck_gradients(
      call, call.matrix("dy", dy, m, channels), call.matrix("a", a, m, rank),
      call.matrix("w_up", w_up, channels, rank), gamma, beta, activation, need_dw,
      need_dh ? down : Matrix{}, need_dh ? whole(dh) : Matrix{});
  const RowProductResult back = need_dw ? row_product(call, whole(middle.da), h_rows)
                                        : RowProductResult{call.none(), call.none()};
  return {dh,          back.product,  middle.up.product, back.sums,
          middle.up.sums, middle.dgamma, middle.dbeta};
}

}  // namespace
}  // namespace a3fta::cuda

STABLE_TORCH_LIBRARY_IMPL(a3fta_native, A3FTA_CUDA_KEY, m) {
  m.impl("adapter_forward", TORCH_BOX(&a3fta::cuda::forward));
  m.impl("adapter_backward", TORCH_BOX(&a3fta::cuda::backward));
}
