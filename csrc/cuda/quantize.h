// Launchers of the 8-bit copies: n elements in blocks of 128, a range [mid, half] in bf16 for each.
#pragma once

#include "launch.h"

namespace a3fta::cuda {

struct Quantized {
  int8_t* codes;  // (n,)
  void* ranges;   // (blocks, 2) bf16, from a multiple of 4 bytes
  int64_t count;  // n
};

void quantize(DType dtype, const void* x, const Quantized& to, cudaStream_t stream);
void dequantize(DType dtype, const Quantized& from, void* x, cudaStream_t stream);

}  // namespace a3fta::cuda
