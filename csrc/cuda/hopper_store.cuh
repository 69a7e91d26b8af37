// What happens to the sums of a Hopper product: the bottleneck's middle, and the store. Which rows
// and columns a thread holds stands at Wgmma. Ranks and columns are multiples of 8.
#pragma once

#include "bottleneck.cuh"
#include "hopper.cuh"

namespace a3fta::cuda {

template <typename T>
struct Output {
  Vector bias;
  const T* residual;  // may be null
  int64_t residual_stride;
  T* y;
  int64_t y_stride;
};

struct Pair {
  float first, second;
};

struct alignas(16) Vector16 {
  uint32_t x[4];
};

__device__ __forceinline__ int held_row() {
  return static_cast<int>(threadIdx.x) % 128 / 32 * 16 + static_cast<int>(threadIdx.x) % 32 / 4;
}
__device__ __forceinline__ int held_column() { return static_cast<int>(threadIdx.x) % 4 * 2; }

template <typename T>
__device__ __forceinline__ Pair unpack(uint32_t pair) {
  const T* two = reinterpret_cast<const T*>(&pair);
  return {to_float(two[0]), to_float(two[1])};
}

// elements i and i + 1, i even; the vector is 16-byte aligned
template <typename T>
__device__ __forceinline__ Pair pair_at(const Vector& v, int64_t i) {
  if (v.wide) {
    struct alignas(8) Wide {
      float x[2];
    };
    const Wide two = reinterpret_cast<const Wide*>(v.data)[i / 2];
    return {two.x[0], two.x[1]};
  }
  return unpack<T>(static_cast<const uint32_t*>(v.data)[i / 2]);
}

// `down`, sums of h @ w_down.T, to a and to z, the left operand of RANK / 16 products. Columns
// beyond the rank are zero. a is stored by the tiles that are told to.
template <int RANK, typename T>
__device__ __forceinline__ void make_z(const float* down, int64_t row0, int64_t rows, bool store,
                                       const Vector& b_down, const Bottleneck<T>& middle, T* a_out,
                                       uint32_t (&z)[RANK / 16][4]) {
  const int rank = static_cast<int>(middle.rank);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t m = row0 + held_row() + 8 * half;
    // rows beyond the last compute on zeros and are not stored
    const int64_t sample = (m < rows ? m : rows - 1) / middle.rows_per_sample;
    const T* gamma = middle.gamma == nullptr ? nullptr : middle.gamma + sample * rank;
    const T* beta = middle.beta == nullptr ? nullptr : middle.beta + sample * rank;
#pragma unroll
    for (int j = 0; j < RANK / 8; ++j) {
      uint32_t both = 0;
      if (8 * j < rank) {
        const int r = 8 * j + held_column();
        Pair sum{down[4 * j + 2 * half], down[4 * j + 2 * half + 1]};
        if (b_down.data != nullptr) {
          const Pair b = pair_at<T>(b_down, r);
          sum = {sum.first + b.first, sum.second + b.second};
        }
        const uint32_t rounded = pack<T>(sum.first, sum.second);  // as the backward will see it
        if (store && m < rows) *reinterpret_cast<uint32_t*>(a_out + m * rank + r) = rounded;
        const Pair a = unpack<T>(rounded);
        Pair x{scalar::activate(a.first, middle.activation),
               scalar::activate(a.second, middle.activation)};
        if (gamma != nullptr) {
          const Pair g = unpack<T>(*reinterpret_cast<const uint32_t*>(gamma + r));
          x = {x.first * (1.0f + g.first), x.second * (1.0f + g.second)};
        }
        if (beta != nullptr) {
          const Pair b = unpack<T>(*reinterpret_cast<const uint32_t*>(beta + r));
          x = {x.first + b.first, x.second + b.second};
        }
        both = pack<T>(x.first, x.second);
      }
      z[j / 2][j % 2 * 2 + half] = both;
    }
  }
}

// Of four neighbouring threads t, x[i] of thread t goes to x[t] of thread i.
__device__ __forceinline__ void transpose_quad(uint32_t (&x)[4]) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = threadIdx.x & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const uint32_t received = shuffle_xor(upper ? x[i] : x[i + bit], bit);
      x[i] = upper ? received : x[i];
      x[i + bit] = upper ? x[i + bit] : received;
    }
  }
}

// y = sums + bias + residual for 64 rows from row0 and columns n0 .. n_end, rounded once. A
// thread's pairs of four blocks of 8 columns become one vector of 8, and back.
template <int BLOCK_N, typename T, int SUMS>
__device__ __forceinline__ void store_sums(float (&sums)[SUMS], int64_t row0, int64_t rows,
                                           int64_t n0, int64_t n_end, const Output<T>& out) {
#pragma unroll
  for (int j = 0; j < BLOCK_N; j += 32) {
    Pair bias[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t n = n0 + j + 8 * i + held_column();
      bias[i] = {0.0f, 0.0f};
      if (out.bias.data != nullptr && n < n_end) bias[i] = pair_at<T>(out.bias, n);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t m = row0 + held_row() + 8 * half;
      const int64_t n = n0 + j + 4 * held_column();
      const bool inside = m < rows && n < n_end;
      Vector16 packed{};
      if (out.residual != nullptr) {
        if (inside) {
          packed = *reinterpret_cast<const Vector16*>(out.residual + m * out.residual_stride + n);
        }
        transpose_quad(packed.x);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* sum = &sums[j / 2 + 4 * i + 2 * half];
        const Pair residual = unpack<T>(packed.x[i]);
        packed.x[i] = pack<T>(sum[0] + bias[i].first + residual.first,
                              sum[1] + bias[i].second + residual.second);
      }
      transpose_quad(packed.x);
      if (inside) *reinterpret_cast<Vector16*>(out.y + m * out.y_stride + n) = packed;
    }
  }
}

}  // namespace a3fta::cuda
