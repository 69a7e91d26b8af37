// What the CUDA registration asks of torch beyond CPU tensors.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
extern "C" AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}
extern "C" AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }
