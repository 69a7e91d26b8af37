// What a block of the adapter's forward does in one pass over h, for 16-bit types:
//
//     a = h @ w_down.T + b_down;  z = scale * (act(a) * (1 + gamma) + beta)
//     y = h + z @ w_up.T + scale * b_up
//
// It owns `block_m` rows. All of its h is asked for at once and stays in shared memory; the
// first product follows the copies, chunk by chunk. Its sums are split over the warps both by rows
// and by columns of h; act is applied where they meet. The second product adds to h in place, one
// chunk of columns at a time, and what is finished leaves in 16-byte vectors. So h is read once and
// y written once; w_down and w_up come from the L2 cache, once per block.
//
// Shared memory: h (block_m, C), and three buffers: two for the weights in flight; the third too
// in the first product, for z in the second. Between the two, the first two hold sums.
#pragma once

#include "adapter_plan.h"
#include "bottleneck.cuh"
#include "rows.cuh"

namespace a3fta::cuda {

template <typename T>
struct RowsTask {
  View<T> h, w_down, w_up;
  Vector b_down, b_up;
  Bottleneck<T> middle;
  T* a;  // out; may be null
  T* y;
  int64_t y_stride;
  int block_m;
};

// rows x COLS of `src` from (row0, col0) on into a tile, of which only `cols` columns are there;
// zeros beyond the edges of src
template <int COLS, typename T>
__device__ __forceinline__ void load_tile(T* tile, int stride, const View<T>& src, int64_t row0,
                                          int64_t col0, int rows, int cols = COLS) {
  constexpr int kPerRow = COLS / 8;
  for (int i = threadIdx.x; i < rows * kPerRow; i += kRowThreads) {
    const int col = i % kPerRow * 8;
    if (col >= cols) continue;
    load_vector(tile + i / kPerRow * stride + col, src, row0 + i / kPerRow, col0 + col);
  }
}

template <typename T, int RANK>
__device__ __forceinline__ void adapter_rows(const RowsTask<T>& p, int64_t row0, float scale) {
  constexpr int kChunk = rows_chunk(RANK);
  constexpr int kBuffer = rows_buffer(RANK);
  constexpr int kDownStride = kChunk + 8;
  constexpr int kUpStride = RANK + 8;
  constexpr int kTilesR = RANK / 8;

  const int64_t channels = p.h.cols;
  const int h_stride = static_cast<int>(padded_stride(channels));
  T* const h = reinterpret_cast<T*>(shared_memory());
  T* const buffers = h + p.block_m * h_stride;
  float* const sums = reinterpret_cast<float*>(buffers);  // between the products
  T* const z = buffers + 2 * kBuffer;                     // from then on

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  // warps_m x groups warps: 16 rows each; a share of the columns each
  const int warps_m = p.block_m / 16;
  const int groups = kRowWarps / warps_m;
  const int group = warp / warps_m;
  const int m0 = warp % warps_m * 16;
  const int chunks = static_cast<int>(ceil_div(channels, kChunk));
  const int padded = h_stride - 8;

  const auto load_h = [&](int chunk) {
    load_tile<kChunk>(h + chunk * kChunk, h_stride, p.h, row0,
                      static_cast<int64_t>(chunk) * kChunk, p.block_m, padded - chunk * kChunk);
  };
  const auto load_down = [&](int chunk) {
    load_tile<kChunk>(buffers + chunk % 3 * kBuffer, kDownStride, p.w_down, 0,
                      static_cast<int64_t>(chunk) * kChunk, RANK);
  };
  const auto load_up = [&](int chunk) {
    load_tile<RANK>(buffers + chunk % 2 * kBuffer, kUpStride, p.w_up,
                    static_cast<int64_t>(chunk) * kChunk, 0, kChunk);
  };

  // the first two chunks each in a group of their own, the rest of h in a third
  for (int chunk = 0; chunk < chunks; ++chunk) {
    load_h(chunk);
    if (chunk < 2) {
      load_down(chunk);
      __pipeline_commit();
    }
  }
  if (chunks == 1) __pipeline_commit();
  __pipeline_commit();

  float acc[kTilesR][4] = {};
  for (int chunk = 0; chunk < chunks; ++chunk) {
    // of the groups so far, 3 + chunk, the first `chunk + 1` hold what the first two steps need;
    // w_down's later chunks are one group further
    if (chunk < 2) {
      __pipeline_wait_prior(2);
    } else {
      __pipeline_wait_prior(1);
    }
    __syncthreads();  // the chunk is here, and the buffer of the last one free
    if (chunk + 2 < chunks) load_down(chunk + 2);
    __pipeline_commit();
    const T* right = buffers + chunk % 3 * kBuffer;
    for (int k = group * 16; k < kChunk && chunk * kChunk + k < padded; k += groups * 16) {
      uint32_t left[4];
      load_left(left, h + m0 * h_stride + chunk * kChunk + k, h_stride);
#pragma unroll
      for (int j = 0; j < kTilesR; j += 2) {
        uint32_t b[4];
        load_right(b, right + j * 8 * kDownStride + k, kDownStride);
        mma<T>(acc[j], left, b[0], b[1]);
        mma<T>(acc[j + 1], left, b[2], b[3]);
      }
    }
  }
  __pipeline_wait_prior(0);
  __syncthreads();

  // the groups' sums meet, half of the groups handing over at a time
  for (int half = groups / 2; half > 0; half /= 2) {
    float* const handed = sums + (group % half * warps_m + warp % warps_m) * (RANK / 2) * 32 + lane;
    if (group >= half && group < 2 * half) {
#pragma unroll
      for (int i = 0; i < RANK / 2; ++i) handed[i * 32] = acc[i / 4][i % 4];
    }
    __syncthreads();
    if (group < half) {
#pragma unroll
      for (int i = 0; i < RANK / 2; ++i) acc[i / 4][i % 4] += handed[i * 32];
    }
    __syncthreads();
  }
  constexpr int kSumStride = RANK + 4;
  if (group == 0) {
#pragma unroll
    for (int i = 0; i < RANK / 2; ++i) {
      const int row = m0 + lane / 4 + i % 4 / 2 * 8;
      sums[row * kSumStride + i / 4 * 8 + lane % 4 * 2 + i % 2] = acc[i / 4][i % 4];
    }
  }
  __syncthreads();

  const int64_t rank = p.middle.rank;
  for (int i = threadIdx.x; i < p.block_m * kTilesR; i += kRowThreads) {
    const int row = i / kTilesR;
    const int r0 = i % kTilesR * 8;
    const int64_t m = row0 + row;
    Pack<T, 8> a, out;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int r = r0 + e;
      a.values[e] = out.values[e] = from_float<T>(0.0f);
      if (m < p.h.rows && r < rank) {
        float sum = sums[row * kSumStride + r];
        if (p.b_down.data != nullptr) sum += at<T>(p.b_down, r);
        a.values[e] = from_float<T>(sum);  // as the backward will see it
        out.values[e] = from_float<T>(scale * p.middle.z(to_float(a.values[e]), m, r));
      }
    }
    *reinterpret_cast<Pack<T, 8>*>(z + row * kUpStride + r0) = out;
    if (m < p.h.rows && p.a != nullptr) {
      if (rank % 8 == 0) {
        if (r0 < rank) store16(p.a + m * rank + r0, &a);
      } else {
        for (int e = 0; e < 8 && r0 + e < rank; ++e) p.a[m * rank + r0 + e] = a.values[e];
      }
    }
  }
  __syncthreads();  // z is written, the sums are read

