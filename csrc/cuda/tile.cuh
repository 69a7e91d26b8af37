// Building blocks of the matrix kernels: masked loads into shared memory, products of tiles, and
// the double-buffered loop over the reduction.
//
// Shared-memory discipline: every function here expects that no thread of the block still uses
// the tile memory it is given, and leaves it so.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <mma.h>

#include <cstdint>
#include <type_traits>

#include "launch.h"
#include "mma.cuh"

namespace a3fta::cuda {

constexpr int kThreads = 128;
constexpr int kBlockM = 64;

template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));  // elements in 16 bytes

template <typename T>
constexpr int kBlockK = 64 / static_cast<int>(sizeof(T));

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// A matrix as a kernel sees it. `vectors`: every row starts at a multiple of 16 bytes.
template <typename T>
struct View {
  const T* data;
  int64_t rows, cols, stride;
  bool vectors;

  __device__ View columns(int64_t begin, int64_t count) const {
    return {data + begin, rows, count, stride, vectors && begin % kVector<T> == 0};
  }
  // at most `count` columns; none beyond the last
  __device__ View slice(int64_t begin, int64_t count) const {
    const int64_t left = cols > begin ? cols - begin : 0;
    return columns(begin, left < count ? left : count);
  }
  __device__ View row_range(int64_t begin, int64_t count) const {
    return {data + begin * stride, count, cols, stride, vectors};
  }
};

template <typename T>
View<T> view(const Matrix& m) {
  const bool vectors = reinterpret_cast<uintptr_t>(m.data) % 16 == 0 &&
                       (m.rows <= 1 || m.stride % kVector<T> == 0);
  return {static_cast<const T*>(m.data), m.rows, m.cols, m.stride, vectors};
}

template <typename T>
__device__ __forceinline__ float at(const Vector& v, int64_t i) {
  return v.wide ? static_cast<const float*>(v.data)[i]
                : to_float(static_cast<const T*>(v.data)[i]);
}

// How an operand's tile lies in shared memory: [outer][k] or [k][outer], outer being M or N.
enum class Order { outer_k, k_outer };

template <typename T, Order ORDER, int OUTER>
struct Tile {
  static constexpr int kRows = ORDER == Order::outer_k ? OUTER : kBlockK<T>;
  static constexpr int kCols = ORDER == Order::outer_k ? kBlockK<T> : OUTER;
  static constexpr int kStride = kCols + kVector<T>;  // the padding spreads rows over the banks
  static constexpr int kSize = kRows * kStride;

  // The tile at `outer0` and step `step` of the reduction; zeros beyond the edges of `src`.
  // Whole aligned vectors are copied asynchronously: commit and wait before use.
  __device__ static __forceinline__ void load(T* tile, const View<T>& src, int64_t outer0,
                                              int64_t step) {
    constexpr int kPerRow = kCols / kVector<T>;
    const int64_t row0 = ORDER == Order::outer_k ? outer0 : step * kBlockK<T>;
    const int64_t col0 = ORDER == Order::outer_k ? step * kBlockK<T> : outer0;
    for (int i = threadIdx.x; i < kRows * kPerRow; i += kThreads) {
      const int64_t row = row0 + i / kPerRow;
      const int64_t col = col0 + i % kPerRow * kVector<T>;
      T* to = tile + i / kPerRow * kStride + i % kPerRow * kVector<T>;
      const int64_t left = row < src.rows ? src.cols - col : 0;
      const T* from = src.data + row * src.stride + col;
      if (src.vectors && left >= kVector<T>) {
        __pipeline_memcpy_async(to, from, 16);
      } else {
#pragma unroll
        for (int e = 0; e < kVector<T>; ++e) to[e] = e < left ? from[e] : from_float<T>(0.0f);
      }
    }
  }
};

// A kBlockM x N block of fp32 sums, spread over the 128 threads. The 16-bit types use the tensor
// cores: 2 x 2 warps of 32 x N/2 each.
template <typename T, int N>
struct Accumulator {
  using Fragment = nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float>;
  Fragment part[2][N / 32];

  __device__ __forceinline__ void zero() {
#pragma unroll
    for (auto& row : part) {
#pragma unroll
      for (auto& p : row) nvcuda::wmma::fill_fragment(p, 0.0f);
    }
  }

