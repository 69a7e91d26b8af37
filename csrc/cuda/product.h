// Launchers of the plain products beside the bottleneck.
#pragma once

#include "launch.h"

namespace a3fta::cuda {

// y = residual + bias + a @ b [+ a2 @ b2 on columns start .. start + b2's width], rounded once.
// Any of a and b together, residual and bias may be absent; the residual may be y itself.
struct Product {
  Matrix a, b;    // (M, K), (N, K) if transposed else (K, N)
  Matrix a2, b2;  // (M, R), (N, R) if transposed else (R, width)
  int64_t start = 0;  // 0 if transposed
  Vector bias;        // (N,)
  Matrix residual;    // (M, N)
  Matrix y;           // (M, N) out
};

void product(DType dtype, bool transposed, const Product& args, cudaStream_t stream);

}  // namespace a3fta::cuda