  const auto store_y = [&](int chunk) {
    constexpr int kPerRow = kChunk / 8;
    for (int i = threadIdx.x; i < p.block_m * kPerRow; i += kRowThreads) {
      const int row = i / kPerRow;
      const int col = chunk * kChunk + i % kPerRow * 8;
      if (row0 + row < p.h.rows && col < channels) {
        store16(p.y + (row0 + row) * p.y_stride + col, h + row * h_stride + col);
      }
    }
  };
  uint32_t left[RANK / 16][4];
#pragma unroll
  for (int k = 0; k < RANK / 16; ++k) load_left(left[k], z + m0 * kUpStride + k * 16, kUpStride);
  load_up(0);
  __pipeline_commit();
  for (int chunk = 0; chunk < chunks; ++chunk) {
    __pipeline_wait_prior(0);
    __syncthreads();  // the chunk is here, the last one's y is written to h
    if (chunk + 1 < chunks) load_up(chunk + 1);
    __pipeline_commit();
    if (chunk > 0) store_y(chunk - 1);
    const T* right = buffers + chunk % 2 * kBuffer;
    for (int n = group * 16; n < kChunk && chunk * kChunk + n < channels; n += groups * 16) {
      float out[2][4] = {};
#pragma unroll
      for (int k = 0; k < RANK / 16; ++k) {
        uint32_t b[4];
        load_right(b, right + n * kUpStride + k * 16, kUpStride);
        mma<T>(out[0], left[k], b[0], b[1]);
        mma<T>(out[1], left[k], b[2], b[3]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // a tile's second half may lie in the padding of h, which is zero there
        const int row = m0 + lane / 4 + i % 2 * 8;
        const int col = chunk * kChunk + n + i / 2 * 8 + lane % 4 * 2;
        float b0 = 0.0f;
        float b1 = 0.0f;
        if (p.b_up.data != nullptr && col < channels) {
          b0 = scale * at<T>(p.b_up, col);
          b1 = scale * at<T>(p.b_up, col + 1);
        }
        const float* sum = &out[i / 2][i % 2 * 2];
        add_pair(h + row * h_stride + col, sum[0] + b0, sum[1] + b1);
      }
    }
  }
  __pipeline_wait_prior(0);
  __syncthreads();
  store_y(chunks - 1);
}

}  // namespace a3fta::cuda
