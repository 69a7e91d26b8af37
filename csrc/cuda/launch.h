// What every launcher takes and shares: plain tensor descriptions and checked launches.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace a3fta::cuda {

enum class DType { fp32, fp16, bf16 };

// Dynamic shared memory a block may ask for: the 99 KB of the smallest supported chips (sm_86,
// sm_89, sm_120), less the 1 KB that the compiler reserves per block from sm_90 on.
constexpr int64_t kSharedLimit = 98 * 1024;

// (rows, cols) with unit column stride; null `data` means absent.
struct Matrix {
  void* data = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;
};

// A contiguous vector in fp32 (`wide`) or in the op's dtype; null `data` means absent.
struct Vector {
  const void* data = nullptr;
  bool wide = false;
};

// gamma and beta (B, R), contiguous, either may be null; a sample owns `rows_per_sample` rows.
struct Modulation {
  const void* gamma = nullptr;
  const void* beta = nullptr;
  int64_t rows_per_sample = 1;
};

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    cudaGetLastError();  // a launch error is not sticky: the next call must not see it again
    throw std::runtime_error(std::string(what) + ": CUDA error: " + cudaGetErrorString(status));
  }
}

// What the current device has. Asked of the driver once per device.
struct Chip {
  int capability;            // 90 for sm_90
  int processors;
  int64_t shared_block;      // bytes of dynamic shared memory a block may ask for
  int64_t shared_processor;  // bytes that the blocks of one processor share
};

const Chip& chip();

// What every block takes of its processor's shared memory beside what it asks for.
constexpr int64_t kSharedReserve = 1024;

// A grid of x * y blocks; in clusters of `cluster` neighbours along x, where that is not 0.
struct Grid {
  int64_t x, y = 1;
  int threads;
  int64_t shared_bytes = 0;
  int64_t shared_limit = kSharedLimit;
  int cluster = 0;
};

// The launch of `kernel`, and whether there is anything to launch. `attribute` must outlive it.
template <typename... Params>
bool configure(cudaLaunchConfig_t& config, cudaLaunchAttribute& attribute, const char* name,
               void (*kernel)(Params...), const Grid& grid, cudaStream_t stream) {
  if (grid.x == 0 || grid.y == 0) return false;
  if (grid.x > INT32_MAX || grid.y > UINT16_MAX || grid.shared_bytes > grid.shared_limit) {
    throw std::runtime_error(std::string(name) + ": too large for one launch: " +
                             std::to_string(grid.x) + " x " + std::to_string(grid.y) +
                             " blocks, " + std::to_string(grid.shared_bytes) +
                             " bytes of shared memory");
  }
  if (grid.shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(grid.shared_bytes)),
          name);
  }
  config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), 1);
  config.blockDim = dim3(static_cast<unsigned>(grid.threads), 1, 1);
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
  config.stream = stream;
  if (grid.cluster > 8) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          name);
  }
  if (grid.cluster > 0) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(grid.cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  return true;
}

// Launches `kernel`; an empty grid is a no-op.
template <typename... Params, typename... Args>
void launch(const char* name, void (*kernel)(Params...), const Grid& grid, cudaStream_t stream,
            Args&&... args) {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute{};
  if (!configure(config, attribute, name, kernel, grid, stream)) return;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...), name);
}

template <typename... Params, typename... Args>
void launch(const char* name, void (*kernel)(Params...), int64_t grid_x, int64_t grid_y,
            int threads, int64_t shared_bytes, cudaStream_t stream, Args&&... args) {
  launch(name, kernel, Grid{grid_x, grid_y, threads, shared_bytes}, stream,
         std::forward<Args>(args)...);
}

}  // namespace a3fta::cuda
