// Launcher of the gated linear unit, forward and backward.
#pragma once

#include "launch.h"

namespace a3fta::cuda {

struct Geglu {
  Matrix p;   // (M, 2F) = [hidden | gate]
  Matrix dy;  // (M, F); absent: the forward
  Matrix out;  // y (M, F) or dp (M, 2F)
  int activation;
};

void geglu(DType dtype, const Geglu& args, cudaStream_t stream);

}  // namespace a3fta::cuda
