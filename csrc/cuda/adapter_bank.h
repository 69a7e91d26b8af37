// Launcher of `adapter_bank`: the forward of a batch whose samples have adapters of their own.
#pragma once

#include "launch.h"

namespace a3fta::cuda {

// y_b = residual_b + scale[k] * (act(h_b @ w_down[k].T + b_down[k]) @ w_up[k].T + b_up[k]), where
// k = index[b]; y_b = residual_b where that is -1, and NaN where it is no adapter's.
struct AdapterBank {
  Matrix h, residual;  // (M, C); sample b owns M / samples rows
  int64_t samples, adapters, rank;
  const void *w_down, *w_up;  // (adapters, R, C), (adapters, C, R), contiguous
  const void *b_down, *b_up;  // (adapters, R), (adapters, C); may be null
  const float* scale;         // (adapters,)
  const int32_t* index;       // (samples,)
  int activation;
  Matrix y;  // (M, C) out
};

// Whether the rank is small enough for any of the kernels.
bool adapter_bank_fits(DType dtype, int64_t rank);
void adapter_bank(DType dtype, const AdapterBank& args, cudaStream_t stream);

}  // namespace a3fta::cuda