  // += A B over one kBlockK step; `a` and `b` are tiles in shared memory
  template <Order A, Order B>
  __device__ __forceinline__ void multiply(const T* a, int a_stride, const T* b, int b_stride) {
    using namespace nvcuda;
    using RowMajor = wmma::row_major;
    using ColMajor = wmma::col_major;
    using LayoutA = std::conditional_t<A == Order::outer_k, RowMajor, ColMajor>;
    using LayoutB = std::conditional_t<B == Order::outer_k, ColMajor, RowMajor>;
    const int m0 = threadIdx.x / 64 * 32;
    const int n0 = threadIdx.x / 32 % 2 * (N / 2);
#pragma unroll
    for (int k = 0; k < kBlockK<T>; k += 16) {
      wmma::fragment<wmma::matrix_a, 16, 16, 16, T, LayoutA> left[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int m = m0 + 16 * i;
        wmma::load_matrix_sync(
            left[i], a + (A == Order::outer_k ? m * a_stride + k : k * a_stride + m), a_stride);
      }
#pragma unroll
      for (int j = 0; j < N / 32; ++j) {
        const int n = n0 + 16 * j;
        wmma::fragment<wmma::matrix_b, 16, 16, 16, T, LayoutB> right;
        wmma::load_matrix_sync(
            right, b + (B == Order::outer_k ? n * b_stride + k : k * b_stride + n), b_stride);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          wmma::mma_sync(part[i][j], left[i], right, part[i][j]);
        }
      }
    }
  }

  __device__ __forceinline__ void store(float* stage, int stride) const {
    const int m0 = threadIdx.x / 64 * 32;
    const int n0 = threadIdx.x / 32 % 2 * (N / 2);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < N / 32; ++j) {
        nvcuda::wmma::store_matrix_sync(stage + (m0 + 16 * i) * stride + n0 + 16 * j, part[i][j],
                                        stride, nvcuda::wmma::mem_row_major);
      }
    }
  }
};

// fp32: plain fused multiply-adds, 8 x N/16 sums per thread, rows and columns interleaved.
template <int N>
struct Accumulator<float, N> {
  float part[8][N / 16];

  __device__ __forceinline__ void zero() {
#pragma unroll
    for (auto& row : part) {
#pragma unroll
      for (float& p : row) p = 0.0f;
    }
  }

  template <Order A, Order B>
  __device__ __forceinline__ void multiply(const float* a, int a_stride, const float* b,
                                           int b_stride) {
    const int m0 = threadIdx.x / 16;
    const int n0 = threadIdx.x % 16;
#pragma unroll 4
    for (int k = 0; k < kBlockK<float>; ++k) {
      float left[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int m = m0 + 8 * i;
        left[i] = a[A == Order::outer_k ? m * a_stride + k : k * a_stride + m];
      }
#pragma unroll
      for (int j = 0; j < N / 16; ++j) {
        const int n = n0 + 16 * j;
        const float right = b[B == Order::outer_k ? n * b_stride + k : k * b_stride + n];
#pragma unroll
        for (int i = 0; i < 8; ++i) part[i][j] += left[i] * right;
      }
    }
  }

  __device__ __forceinline__ void store(float* stage, int stride) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int j = 0; j < N / 16; ++j) {
        stage[(threadIdx.x / 16 + 8 * i) * stride + threadIdx.x % 16 + 16 * j] = part[i][j];
      }
    }
  }
};

// fp32 block in shared memory between an accumulator and its element-wise epilogue
template <int N>
constexpr int kStageStride = N + 4;

template <int N>
constexpr int64_t kStageBytes = kBlockM * kStageStride<N> * 4;

// for each step: load(step, buffer), then use(step, buffer), with one load in flight.
//
// The barrier of step i comes after every thread's wait for its copies of step i, so use(i) sees
// the whole tile; and after every thread's use(i - 1), so load(i + 1) may overwrite that buffer.
template <typename Load, typename Use>
__device__ __forceinline__ void pipeline(int64_t steps, Load load, Use use) {
  if (steps > 0) {
    load(int64_t{0}, 0);
    __pipeline_commit();
  }
#pragma unroll 1
  for (int64_t i = 0; i < steps; ++i) {
    __pipeline_wait_prior(0);
    __syncthreads();
    if (i + 1 < steps) {
      load(i + 1, static_cast<int>((i + 1) & 1));
      __pipeline_commit();
    }
    use(i, static_cast<int>(i & 1));
  }
  __syncthreads();
}

