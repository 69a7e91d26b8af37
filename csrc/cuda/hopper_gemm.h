// Launchers of the Hopper products of adapter_linear: wgmma on tiles that the copy engine brings.
#pragma once

#include "adapter_linear.h"
#include "product.h"

namespace a3fta::cuda {

// Whether the Hopper kernel takes this call, here, on the current device. It asks for compute
// capability 9.0, a 16-bit dtype, 16-byte aligned rows everywhere, and sizes that the 32-bit
// coordinates of a tensor copy reach; fused also for a rank of at most 64 and a slice of columns
// in whole steps of 64. Everything else belongs to the kernels of adapter_linear.h and product.h.
bool hopper_takes(DType dtype, const AdapterLinearForward& args);
bool hopper_takes(DType dtype, bool transposed, const Product& args);

void hopper_adapter_linear(DType dtype, const AdapterLinearForward& args, cudaStream_t stream);
void hopper_product(DType dtype, bool transposed, const Product& args, cudaStream_t stream);

}  // namespace a3fta::cuda
