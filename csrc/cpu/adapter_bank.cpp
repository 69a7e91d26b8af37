// adapter_bank_forward on the CPU: one pass over blocks of rows, each with the adapter of its
// sample.

#include <torch/csrc/stable/library.h>

#include "runtime.h"

namespace a3fta::cpu {
namespace {

// (B,) int32, each -1 or an adapter of the bank; returns B
int64_t check_index(const Tensor& index, int64_t rows, int64_t adapters) {
  const int64_t samples = index.numel();
  check_shape("index", index, {samples});
  check_contiguous("index", index);
  STD_TORCH_CHECK(
      index.scalar_type() == ScalarType::Int && !index.is_cuda(),
      "index: expected int32 on the CPU");
  STD_TORCH_CHECK(
      samples > 0 ? rows % samples == 0 : rows == 0, "index: expected a number of samples that ",
      "divides the ", rows, " rows, got ", samples);
  const int32_t* const values = static_cast<const int32_t*>(index.data_ptr());
  for (int64_t b = 0; b < samples; ++b)
    STD_TORCH_CHECK(
        values[b] >= -1 && values[b] < adapters, "index: expected -1 or 0 to ", adapters - 1,
        ", got ", values[b]);
  return samples;
}

Tensor adapter_bank_forward(
    Tensor h, Tensor residual, Tensor w_down, Tensor w_up, OptionalTensor b_down,
    OptionalTensor b_up, Tensor scale, Tensor index, int64_t activation) {
  check_rows("h", h);
  STD_TORCH_CHECK(
      w_down.dim() == 3, "w_down: expected shape (K, R, C), got ", shape_text(w_down));
  const int64_t rows = h.size(0), channels = h.size(1);
  const int64_t adapters = w_down.size(0), rank = w_down.size(1);
  check_rows("residual", residual);
  check_shape("residual", residual, {rows, channels});
  check_like("residual", residual, h);
  check_dense("w_down", w_down, {adapters, rank, channels}, h);
  check_dense("w_up", w_up, {adapters, channels, rank}, h);
  check_dense("b_down", b_down, {adapters, rank}, h);
  check_dense("b_up", b_up, {adapters, channels}, h);
  check_shape("scale", scale, {adapters});
  check_contiguous("scale", scale);
  STD_TORCH_CHECK(
      scale.scalar_type() == wide(h) && !scale.is_cuda(),
      "scale: expected the dtype of h's sums, on the CPU");
  const int64_t samples = check_index(index, rows, adapters);
  check_activation(activation);
  Tensor y = empty(h, {rows, channels});

  BankArgs args{rows,     channels,        rank,      samples,
                adapters, int(activation), matrix(h), matrix(residual)};
  args.w_down = w_down.data_ptr();
  args.w_up = w_up.data_ptr();
  args.b_down = data_or_null(b_down);
  args.b_up = data_or_null(b_up);
  args.scale = scale.data_ptr();
  args.index = static_cast<const int32_t*>(index.data_ptr());
  args.y = matrix(y);
  kernels().bank[dtype_of(h)](host(), args);
  return y;
}

}  // namespace
}  // namespace a3fta::cpu

STABLE_TORCH_LIBRARY_IMPL(a3fta_native, CPU, m) {
  m.impl("adapter_bank_forward", TORCH_BOX(&a3fta::cpu::adapter_bank_forward));
}