// acc += a[a0 : a0 + kBlockM] @ B[:, b0 : b0 + N], where b holds B.T (outer_k) or B (k_outer).
// `tiles` has room for two buffers of both tiles.
template <Order B, int N, typename T>
__device__ __forceinline__ void multiply(Accumulator<T, N>& acc, const View<T>& a, int64_t a0,
                                         const View<T>& b, int64_t b0, T* tiles) {
  using TileA = Tile<T, Order::outer_k, kBlockM>;
  using TileB = Tile<T, B, N>;
  constexpr int kBuffer = TileA::kSize + TileB::kSize;
  pipeline(
      ceil_div(a.cols, kBlockK<T>),
      [&](int64_t step, int buffer) {
        TileA::load(tiles + buffer * kBuffer, a, a0, step);
        TileB::load(tiles + buffer * kBuffer + TileA::kSize, b, b0, step);
      },
      [&](int64_t, int buffer) {
        const T* tile = tiles + buffer * kBuffer;
        acc.template multiply<Order::outer_k, B>(tile, TileA::kStride, tile + TileA::kSize,
                                                 TileB::kStride);
      });
}

// The same with the left operand already in shared memory: `depth` columns, zero up to the next
// multiple of kBlockK. A barrier must lie between its last write and this call's first use: the
// one at the first step of the pipeline serves.
template <Order B, int N, typename T>
__device__ __forceinline__ void multiply_resident(Accumulator<T, N>& acc, const T* a, int a_stride,
                                                  int64_t depth, const View<T>& b, int64_t b0,
                                                  T* tiles) {
  using TileB = Tile<T, B, N>;
  pipeline(
      ceil_div(depth, kBlockK<T>),
      [&](int64_t step, int buffer) {
        TileB::load(tiles + buffer * TileB::kSize, b, b0, step);
      },
      [&](int64_t step, int buffer) {
        acc.template multiply<Order::outer_k, B>(a + step * kBlockK<T>, a_stride,
                                                 tiles + buffer * TileB::kSize, TileB::kStride);
      });
}

// y[row0.., n0..n_end) = acc + factor * bias + residual, rounded once. `stage` may share the memory
// of the tiles: on entry no thread still uses it, on return none does.
template <int N, typename T>
__device__ __forceinline__ void store_block(const Accumulator<T, N>& acc, float* stage,
                                            int64_t row0, int64_t rows, int64_t n0, int64_t n_end,
                                            const Vector& bias, const View<T>& residual, T* y,
                                            int64_t y_stride, float factor = 1.0f) {
  acc.store(stage, kStageStride<N>);
  __syncthreads();
  for (int i = threadIdx.x; i < kBlockM * N; i += kThreads) {
    const int row = i / N;
    const int64_t m = row0 + row;
    const int64_t n = n0 + i % N;
    if (m < rows && n < n_end) {
      float value = stage[row * kStageStride<N> + i % N];
      if (bias.data != nullptr) value += factor * at<T>(bias, n);
      if (residual.data != nullptr) value += to_float(residual.data[m * residual.stride + n]);
      y[m * y_stride + n] = from_float<T>(value);
    }
  }
  __syncthreads();
}

template <Order B, int N, typename T>
constexpr int64_t kTileBytes = 2 * static_cast<int64_t>(sizeof(T)) *
                               (Tile<T, Order::outer_k, kBlockM>::kSize + Tile<T, B, N>::kSize);

// Calls f with a null pointer of the kernel's element type.
template <typename F>
void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::fp32:
      return f(static_cast<float*>(nullptr));
    case DType::fp16:
      return f(static_cast<__half*>(nullptr));
    case DType::bf16:
      return f(static_cast<__nv_bfloat16*>(nullptr));
  }
}

// The same for kernels of 16-bit types alone.
template <typename F>
void with_half_type(DType dtype, F f) {
  dtype == DType::fp16 ? f(static_cast<__half*>(nullptr))
                       : f(static_cast<__nv_bfloat16*>(nullptr));
}

}  // namespace a3fta::cuda
