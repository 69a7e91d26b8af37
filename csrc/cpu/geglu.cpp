// geglu_forward and geglu_backward on the CPU.

#include <torch/csrc/stable/library.h>

#include "runtime.h"

namespace a3fta::cpu {
namespace {

int64_t half_width(const Tensor& p) {
  check_rows("p", p);
  STD_TORCH_CHECK(p.size(1) % 2 == 0, "p: expected an even number of columns, got ", p.size(1));
  return p.size(1) / 2;
}

Tensor geglu_forward(Tensor p, int64_t activation) {
  const int64_t rows = p.size(0), width = half_width(p);
  check_activation(activation);
  Tensor y = empty(p, {rows, width});
  kernels().geglu_forward[dtype_of(p)](
      host(), {rows, width, int(activation), matrix(p), {}, matrix(y)});
  return y;
}

Tensor geglu_backward(Tensor dy, Tensor p, int64_t activation) {
  const int64_t rows = p.size(0), width = half_width(p);
  check_rows("dy", dy);
  check_shape("dy", dy, {rows, width});
  check_like("dy", dy, p);
  check_activation(activation);
  Tensor dp = empty(p, {rows, 2 * width});
  kernels().geglu_backward[dtype_of(p)](
      host(), {rows, width, int(activation), matrix(p), matrix(dy), matrix(dp)});
  return dp;
}

}  // namespace
}  // namespace a3fta::cpu

STABLE_TORCH_LIBRARY_IMPL(a3fta_native, CPU, m) {
  m.impl("geglu_forward", TORCH_BOX(&a3fta::cpu::geglu_forward));
  m.impl("geglu_backward", TORCH_BOX(&a3fta::cpu::geglu_backward));
}
