// Tensor maps for the copy engine, made by the driver. The library links against no driver: it
// asks the runtime for the function, so it loads where there is none.
#pragma once

#include <cuda.h>

#include <string>

#include "launch.h"

namespace a3fta::cuda {

inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                         cudaEnableDefault, &found),
        "cuTensorMapEncodeTiled");
#else
  check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found),
        "cuTensorMapEncodeTiled");
#endif
  if (found != cudaDriverEntryPointSuccess) {
    throw std::runtime_error("cuTensorMapEncodeTiled: this driver has no tensor maps");
  }
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

// Whether the copy engine can read `m`: 16-byte aligned rows that do not overlap.
inline bool tensor_map_takes(const Matrix& m) {
  return m.rows > 0 && m.cols > 0 && reinterpret_cast<uintptr_t>(m.data) % 16 == 0 &&
         (m.rows == 1 || (m.stride % 8 == 0 && m.stride >= m.cols));
}

// Boxes of (box_rows, 64 or 32) of a 16-bit matrix, swizzled by their width; zeros beyond the
// edges.
inline CUtensorMap tensor_map(const char* name, DType dtype, const Matrix& m, int box_rows,
                              int box_cols = 64) {
  static const auto encode = tensor_map_encoder();
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(m.cols), static_cast<cuuint64_t>(m.rows)};
  // of one row the stride is arbitrary
  const int64_t stride = m.rows == 1 ? ceil_div(m.cols, 8) * 8 : m.stride;
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride * 2)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_cols),
                             static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  CUtensorMap map;
  const CUtensorMapDataType type = dtype == DType::fp16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                        : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUtensorMapSwizzle swizzle =
      box_cols == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  const CUresult status =
      encode(&map, type, 2, m.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error(std::string(name) + ": no tensor map for " + std::to_string(m.rows) +
                             " x " + std::to_string(m.cols) + ", row stride " +
                             std::to_string(m.stride) + ": CUDA driver error " +
                             std::to_string(static_cast<int>(status)));
  }
  return map;
}

}  // namespace a3fta::cuda
