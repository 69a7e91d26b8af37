// Exactly-sized heap buffers for the kernels, filled so that what was not written shows.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "../../csrc/cuda/tile.cuh"
#include "emulator.h"

namespace a3fta::cuda {

// Buffers of one case: inputs hold small numbers, outputs and the gaps between rows NaN.
class Buffers {
 public:
  Buffers(DType dtype, bool aligned) : dtype_(dtype), aligned_(aligned) {}

  Matrix input(int64_t rows, int64_t cols) { return make(rows, cols, false); }
  Matrix output(int64_t rows, int64_t cols) { return make(rows, cols, true); }
  Vector vector(int64_t size) { return {make(1, size, false).data, false}; }
  float* floats(int64_t count) {
    float* data = static_cast<float*>(allocate(count * 4));
    for (int64_t i = 0; i < count; ++i) data[i] = NAN;
    return data;
  }

  void expect_finite(const char* what, const Matrix& m) {
    for (int64_t i = 0; i < m.rows; ++i) {
      for (int64_t j = 0; j < m.cols; ++j) expect(what, load(m, i * m.stride + j));
    }
  }
  void expect_finite(const char* what, const float* data, int64_t count) {
    for (int64_t i = 0; i < count; ++i) expect(what, data[i]);
  }

 private:
  Matrix make(int64_t rows, int64_t cols, bool out) {
    const int64_t size = dtype_ == DType::fp32 ? 4 : 2;
    int64_t stride = cols + 1;
    if (aligned_) stride = (cols * size + 15) / 16 * 16 / size;
    const int64_t count = rows == 0 ? 0 : (rows - 1) * stride + cols;  // ends with the last row
    const Matrix m{allocate(count * size), rows, cols, stride};
    for (int64_t i = 0; i < count; ++i) {
      const bool gap = i % stride >= cols;
      next_ = next_ * 1664525u + 1013904223u;
      store(m, i, out || gap ? NAN : static_cast<float>(next_ >> 24) / 256.0f - 0.5f);
    }
    return m;
  }
  void* allocate(int64_t bytes) {
    held_.emplace_back(std::malloc(static_cast<size_t>(bytes)), std::free);
    return held_.back().get();
  }
  float load(const Matrix& m, int64_t i) const {
    if (dtype_ == DType::fp32) return static_cast<float*>(m.data)[i];
    const uint16_t bits = static_cast<uint16_t*>(m.data)[i];
    return dtype_ == DType::fp16 ? __half2float(__half{bits})
                                 : __bfloat162float(__nv_bfloat16{bits});
  }
  void store(const Matrix& m, int64_t i, float x) const {
    if (dtype_ == DType::fp32) {
      static_cast<float*>(m.data)[i] = x;
    } else {
      static_cast<uint16_t*>(m.data)[i] =
          dtype_ == DType::fp16 ? __float2half_rn(x).bits : __float2bfloat16_rn(x).bits;
    }
  }
  static void expect(const char* what, float x) {
    if (!std::isfinite(x)) {
      std::fprintf(stderr, "%s: not written, or not finite\n", what);
      std::exit(1);
    }
  }

  DType dtype_;
  bool aligned_;  // rows start at multiples of 16 bytes
  uint32_t next_ = 1;
  std::vector<std::unique_ptr<void, void (*)(void*)>> held_;
};

}  // namespace a3fta::cuda
