// A cluster that walks over blocks of 64 rows: what adapter_cluster.cu and
// adapter_cluster_forward.cu share. Each block of the cluster owns a slice of the columns; only
// the rank ties the slices together, and the cluster closes that gap, for step i of the walk:
//
//     partial      each block multiplies its slice of x by its slice of a weight, in fp32, and
//                  sends every row to the block that owns it
//     middle       that block adds what all have sent, in their order, makes the middle of it (z,
//                  or da and z), and sends it, in 16 bits, to every block
//     products     each block goes on with the middle and its slice
//
// What is sent counts itself in a mailbox of the receiver, which is all that anyone waits for: no
// barrier of the cluster, no fence. It has room, too: a block sends partials of step i only after
// the middle of step i - 1 came from everyone, who has read its partials by then; and the middle
// of step i, kept in two buffers, cannot be made before every block is done with that of i - 2.
// While partials are on their way, the products of the step before run; while the middle comes
// back, the partial of the next step.
#pragma once

#include <map>
#include <mutex>
#include <tuple>

#include "adapter_plan.h"
#include "bottleneck.cuh"
#include "rows.cuh"

namespace a3fta::cuda {

#if defined(A3FTA_CLUSTERS)

template <typename T, int RANK>
struct Walk {
  // a thread makes kItems times four neighbours of the middle, at the same columns each time
  static constexpr int kItems = kClusterRows * RANK / 4 / kRowThreads;
  static constexpr int kMiddleStride = RANK + 8;
  static constexpr int kMiddle = kClusterRows * kMiddleStride;

  int64_t rows, cluster, clusters;
  int blocks, place, share, steps, middle_bytes;
  uint64_t* boxes;  // of partials, of middles
  float* inbox;     // (64, R): 64 / blocks rows from each block

  // `middles`: how many (64, R) tiles make a middle
  __device__ Walk(int64_t rows, int blocks, int middles)
      : rows(rows),
        cluster(blockIdx.x / blocks),
        clusters(gridDim.x / blocks),
        blocks(blocks),
        place(static_cast<int>(cluster_rank())),
        share(kClusterRows / blocks),
        middle_bytes(middles * kClusterRows * RANK * 2),
        boxes(reinterpret_cast<uint64_t*>(shared_memory())),
        inbox(reinterpret_cast<float*>(shared_memory() + kMailboxBytes)) {
    steps = static_cast<int>(ceil_div(ceil_div(rows, kClusterRows) - cluster, clusters));
    if (threadIdx.x == 0) {
      mailbox_set_up(boxes);
      mailbox_set_up(boxes + 1);
      mailbox_expect(boxes, kClusterRows * RANK * 4);
      mailbox_expect(boxes + 1, middle_bytes);
    }
    cluster_arrive();  // the caller waits before the first step: all mailboxes are there then
  }

  // behind the mailboxes and the inbox
  __device__ T* memory() const { return reinterpret_cast<T*>(inbox + kClusterRows * RANK); }

  __device__ int64_t row_of(int step) const { return (cluster + step * clusters) * kClusterRows; }

  __device__ void await_middle(int step) const {
    mailbox_wait(boxes + 1, step);
    if (step + 1 < steps && threadIdx.x == 0) mailbox_expect(boxes + 1, middle_bytes);
  }
  __device__ void await_partials(int step) const {
    mailbox_wait(boxes, step);
    if (step + 1 < steps && threadIdx.x == 0) mailbox_expect(boxes, kClusterRows * RANK * 4);
  }

