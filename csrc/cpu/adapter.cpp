// adapter_forward and adapter_backward on the CPU: one pass each over blocks of rows that stay in
// the second cache.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "runtime.h"

namespace a3fta::cpu {
namespace {

std::tuple<Tensor, Tensor> adapter_forward(
    Tensor h, Tensor w_down, Tensor w_up, OptionalTensor b_down, OptionalTensor b_up,
    OptionalTensor gamma, OptionalTensor beta, int64_t activation) {
  check_rows("h", h);
  check_matrix("w_down", w_down);
  const int64_t rows = h.size(0), channels = h.size(1), rank = w_down.size(0);
  check_dense("w_down", w_down, {rank, channels}, h);
  check_dense("w_up", w_up, {channels, rank}, h);
  check_dense("b_down", b_down, {rank}, h);
  check_dense("b_up", b_up, {channels}, h);
  check_modulation(gamma, beta, rows, rank, h);
  check_activation(activation);
  Tensor y = empty(h, {rows, channels}), a = empty(h, {rows, rank});

  ForwardArgs args{rows, channels, rank, int(activation), matrix(h), matrix(w_down), matrix(w_up)};
  args.b_down = data_or_null(b_down);
  args.b_up = data_or_null(b_up);
  args.modulation = modulation(gamma, beta);
  args.a = matrix(a);
  args.y = matrix(y);
  kernels().forward[dtype_of(h)](host(), args);
  return {y, a};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> adapter_backward(
    Tensor dy, Tensor h, Tensor a, Tensor w_down, Tensor w_up, OptionalTensor gamma,
    OptionalTensor beta, int64_t activation, bool need_dh, bool need_dw) {
  check_rows("dy", dy);
  check_rows("h", h);
  check_matrix("w_down", w_down);
  const int64_t rows = dy.size(0), channels = dy.size(1), rank = w_down.size(0);
  check_shape("h", h, {rows, channels});
  check_like("h", h, dy);
  check_dense("a", a, {rows, rank}, dy);
  check_dense("w_down", w_down, {rank, channels}, dy);
  check_dense("w_up", w_up, {channels, rank}, dy);
  check_modulation(gamma, beta, rows, rank, dy);
  check_activation(activation);

  const bool modulated = need_dw && (gamma.has_value() || beta.has_value());
  const int64_t samples = modulated ? (gamma ? gamma->size(0) : beta->size(0)) : 0;
  const ScalarType sum = wide(dy);
  Tensor none = empty(dy, {0});
  Tensor dh = need_dh ? empty(dy, {rows, channels}) : none;
  Tensor dw_down = need_dw ? empty(dy, {rank, channels}, sum) : none;
  Tensor g_up = need_dw ? empty(dy, {channels, rank}, sum) : none;
  Tensor da_sum = need_dw ? empty(dy, {rank}, sum) : none;
  Tensor dy_sum = need_dw ? empty(dy, {channels}, sum) : none;
  Tensor dgamma = modulated ? zeros(dy, {samples, rank}, sum) : none;
  Tensor dbeta = modulated ? zeros(dy, {samples, rank}, sum) : none;

  BackwardArgs args{rows,      channels,  rank,           int(activation), matrix(dy),
                    matrix(h), matrix(a), matrix(w_down), matrix(w_up)};
  args.modulation = modulation(gamma, beta);
  if (need_dh) args.dh = matrix(dh);
  if (need_dw) {
    args.dw_down = dw_down.data_ptr();
    args.g_up = g_up.data_ptr();
    args.da_sum = da_sum.data_ptr();
    args.dy_sum = dy_sum.data_ptr();
  }
  if (modulated) {
    args.dgamma = dgamma.data_ptr();
    args.dbeta = dbeta.data_ptr();
  }
  kernels().backward[dtype_of(dy)](host(), args);
  return {dh, dw_down, g_up, da_sum, dy_sum, dgamma, dbeta};
}

}  // namespace
}  // namespace a3fta::cpu

STABLE_TORCH_LIBRARY_IMPL(a3fta_native, CPU, m) {
  m.impl("adapter_forward", TORCH_BOX(&a3fta::cpu::adapter_forward));
  m.impl("adapter_backward", TORCH_BOX(&a3fta::cpu::adapter_backward));
}
