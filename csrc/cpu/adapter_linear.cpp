// The skinny products of adapter_linear on the CPU; the wide one is PyTorch's.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "runtime.h"

namespace a3fta::cpu {
namespace {

std::tuple<Tensor, Tensor> adapter_down(
    Tensor h, Tensor w_down, OptionalTensor b_down, OptionalTensor gamma, OptionalTensor beta,
    int64_t activation) {
  check_rows("h", h);
  check_matrix("w_down", w_down);
  const int64_t rows = h.size(0), channels = h.size(1), rank = w_down.size(0);
  check_dense("w_down", w_down, {rank, channels}, h);
  check_dense("b_down", b_down, {rank}, h);
  check_modulation(gamma, beta, rows, rank, h);
  check_activation(activation);
  Tensor a = empty(h, {rows, rank}), z = empty(h, {rows, rank});

  ForwardArgs args{rows, channels, rank, int(activation), matrix(h), matrix(w_down), {}};
  args.b_down = data_or_null(b_down);
  args.modulation = modulation(gamma, beta);
  args.a = matrix(a);
  args.z = matrix(z);
  kernels().forward[dtype_of(h)](host(), args);
  return {a, z};
}

Tensor adapter_up(Tensor z, Tensor v, OptionalTensor bias, OptionalTensor residual) {
  check_rows("z", z);
  check_matrix("v", v);
  const int64_t rows = z.size(0), rank = z.size(1), columns = v.size(0);
  check_dense("v", v, {columns, rank}, z);
  if (bias.has_value()) {
    check_shape("bias", *bias, {columns});
    check_contiguous("bias", *bias);
    STD_TORCH_CHECK(
        bias->is_cpu() && bias->scalar_type() == wide(z),
        "bias: expected the dtype of sums, on z's device");
  }
  if (residual.has_value()) {
    check_rows("residual", *residual);
    check_shape("residual", *residual, {rows, columns});
    check_like("residual", *residual, z);
  }
  Tensor out = empty(z, {rows, columns});

  UpArgs args{rows, columns, rank, matrix(z), matrix(v), true};
  args.bias = data_or_null(bias);
  args.bias_wide = true;
  if (residual.has_value()) args.residual = matrix(*residual);
  args.out = matrix(out);
  kernels().up[dtype_of(z)](host(), args);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> adapter_dz(
    Tensor dy, Tensor a, Tensor v, OptionalTensor gamma, OptionalTensor beta, int64_t activation,
    bool need_dw) {
  check_rows("dy", dy);
  check_matrix("v", v);
  const int64_t rows = dy.size(0), columns = dy.size(1), rank = v.size(1);
  check_dense("a", a, {rows, rank}, dy);
  check_dense("v", v, {columns, rank}, dy);
  check_modulation(gamma, beta, rows, rank, dy);
  check_activation(activation);

  const bool modulated = need_dw && (gamma.has_value() || beta.has_value());
  const int64_t samples = modulated ? (gamma ? gamma->size(0) : beta->size(0)) : 0;
  const ScalarType sum = wide(dy);
  Tensor none = empty(dy, {0});
  Tensor da = empty(dy, {rows, rank});
  Tensor p = need_dw ? empty(dy, {columns, rank}, sum) : none;
  Tensor dy_sum = need_dw ? empty(dy, {columns}, sum) : none;
  Tensor dgamma = modulated ? zeros(dy, {samples, rank}, sum) : none;
  Tensor dbeta = modulated ? zeros(dy, {samples, rank}, sum) : none;

  BackwardArgs args{rows, columns, rank, int(activation), matrix(dy), {}, matrix(a), {}, matrix(v)};
  args.modulation = modulation(gamma, beta);
  args.da = matrix(da);
  if (need_dw) {
    args.g_up = p.data_ptr();
    args.dy_sum = dy_sum.data_ptr();
  }
  if (modulated) {
    args.dgamma = dgamma.data_ptr();
    args.dbeta = dbeta.data_ptr();
  }
  kernels().backward[dtype_of(dy)](host(), args);
  return {da, p, dy_sum, dgamma, dbeta};
}

void adapter_dh_(Tensor dh, Tensor da, Tensor w_down) {
  check_rows("dh", dh);
  check_rows("da", da);
  const int64_t rows = dh.size(0), columns = dh.size(1), rank = da.size(1);
  check_shape("da", da, {rows, rank});
  check_like("da", da, dh);
  check_dense("w_down", w_down, {rank, columns}, dh);

  UpArgs args{rows, columns, rank, matrix(da), matrix(w_down), false};
  args.residual = matrix(dh);
  args.out = matrix(dh);
  kernels().up[dtype_of(dh)](host(), args);
}

std::tuple<Tensor, Tensor> adapter_dw_down(Tensor da, Tensor h) {
  check_rows("da", da);
  check_rows("h", h);
  const int64_t rows = da.size(0), rank = da.size(1), channels = h.size(1);
  check_shape("h", h, {rows, channels});
  check_like("h", h, da);
  Tensor dw_down = empty(h, {rank, channels}, wide(h)), da_sum = empty(h, {rank}, wide(h));

  OuterArgs args{rows,      channels, rank, matrix(da), matrix(h), dw_down.data_ptr(),
                 da_sum.data_ptr()};
  kernels().outer[dtype_of(h)](host(), args);
  return {dw_down, da_sum};
}

}  // namespace
}  // namespace a3fta::cpu

STABLE_TORCH_LIBRARY_IMPL(a3fta_native, CPU, m) {
  m.impl("adapter_down", TORCH_BOX(&a3fta::cpu::adapter_down));
  m.impl("adapter_up", TORCH_BOX(&a3fta::cpu::adapter_up));
  m.impl("adapter_dz", TORCH_BOX(&a3fta::cpu::adapter_dz));
  m.impl("adapter_dh_", TORCH_BOX(&a3fta::cpu::adapter_dh_));
  m.impl("adapter_dw_down", TORCH_BOX(&a3fta::cpu::adapter_dw_down));
}