  // the sums of multiply_slice
  __device__ void send_partials(const float (&sums)[RANK / 16][4]) const {
    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp % 4 * 16 + lane / 4 + half * 8;
      float* const to = inbox + (place * share + row % share) * RANK + warp / 4 * (RANK / 2) +
                        lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < RANK / 16; ++j) {
        send8(to + j * 8,
              {__float_as_uint(sums[j][2 * half]), __float_as_uint(sums[j][2 * half + 1])}, boxes,
              row / share);
      }
    }
  }

  // f(j, row, r) for the four elements from (row, r) on that this thread makes, j = 0, 1, ...
  template <typename F>
  __device__ __forceinline__ void for_items(F f) const {
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const int row = (threadIdx.x + j * kRowThreads) / (RANK / 4);
      if (row < share) f(j, place * share + row, static_cast<int>(threadIdx.x) % (RANK / 4) * 4);
    }
  }

  __device__ Pack<float, 4> add_partials(int row, int r) const {
    Pack<float, 4> sum{};
    for (int block = 0; block < blocks; ++block) {
      const auto part = *reinterpret_cast<const Pack<float, 4>*>(
          inbox + (block * share + row % share) * RANK + r);
#pragma unroll
      for (int e = 0; e < 4; ++e) sum.values[e] += part.values[e];
    }
    return sum;
  }

  __device__ void send_middle(T* tile, int row, int r, const Pack<T, 4>& values) const {
    for (int block = 0; block < blocks; ++block) {
      send8(tile + row * kMiddleStride + r, words(values), boxes + 1, block);
    }
  }
};

// `rows` x `cols` (at most 256) of `src` from row0 on into a tile: a warp takes a row
template <typename T>
__device__ __forceinline__ void load_slice(T* tile, int stride, const View<T>& src, int64_t row0,
                                           int rows, int cols) {
  const int col = threadIdx.x % 32 * 8;
  if (col >= cols) return;
  for (int row = threadIdx.x / 32; row < rows; row += kRowWarps) {
    load_vector(tile + row * stride + col, src, row0 + row, col);
  }
}

// and back: the first `cols` columns of a tile of 64 rows, to rows below `rows`
template <typename T>
__device__ __forceinline__ void store_slice(T* to, int64_t to_stride, int64_t row0, int64_t rows,
                                            const T* tile, int stride, int64_t cols) {
  const int col = threadIdx.x % 32 * 8;
  if (col >= cols) return;
  for (int row = threadIdx.x / 32; row < kClusterRows && row0 + row < rows; row += kRowWarps) {
    store16(to + (row0 + row) * to_stride + col, tile + row * stride + col);
  }
}

// Four elements from column r on of a row of `rank`; only those that are there.
template <typename T>
__device__ __forceinline__ Pack<T, 4> load_four(const T* row, int r, int64_t rank, bool aligned) {
  Pack<T, 4> found{};
  if (aligned && rank % 4 == 0) {
    if (r < rank) found = *reinterpret_cast<const Pack<T, 4>*>(row + r);
  } else {
    for (int e = 0; e < 4 && r + e < rank; ++e) found.values[e] = row[r + e];
  }
  return found;
}
template <typename T>
__device__ __forceinline__ void store_four(T* row, int r, int64_t rank, const Pack<T, 4>& found) {
  if (rank % 4 == 0) {
    if (r < rank) *reinterpret_cast<Pack<T, 4>*>(row + r) = found;
  } else {
    for (int e = 0; e < 4 && r + e < rank; ++e) row[r + e] = found.values[e];
  }
}

// sums += left (64, width) @ right, which lies as (R, width) or (width, R): 16 rows and half of
// the rank for each of the eight warps.
template <Order ORDER, int RANK, typename T>
__device__ __forceinline__ void multiply_slice(float (&sums)[RANK / 16][4], const T* left,
                                               int left_stride, const T* right, int right_stride,
                                               int width) {
  constexpr int kHalf = RANK / 2;
  const int warp = threadIdx.x / 32;
  const int r0 = kHalf >= 16 ? warp / 4 * kHalf : 0;
#pragma unroll 2
  for (int k = 0; k < width; k += 16) {
    uint32_t a[4];
    load_left(a, left + warp % 4 * 16 * left_stride + k, left_stride);
#pragma unroll
    for (int r = 0; r < (kHalf >= 16 ? kHalf : 16); r += 16) {
      uint32_t b[4];
      if constexpr (ORDER == Order::outer_k) {
        load_right(b, right + (r0 + r) * right_stride + k, right_stride);
      } else {
        load_right_trans(b, right + k * right_stride + r0 + r, right_stride);
      }
      if constexpr (kHalf >= 16) {
        mma<T>(sums[r / 8], a, b[0], b[1]);
        mma<T>(sums[r / 8 + 1], a, b[2], b[3]);
      } else {
        mma<T>(sums[0], a, warp < 4 ? b[0] : b[2], warp < 4 ? b[1] : b[3]);
      }
    }
  }
}

