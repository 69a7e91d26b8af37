// The element-wise middle of the adapter, forward and backward, and where its results go.
#pragma once

#include "../math.h"
#include "tile.cuh"

namespace a3fta::cuda {

// One chunk of the rank: the bottleneck is computed for kBlockM rows and kRankChunk ranks at a
// time, so that any rank runs in the same registers.
constexpr int kRankChunk = 64;

// z = act(a) * (1 + gamma) + beta and its derivative, for row m and rank r
template <typename T>
struct Bottleneck {
  const T* gamma;
  const T* beta;
  int64_t rows_per_sample;
  int64_t rank;
  int activation;

  __device__ __forceinline__ float modulated(float x, int64_t m, int64_t r) const {
    return gamma == nullptr ? x
                            : x * (1.0f + to_float(gamma[m / rows_per_sample * rank + r]));
  }
  __device__ __forceinline__ float z(float a, int64_t m, int64_t r) const {
    const float z = modulated(scalar::activate(a, activation), m, r);
    return beta == nullptr ? z : z + to_float(beta[m / rows_per_sample * rank + r]);
  }
  __device__ __forceinline__ float da(float dz, float a, int64_t m, int64_t r) const {
    return scalar::activate_backward(modulated(dz, m, r), a, activation);
  }
};

template <typename T>
Bottleneck<T> bottleneck(const Modulation& modulation, int64_t rank, int activation) {
  return {static_cast<const T*>(modulation.gamma), static_cast<const T*>(modulation.beta),
          modulation.rows_per_sample, rank, activation};
}

// Row stride and bytes of the (kBlockM, rank) block that stays in shared memory between the two
// products; its columns beyond the rank are zero.
template <typename T>
__host__ __device__ constexpr int64_t middle_stride(int64_t rank) {
  return ceil_div(rank, kRankChunk) * kRankChunk + kVector<T>;
}

template <typename T>
__host__ __device__ constexpr int64_t middle_bytes(int64_t rank) {
  return kBlockM * middle_stride<T>(rank) * static_cast<int64_t>(sizeof(T));
}

// f(row, rank column, sum) for each element of a staged block of kBlockM rows; returns what goes
// into the resident block, which may be null. Elements outside (rows, rank) become zero.
template <typename T, typename F>
__device__ __forceinline__ void for_middle(const float* stage, int64_t row0, int64_t rows,
                                           int64_t chunk, int64_t rank, T* middle, F f) {
  for (int i = threadIdx.x; i < kBlockM * kRankChunk; i += kThreads) {
    const int row = i / kRankChunk;
    const int64_t r = chunk * kRankChunk + i % kRankChunk;
    T value = from_float<T>(0.0f);
    if (row0 + row < rows && r < rank) {
      value = f(row0 + row, r, stage[row * kStageStride<kRankChunk> + i % kRankChunk]);
    }
    if (middle != nullptr) middle[row * middle_stride<T>(rank) + r] = value;
  }
}

}  // namespace a3fta::cuda
