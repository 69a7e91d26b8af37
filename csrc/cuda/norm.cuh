// What the kernels of group_norm and layer_norm share: sums over warps and blocks in a fixed order,
// and the arithmetic of one element.
//
//     xhat = (x - mean) * rstd,  y = act(weight * xhat + bias)
//     g  = dy * act'(weight * xhat + bias) * weight
//     dx = rstd * (g - mean(g) - xhat * mean(g * xhat))
#pragma once

#include "../math.h"
#include "norm.h"
#include "packs.cuh"

namespace a3fta::cuda {

constexpr int kNormThreads = 256;
constexpr int kNormWarps = kNormThreads / 32;
constexpr int64_t kSumBytes = kNormWarps * 4;  // of shared memory, for block_sum

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}

// of all threads of the block; every thread must come, and gets the same bits
__device__ __forceinline__ float block_sum(float x, float* shared) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kNormWarps; ++warp) sum += shared[warp];
  __syncthreads();
  return sum;
}

// weight or bias of N channels from c on, where `whole` parameters start at multiples of 32 bytes
template <typename T, int N>
__device__ __forceinline__ void load_parameter(float (&to)[N], const Vector& v, int64_t c,
                                               float absent) {
  if (v.data == nullptr) {
#pragma unroll
    for (int e = 0; e < N; ++e) to[e] = absent;
  } else if (!v.wide) {
    load_pack(to, static_cast<const T*>(v.data) + c);
  } else {
    constexpr int kHalf = N > 4 ? 4 : N;  // 16 bytes at a time
    const float* from = static_cast<const float*>(v.data) + c;
#pragma unroll
    for (int i = 0; i < N; i += kHalf) {
      float half[kHalf];
      load_pack(half, from + i);
#pragma unroll
      for (int e = 0; e < kHalf; ++e) to[i + e] = half[e];
    }
  }
}

template <typename T>
__device__ __forceinline__ float parameter(const Vector& v, int64_t c, float absent) {
  return v.data == nullptr ? absent : at<T>(v, c);
}

struct Slope {
  float xhat, g;
};

__device__ __forceinline__ Slope slope(float dy, float x, float mean, float rstd, float weight,
                                       float bias, int activation) {
  const float xhat = (x - mean) * rstd;
  return {xhat, scalar::activate_backward(dy, xhat * weight + bias, activation) * weight};
}

__device__ __forceinline__ float rstd_of(float squares, float count, float eps) {
  return 1.0f / sqrtf(squares / count + eps);
}

inline bool whole(const Vector& v) { return v.data == nullptr || aligned(v.data, 32); }

}  // namespace a3fta::cuda
