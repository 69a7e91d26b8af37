// Launcher of the fused projection: adapter and frozen linear layer in one kernel. The other ops
// of adapter_linear are adapter.h's kernels without `y`, product.h and row_sums.h.
#pragma once

#include "launch.h"

namespace a3fta::cuda {

struct AdapterLinearForward {
  Matrix h, weight;  // (M, K), (N, K)
  Matrix w_down, v;  // (R, C), (N, R)
  Vector bias, b_down;
  Modulation modulation;
  Matrix residual;  // (M, N), may be absent
  int64_t start;    // the adapter reads columns start .. start + C of h
  int activation;
  Matrix y, a;  // (M, N), (M, R) out
};

// Whether a block of rows of this rank stays in shared memory; where not, the launcher refuses.
bool adapter_linear_fits(DType dtype, int64_t rank);

void adapter_linear_forward(DType dtype, const AdapterLinearForward& args, cudaStream_t stream);

}  // namespace a3fta::cuda
