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

// Launches `kernel` on grid_x * grid_y blocks; an empty grid is a no-op.
template <typename... Params, typename... Args>
void launch(const char* name, void (*kernel)(Params...), int64_t grid_x, int64_t grid_y,
            int threads, int64_t shared_bytes, cudaStream_t stream, Args&&... args) {
  if (grid_x == 0 || grid_y == 0) return;
  if (grid_x > INT32_MAX || grid_y > UINT16_MAX || shared_bytes > kSharedLimit) {
    throw std::runtime_error(std::string(name) + ": too large for one launch: " +
                             std::to_string(grid_x) + " x " + std::to_string(grid_y) +
                             " blocks, " + std::to_string(shared_bytes) +
                             " bytes of shared memory");
  }
  if (shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          name);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y), 1);
  config.blockDim = dim3(static_cast<unsigned>(threads), 1, 1);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...), name);
}

}  // namespace a3fta::cuda
