// What the kernels of group_norm are given, and a run of one group where it is contiguous.
#pragma once

#include "norm.cuh"

namespace a3fta::cuda {

template <typename T>
struct GroupParams {
  const T* x;
  const T* dy;
  T* out;
  Vector weight, bias;
  float* mean;
  float* rstd;
  float* parts;    // (2, B, P, entries): mean and squared differences, or sums of g and g * xhat
  float* mean_g;   // (B, G)
  float* mean_gx;  // (B, G)
  int64_t samples, channels, positions, groups;
  int64_t width;    // channels of a group
  int64_t count;    // P
  int64_t length;   // of a part: elements of a run, or positions
  int64_t entries;  // of a part of a sample: G, or with channels last C
  int columns;      // packs of a row that a block takes, with channels last
  int blocks_c;     // blocks to a row
  int activation;
  float eps;

  __device__ int64_t second() const { return samples * count * entries; }
};

struct Pair {
  float first, second;
};

// Contiguous: elements begin .. end of one group's run.
template <typename T, int N>
struct Run {
  const GroupParams<T>& p;
  int64_t group;  // of all samples
  int64_t begin, end;

  __device__ int64_t at(int64_t i) const { return group * p.width * p.positions + i; }
  __device__ int64_t channel(int64_t i) const {
    const int64_t inside = i <= INT32_MAX && p.positions <= INT32_MAX
                               ? static_cast<uint32_t>(i) / static_cast<uint32_t>(p.positions)
                               : i / p.positions;
    return group % p.groups * p.width + inside;
  }

  // body(index, values of x) for this thread's packs
  template <typename F>
  __device__ void each(const F& body) const {
    for (int64_t i = begin + threadIdx.x * N; i < end; i += kNormThreads * N) {
      float x[N];
      load_pack(x, p.x + at(i));
      body(i, x);
    }
  }

  // body(index, xhat, g, rstd)
  template <typename F>
  __device__ void each_slope(const F& body) const {
    const float mean = p.mean[group], rstd = p.rstd[group];
    each([&](int64_t i, float(&x)[N]) {
      const float weight = parameter<T>(p.weight, channel(i), 1.0f);
      const float bias = parameter<T>(p.bias, channel(i), 0.0f);
      float g[N];
      load_pack(g, p.dy + at(i));
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const Slope s = slope(g[e], x[e], mean, rstd, weight, bias, p.activation);
        x[e] = s.xhat;
        g[e] = s.g;
      }
      body(i, x, g, rstd);
    });
  }

  // mean, and the squared differences from it
  __device__ Pair moments(float* shared) const {
    float sum = 0.0f;
    each([&](int64_t, float(&x)[N]) {
#pragma unroll
      for (int e = 0; e < N; ++e) sum += x[e];
    });
    const float mean = block_sum(sum, shared) / static_cast<float>(end - begin);
    // what the sum's roundings left of the mean comes with the squares
    float lack = 0.0f, squares = 0.0f;
    each([&](int64_t, float(&x)[N]) {
#pragma unroll
      for (int e = 0; e < N; ++e) {
        lack += x[e] - mean;
        squares += (x[e] - mean) * (x[e] - mean);
      }
    });
    lack = block_sum(lack, shared) / static_cast<float>(end - begin);
    return {mean + lack, block_sum(squares, shared)};
  }

  __device__ Pair sums(float* shared) const {
    float g_sum = 0.0f, gx_sum = 0.0f;
    each_slope([&](int64_t, float(&xhat)[N], float(&g)[N], float) {
#pragma unroll
      for (int e = 0; e < N; ++e) {
        g_sum += g[e];
        gx_sum += g[e] * xhat[e];
      }
    });
    const float first = block_sum(g_sum, shared);
    return {first, block_sum(gx_sum, shared)};
  }

  __device__ void apply(float mean, float rstd) const {
    each([&](int64_t i, float(&x)[N]) {
      const float weight = parameter<T>(p.weight, channel(i), 1.0f);
      const float bias = parameter<T>(p.bias, channel(i), 0.0f);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        x[e] = scalar::activate((x[e] - mean) * rstd * weight + bias, p.activation);
      }
      store_pack(p.out + at(i), x);
    });
  }

  __device__ void finish(float mean_g, float mean_gx) const {
    each_slope([&](int64_t i, float(&xhat)[N], float(&g)[N], float rstd) {
#pragma unroll
      for (int e = 0; e < N; ++e) g[e] = rstd * (g[e] - mean_g - xhat[e] * mean_gx);
      store_pack(p.out + at(i), g);
    });
  }
};

}  // namespace a3fta::cuda