// tile (64, width) += middle (64, R) @ right + bias(column), where right lies as (width, R) or
// (R, width).
template <Order ORDER, int RANK, typename T, typename F>
__device__ __forceinline__ void add_product(T* tile, int stride, int width, const T* middle,
                                            const T* right, int right_stride, F bias) {
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int m0 = warp % 4 * 16;
  uint32_t left[RANK / 16][4];
#pragma unroll
  for (int k = 0; k < RANK / 16; ++k) {
    load_left(left[k], middle + m0 * (RANK + 8) + k * 16, RANK + 8);
  }
#pragma unroll 1
  for (int n = warp / 4 * 16; n < width; n += 32) {
    float out[2][4] = {};
#pragma unroll
    for (int k = 0; k < RANK / 16; ++k) {
      uint32_t b[4];
      if constexpr (ORDER == Order::outer_k) {
        load_right(b, right + n * right_stride + k * 16, right_stride);
      } else {
        load_right_trans(b, right + k * 16 * right_stride + n, right_stride);
      }
      mma<T>(out[0], left[k], b[0], b[1]);
      mma<T>(out[1], left[k], b[2], b[3]);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int col = n + e / 2 * 8 + lane % 4 * 2;
      const float* sum = &out[e / 2][e % 2 * 2];
      add_pair(tile + (m0 + lane / 4 + e % 2 * 8) * stride + col, sum[0] + bias(col),
               sum[1] + bias(col + 1));
    }
  }
}

#endif  // A3FTA_CLUSTERS

inline Grid cluster_grid(int64_t clusters, int blocks, int64_t shared_bytes) {
  Grid grid{};
  grid.x = clusters * blocks;
  grid.threads = kRowThreads;
  grid.shared_bytes = shared_bytes;
  grid.shared_limit = chip().shared_block;
  grid.cluster = blocks;
  return grid;
}

// How many clusters for `rows` rows: as many as the device holds at once. None where its processors
// are too few or shared, or where the library has nothing newer than sm_80 for it, whose kernel is
// empty. Asked of the driver once per kind of launch.
template <typename... Params>
int64_t cluster_count(const char* name, void (*kernel)(Params...), int blocks,
                      int64_t shared_bytes, int64_t rows) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int, int64_t>, int> known;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  const auto* const function = reinterpret_cast<const void*>(kernel);
  const std::tuple key{device, function, blocks, shared_bytes};
  auto found = known.find(key);
  if (found == known.end()) {
    int resident = 0;
    cudaFuncAttributes compiled{};
    check(cudaFuncGetAttributes(&compiled, function), name);
    if (compiled.ptxVersion >= 90) {
      cudaLaunchConfig_t config{};
      cudaLaunchAttribute attribute{};
      configure(config, attribute, name, kernel, cluster_grid(1, blocks, shared_bytes), nullptr);
      const cudaError_t status = cudaOccupancyMaxActiveClusters(&resident, kernel, &config);
      if (status == cudaErrorInvalidClusterSize) {
        cudaGetLastError();
        resident = 0;
      } else {
        check(status, name);
      }
    }
    found = known.emplace(key, resident).first;
  }
  const int64_t resident = found->second;
  const int64_t blocks_m = ceil_div(rows, kClusterRows);
  return blocks_m < resident ? blocks_m : resident;
}

}  // namespace a3fta::cuda
