// Launchers of the adapter's row kernels: through the bottleneck and, where `y` or `dh` is given,
// back out of it. All matrices are in `dtype`; see csrc/ops.cpp for the formulas.
#pragma once

#include "launch.h"

namespace a3fta::cuda {

struct AdapterForward {
  Matrix h, w_down;  // (M, C), (R, C)
  Vector b_down;
  Modulation modulation;
  int activation;
  Matrix a, z;  // (M, R) out; z may be absent
  // absent together: y = h + z @ w_up.T + b_up, where adapter_fits(dtype, R)
  Matrix w_up, y;  // (C, R), (M, C)
  Vector b_up;
};

struct AdapterBackward {
  Matrix dy, a, w_up;  // (M, N), (M, R), (N, R)
  Modulation modulation;
  int activation;
  Matrix da, z;          // (M, R) out; z may be absent
  float* dz = nullptr;   // (M, R) out, dy @ w_up; may be absent
  Matrix w_down, dh;     // absent together: dh = dy + da @ w_down, where adapter_fits(dtype, R)
};

// The forward in one pass over h (adapter_rows.cu), where it fits: 16-bit types, ranks up to 64,
// rows of whole 16-byte vectors, C within the chip's shared memory, y wanted and z not.
bool adapter_rows_fits(DType dtype, const AdapterForward& args);
void adapter_rows_forward(DType dtype, const AdapterForward& args, cudaStream_t stream);

// Whether a block of rows of this rank stays in shared memory between the two products.
bool adapter_fits(DType dtype, int64_t rank);

void adapter_forward(DType dtype, const AdapterForward& args, cudaStream_t stream);
void adapter_backward(DType dtype, const AdapterBackward& args, cudaStream_t stream);

}  // namespace a3fta::cuda
