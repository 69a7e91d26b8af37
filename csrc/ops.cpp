// Every operator of the compiled library: the table of contents. The CPU kernels are registered
// in cpu/<op>.cpp, the CUDA kernels in cuda/<op>.cpp.
//
// Tensors are 2-D with unit column stride; row strides are free, except that w_down, w_up, v, a,
// z and da are contiguous. `activation` is an index into ops/activations.py's ACTIVATIONS. Sums
// over rows (weight gradients) are fp32, fp64 for fp64. Sample b owns rows b*M/B to (b+1)*M/B.

#include <torch/csrc/stable/library.h>

namespace {

bool has_cuda() {
#ifdef A3FTA_WITH_CUDA
  return true;
#else
  return false;
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY(a3fta_native, m) {
  m.def("has_cuda() -> bool");

  // the instruction sets of the CPU kernels that this processor runs, separated by commas, the
  // best last; the one in use; and another choice (for tests)
  m.def("cpu_capabilities() -> str");
  m.def("cpu_capability() -> str");
  m.def("set_cpu_capability(str name) -> ()");

  // y = h + act(h @ w_down.T + b_down) [* (1 + gamma) + beta] @ w_up.T + b_up
  m.def(
      "adapter_forward(Tensor h, Tensor w_down, Tensor w_up, Tensor? b_down, Tensor? b_up, "
      "Tensor? gamma, Tensor? beta, int activation) -> (Tensor y, Tensor a)");
  // an empty tensor where a result is not needed
  m.def(
      "adapter_backward(Tensor dy, Tensor h, Tensor a, Tensor w_down, Tensor w_up, "
      "Tensor? gamma, Tensor? beta, int activation, bool need_dh, bool need_dw) "
      "-> (Tensor dh, Tensor dw_down, Tensor g_up, Tensor da_sum, Tensor dy_sum, "
      "Tensor dgamma, Tensor dbeta)");

  // y_b = residual_b + scale[k] * (act(h_b @ w_down[k].T + b_down[k]) @ w_up[k].T + b_up[k]), with
  // k = index[b], int32; y_b = residual_b where that is -1. w_down (K, R, C), w_up (K, C, R),
  // b_down (K, R), b_up (K, C), contiguous; scale (K,) in fp32, fp64 for fp64
  m.def(
      "adapter_bank_forward(Tensor h, Tensor residual, Tensor w_down, Tensor w_up, "
      "Tensor? b_down, Tensor? b_up, Tensor scale, Tensor index, int activation) -> Tensor y");

  // the skinny halves of adapter_linear, beside a library GEMM
  m.def(
      "adapter_down(Tensor h, Tensor w_down, Tensor? b_down, Tensor? gamma, Tensor? beta, "
      "int activation) -> (Tensor a, Tensor z)");
  // residual + bias + z @ v.T
  m.def("adapter_up(Tensor z, Tensor v, Tensor? bias, Tensor? residual) -> Tensor");
  // da = (dy @ v) (1 + gamma) act'(a) and p = dy.T @ z; on the CPU in one pass over dy
  m.def(
      "adapter_dz(Tensor dy, Tensor a, Tensor v, Tensor? gamma, Tensor? beta, int activation, "
      "bool need_dw) -> (Tensor da, Tensor p, Tensor dy_sum, Tensor dgamma, Tensor dbeta)");
  // dh += da @ w_down
  m.def("adapter_dh_(Tensor(a!) dh, Tensor da, Tensor w_down) -> ()");
  m.def("adapter_dw_down(Tensor da, Tensor h) -> (Tensor dw_down, Tensor da_sum)");

  // adapter_linear's wide products in one kernel each; CUDA only. linear_concat is
  // h @ weight.T + z @ v.T + bias + residual
  m.def(
      "adapter_linear_forward(Tensor h, Tensor weight, Tensor? bias, Tensor w_down, Tensor v, "
      "Tensor? b_down, Tensor? gamma, Tensor? beta, Tensor? residual, int start, "
      "int activation) -> (Tensor y, Tensor a)");
  m.def(
      "adapter_linear_concat(Tensor h, Tensor weight, Tensor? bias, Tensor z, Tensor v, "
      "Tensor? residual) -> Tensor");
  m.def(
      "adapter_linear_backward_dh(Tensor dy, Tensor da, Tensor weight, Tensor w_down, int start) "
      "-> Tensor dh");

  // p (M, 2F) = [hidden | gate]: y = hidden * act(gate); dp, contiguous
  m.def("geglu_forward(Tensor p, int activation) -> Tensor y");
  m.def("geglu_backward(Tensor dy, Tensor p, int activation) -> Tensor dp");

  // y = act(weight * xhat + bias). x, dy, y, dx (B, C, S), contiguous or with channels last; mean,
  // rstd (B, G) and, where they are not of x's dtype, weight and bias (C,): fp32, fp64 for fp64
  m.def(
      "group_norm_forward(Tensor x, int groups, Tensor? weight, Tensor? bias, float eps, "
      "int activation) -> (Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "group_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, "
      "Tensor? bias, int activation) -> Tensor dx");
  // the same by rows; mean and rstd (M,)
  m.def(
      "layer_norm_forward(Tensor x, Tensor? weight, Tensor? bias, float eps) "
      "-> (Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "layer_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight) "
      "-> Tensor dx");

  // a contiguous vector in 8 bits: codes (n,) int8, ranges (blocks of 128, 2) bf16 = [mid, half]
  m.def("quantize(Tensor x) -> (Tensor codes, Tensor ranges)");
  m.def("dequantize(Tensor codes, Tensor ranges, ScalarType dtype) -> Tensor x");
}

STABLE_TORCH_LIBRARY_IMPL(a3fta_native, CompositeExplicitAutograd, m) {
  m.impl("has_cuda", TORCH_BOX(&has_cuda));
}
