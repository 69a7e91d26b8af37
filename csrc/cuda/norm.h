// Launchers of group_norm and layer_norm, forward and backward.
#pragma once

#include "launch.h"

namespace a3fta::cuda {

// x (B, C, S), contiguous or with channels last; weight and bias (C,); mean and rstd (B, G).
struct GroupNorm {
  const void* x;
  const void* dy;  // null: the forward
  void* out;       // y or dx
  Vector weight, bias;
  float* mean;  // results of the forward
  float* rstd;
  float* workspace;  // group_norm_workspace
  int64_t samples, channels, positions, groups;
  bool last;
  int activation;
  float eps;
};

int64_t group_norm_workspace(DType dtype, const GroupNorm& args);
void group_norm(DType dtype, const GroupNorm& args, cudaStream_t stream);

struct LayerNorm {
  Matrix x, dy, out;  // (M, C); dy absent: the forward
  Vector weight, bias;
  float* mean;  // (M,), results of the forward
  float* rstd;
  float eps;
};

void layer_norm(DType dtype, const LayerNorm& args, cudaStream_t stream);

}  // namespace a3fta::cuda
