#include "launch.h"

#include <map>
#include <mutex>

namespace a3fta::cuda {
namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

}  // namespace

const Chip& chip() {
  static std::mutex mutex;
  static std::map<int, Chip> chips;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = chips.find(device);
  if (found != chips.end()) return found->second;
  return chips[device] = {attribute(cudaDevAttrComputeCapabilityMajor, device) * 10 +
                              attribute(cudaDevAttrComputeCapabilityMinor, device),
                          attribute(cudaDevAttrMultiProcessorCount, device),
                          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device)};
}

}  // namespace a3fta::cuda
