// The adapter's backward in one pass over dy and h, for 16-bit types on chips with clusters:
//
//     dz = dy @ w_up;  da = dz * (1 + gamma) * act'(a);  z = act(a) * (1 + gamma) + beta
//     dh = dy + da @ w_down;  P = dy.T @ z;  dw_down = da.T @ h;  sums of dy and da over rows
//
// A cluster walks over blocks of 64 rows; each of its blocks owns a slice of the columns: of dy,
// dh and P one, of h and dw_down another, since adapter_linear's dy and h differ in width. What is
// small stays where it is used for the whole walk: the slices of the weights in shared memory, the
// sums P and dw_down in registers. So dy and h are read once and dh is written once.
//
// Only the rank ties the columns together, and the cluster closes that gap, for step i:
//
//     partial dz   each block's slice of dy times its slice of w_up, fp32, in its shared memory
//     barrier
//     reduce       each block adds all partials of its share of the rows, makes da and z of them
//     gather       and writes both, in 16 bits, to every block of the cluster
//     barrier
//     products     P, dw_down, dh of the slice
//
// The barriers are split: the products of step i - 1 run between the arrival at step i's first
// barrier and the wait, the product for dz of step i + 1 while its second one is waited for.
// Copies run ahead: of dy by dy_buffers - 1 steps, of h by one.
//
// At the end each cluster's sums go to a workspace, and are added in order: the same in every run.

#include "adapter_cluster.h"

#include <map>
#include <mutex>
#include <tuple>

#include "adapter_plan.h"
#include "bottleneck.cuh"
#include "row_sums.h"
#include "rows.cuh"

namespace a3fta::cuda {
namespace {

template <typename T>
struct Params {
  View<T> dy, h, w_up, w_down, a;  // h, w_down: may be absent
  Bottleneck<T> middle;
  T* da;      // may be null
  float* dz;  // may be null
  T* dh;      // may be null
  int64_t dh_stride;
  float* workspace;  // (clusters, sums); null: no sums
  ClusterLayout layout;
};

// Where a cluster's sums lie: P (N, R), the sums of dy (N,), dw_down (R, C), the sums of da (R,).
struct Sums {
  int64_t dy, down, da, all;
};

__host__ __device__ Sums sums_of(int64_t n, int64_t c, int64_t rank) {
  return {n * rank, n * rank + n, n * rank + n + rank * c, n * rank + n + rank * c + rank};
}

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

// four elements of a row whose length divides by four, else those of them that are `left`
template <typename T>
__device__ __forceinline__ void store_row(T* to, const Pack<T, 4>& found, int64_t left) {
  if (left % 4 == 0) {
    if (left > 0) *reinterpret_cast<Pack<T, 4>*>(to) = found;
  } else {
    for (int e = 0; e < 4 && e < left; ++e) to[e] = found.values[e];
  }
}

// Sums over rows, left.T @ right, of one slice: `tiles` of 16 columns of left, spread over the
// warps by twos or ones of `right`'s columns.
template <int RANK>
struct SliceSums {
  static constexpr int kWarpsN = RANK == 64 ? 2 : 1;
  static constexpr int kWarpsM = kRowWarps / kWarpsN;
  static constexpr int kTilesM = cluster_width(RANK) / 16 / kWarpsM;
  static constexpr int kTilesN = RANK / kWarpsN / 8;
  float part[kTilesM][kTilesN][4];

  __device__ __forceinline__ static int warp_m() { return threadIdx.x / 32 % kWarpsM; }
  __device__ __forceinline__ static int n0() { return threadIdx.x / 32 / kWarpsM * kTilesN * 8; }

  __device__ __forceinline__ void zero() {
#pragma unroll
    for (auto& row : part) {
#pragma unroll
      for (auto& tile : row) tile[0] = tile[1] = tile[2] = tile[3] = 0.0f;
    }
  }

  // += left.T @ right over kClusterRows rows; `each(i, a)` sees the operand of tile i as it passes
  template <typename T, typename F>
  __device__ __forceinline__ void add(const T* left, int left_stride, int width, const T* right,
                                      int right_stride, F each) {
#pragma unroll 1
    for (int k = 0; k < kClusterRows; k += 16) {
      uint32_t b[kTilesN / 2][4];
#pragma unroll
      for (int j = 0; j < kTilesN / 2; ++j) {
        load_right_trans(b[j], right + k * right_stride + n0() + j * 16, right_stride);
      }
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
        const int col = (warp_m() + i * kWarpsM) * 16;
        if (col >= width) continue;
        uint32_t a[4];
        load_left_trans(a, left + k * left_stride + col, left_stride);
        each(i, a);
#pragma unroll
        for (int j = 0; j < kTilesN; ++j) {
          mma<T>(part[i][j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }

  // f(column of left, column of right, sum)
  template <typename F>
  __device__ __forceinline__ void for_each(F f) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          f((warp_m() + i * kWarpsM) * 16 + lane / 4 + e / 2 * 8,
            n0() + j * 8 + lane % 4 * 2 + e % 2, part[i][j][e]);
        }
      }
    }
  }
};

template <typename T, int RANK>
__global__ void __launch_bounds__(kRowThreads, 1) adapter_cluster_kernel(const Params<T> p) {
#if defined(A3FTA_CLUSTERS)
  constexpr int kSumStride = RANK + 4;
  constexpr int kMiddleStride = RANK + 8;
  constexpr int kMiddle = kClusterRows * kMiddleStride;
  constexpr int kItems = kClusterRows * RANK / 4 / kRowThreads;
  using Accumulators = SliceSums<RANK>;

  const ClusterLayout& s = p.layout;
  const int n_stride = s.n_width + 8;
  const int c_stride = s.c_width + 8;
  float* const partial = reinterpret_cast<float*>(shared_memory());
  T* const w_up = reinterpret_cast<T*>(partial + kClusterRows * kSumStride);
  T* const w_down = w_up + s.n_width * kMiddleStride;
  T* const middles = w_down + (s.through ? RANK * n_stride : 0);  // da and z, of two steps
  T* const dys = middles + 4 * kMiddle;
  T* const hs = dys + s.dy_buffers * kClusterRows * n_stride;

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int place = static_cast<int>(cluster_rank());
  const int64_t cluster = blockIdx.x / s.blocks;
  const int64_t clusters = gridDim.x / s.blocks;
  const int64_t rows = p.dy.rows;
  const int64_t rank = p.middle.rank;
  const int64_t n_begin = static_cast<int64_t>(place) * s.n_width;
  const int64_t c_begin = static_cast<int64_t>(place) * s.c_width;
  const View<T> dy = p.dy.slice(n_begin, s.n_width);
  const View<T> h = p.h.slice(c_begin, s.c_width);
  const int64_t blocks_m = ceil_div(rows, kClusterRows);
  const int steps = static_cast<int>(ceil_div(blocks_m - cluster, clusters));
  // the rows of a step whose middle this block makes
  const int first = kClusterRows * place / s.blocks;
  const int last = kClusterRows * (place + 1) / s.blocks;
  const int ahead = s.dy_buffers - 1;

  const auto row_of = [&](int step) { return (cluster + step * clusters) * kClusterRows; };
  const auto dy_of = [&](int step) { return dys + step % s.dy_buffers * kClusterRows * n_stride; };
  const auto h_of = [&](int step) { return hs + step % 2 * kClusterRows * c_stride; };
  const auto da_of = [&](int step) { return middles + step % 2 * 2 * kMiddle; };
  // what step i waits for: its dy, and the h of the products before it
  const auto fetch = [&](int i) {
    if (i < steps) load_slice(dy_of(i), n_stride, dy, row_of(i), kClusterRows, s.n_width);
    if (s.c_width > 0 && i > 0 && i <= steps) {
      load_slice(h_of(i - 1), c_stride, h, row_of(i - 1), kClusterRows, s.c_width);
    }
    __pipeline_commit();
  };

  load_slice(w_up, kMiddleStride, p.w_up.row_range(n_begin, dy.cols), 0, s.n_width, RANK);
  if (s.through) {
    load_slice(w_down, n_stride, p.w_down.slice(n_begin, s.n_width), 0, RANK, s.n_width);
  }
  for (int i = 0; i < ahead; ++i) fetch(i);

  Accumulators up;
  Accumulators down;
  up.zero();
  down.zero();
  float dy_sums[Accumulators::kTilesM][4] = {};
  float da_sum = 0.0f;
  const uint32_t ones = two_ones<T>();

  for (int i = 0; i <= steps; ++i) {
    const bool makes = i < steps;  // a middle; the last turn only has products left
    ahead > 1 ? __pipeline_wait_prior(1) : __pipeline_wait_prior(0);
    __syncthreads();  // dy of this step and h of the last one are here

    // 64 x RANK: 16 rows and half of the rank for each warp
    float dz[RANK / 16][4] = {};
    Pack<T, 4> a[kItems];
    if (makes) {
      constexpr int kHalf = RANK / 2;
      const T* left = dy_of(i) + warp % 4 * 16 * n_stride;
      const T* right = w_up + (kHalf >= 16 ? warp / 4 * kHalf : 0);
      for (int k = 0; k < s.n_width; k += 16) {
        uint32_t l[4];
        load_left(l, left + k, n_stride);
        if constexpr (kHalf >= 16) {
#pragma unroll
          for (int j = 0; j < kHalf / 16; ++j) {
            uint32_t b[4];
            load_right_trans(b, right + k * kMiddleStride + j * 16, kMiddleStride);
            mma<T>(dz[2 * j], l, b[0], b[1]);
            mma<T>(dz[2 * j + 1], l, b[2], b[3]);
          }
        } else {
          uint32_t b[4];
          load_right_trans(b, right + k * kMiddleStride, kMiddleStride);
          mma<T>(dz[0], l, warp < 4 ? b[0] : b[2], warp < 4 ? b[1] : b[3]);
        }
      }
#pragma unroll
      for (int j = 0; j < kItems; ++j) {
        const int item = threadIdx.x + j * kRowThreads;
        const int row = first + item / (RANK / 4);
        const int r = item % (RANK / 4) * 4;
        const int64_t m = row_of(i) + row;
        a[j] = {};
        if (row < last && m < rows) {
          const T* from = p.a.data + m * p.a.stride + r;
          if (p.a.vectors && r < rank) {
            a[j] = *reinterpret_cast<const Pack<T, 4>*>(from);
          } else {
            for (int e = 0; e < 4 && r + e < rank; ++e) a[j].values[e] = from[e];
          }
        }
      }
    }
    if (i > 0) cluster_wait();  // the middle of the last step is here, its partials are read
    if (makes) {
      constexpr int kHalf = RANK / 2;
#pragma unroll
      for (int j = 0; j < RANK / 16; ++j) {
        float* const to = partial + (warp % 4 * 16 + lane / 4) * kSumStride + warp / 4 * kHalf +
                          j * 8 + lane % 4 * 2;
        *reinterpret_cast<Pack<float, 2>*>(to) = {dz[j][0], dz[j][1]};
        *reinterpret_cast<Pack<float, 2>*>(to + 8 * kSumStride) = {dz[j][2], dz[j][3]};
      }
      cluster_arrive();
    }

    if (i > 0) {
      T* const dy_tile = dy_of(i - 1);
      const T* const da = da_of(i - 1);
      const T* const z = da + kMiddle;
      if (p.workspace != nullptr) {
        up.add(dy_tile, n_stride, s.n_width, z, kMiddleStride,
               [&](int tile, const uint32_t (&left)[4]) {
                 if (Accumulators::n0() == 0) mma<T>(dy_sums[tile], left, ones, ones);
               });
        if (s.c_width > 0) {
          down.add(h_of(i - 1), c_stride, s.c_width, da, kMiddleStride,
                   [](int, const uint32_t (&)[4]) {});
        }
        for (int row = first + threadIdx.x / RANK; row < last; row += kRowThreads / RANK) {
          da_sum += to_float(da[row * kMiddleStride + threadIdx.x % RANK]);
        }
      }
      if (s.through) {
        __syncthreads();  // dy is read: dh takes its place
        uint32_t left[RANK / 16][4];
        const int m0 = warp % 4 * 16;
#pragma unroll
        for (int k = 0; k < RANK / 16; ++k) {
          load_left(left[k], da + m0 * kMiddleStride + k * 16, kMiddleStride);
        }
#pragma unroll 1
        for (int n = warp / 4 * 16; n < s.n_width; n += 32) {
          float out[2][4] = {};
#pragma unroll
          for (int k = 0; k < RANK / 16; ++k) {
            uint32_t b[4];
            load_right_trans(b, w_down + k * 16 * n_stride + n, n_stride);
            mma<T>(out[0], left[k], b[0], b[1]);
            mma<T>(out[1], left[k], b[2], b[3]);
          }
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float* sum = &out[e / 2][e % 2 * 2];
            add_pair(dy_tile + (m0 + lane / 4 + e % 2 * 8) * n_stride + n + e / 2 * 8 +
                         lane % 4 * 2,
                     sum[0], sum[1]);
          }
        }
        __syncthreads();
        if (lane * 8 < dy.cols) {
          for (int row = warp; row < kClusterRows; row += kRowWarps) {
            const int64_t m = row_of(i - 1) + row;
            if (m >= rows) break;
            store16(p.dh + m * p.dh_stride + n_begin + lane * 8, dy_tile + row * n_stride + lane * 8);
          }
        }
      }
    }
    __syncthreads();  // the tiles of the last step are free
    fetch(i + ahead);

    if (makes) {
      cluster_wait();  // all partials are here
#pragma unroll
      for (int j = 0; j < kItems; ++j) {
        const int item = threadIdx.x + j * kRowThreads;
        const int row = first + item / (RANK / 4);
        const int r = item % (RANK / 4) * 4;
        if (row >= last) continue;
        const int64_t m = row_of(i) + row;
        Pack<float, 4> sum{};
#pragma unroll
        for (int block = 0; block < kClusterBlocks; ++block) {
          if (block < s.blocks) {
            const auto part = *reinterpret_cast<const Pack<float, 4>*>(
                map_shared(partial + row * kSumStride + r, block));
#pragma unroll
            for (int e = 0; e < 4; ++e) sum.values[e] += part.values[e];
          }
        }
        Pack<T, 4> da, z;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const bool real = m < rows && r + e < rank;
          const float x = to_float(a[j].values[e]);
          da.values[e] = from_float<T>(real ? p.middle.da(sum.values[e], x, m, r + e) : 0.0f);
          z.values[e] = from_float<T>(real ? p.middle.z(x, m, r + e) : 0.0f);
        }
        if (m < rows && p.da != nullptr) store_row(p.da + m * rank + r, da, rank - r);
        if (m < rows && p.dz != nullptr) store_row(p.dz + m * rank + r, sum, rank - r);
        T* const to = da_of(i) + row * kMiddleStride + r;
        for (int block = 0; block < s.blocks; ++block) {
          T* const there = map_shared(to, block);
          *reinterpret_cast<Pack<T, 4>*>(there) = da;
          *reinterpret_cast<Pack<T, 4>*>(there + kMiddle) = z;
        }
      }
      cluster_arrive();
    }
  }
  __pipeline_wait_prior(0);

  if (p.workspace == nullptr) return;
  const Sums at = sums_of(p.dy.cols, p.h.cols, rank);
  float* const out = p.workspace + cluster * at.all;
  up.for_each([&](int n, int r, float sum) {
    if (n < dy.cols && r < rank) out[(n_begin + n) * rank + r] = sum;
  });
  down.for_each([&](int c, int r, float sum) {
    if (c < h.cols && r < rank) out[at.down + r * p.h.cols + c_begin + c] = sum;
  });
  if (Accumulators::n0() == 0 && lane % 4 == 0) {
#pragma unroll
    for (int t = 0; t < Accumulators::kTilesM; ++t) {
      const int n = (Accumulators::warp_m() + t * Accumulators::kWarpsM) * 16 + lane / 4;
      if (n < dy.cols) out[at.dy + n_begin + n] = dy_sums[t][0];
      if (n + 8 < dy.cols) out[at.dy + n_begin + n + 8] = dy_sums[t][2];
    }
  }
  // the sums of da meet in the first block
  partial[threadIdx.x] = da_sum;
  cluster_arrive();
  cluster_wait();
  if (place == 0 && threadIdx.x < rank) {
    float sum = 0.0f;
    for (int block = 0; block < s.blocks; ++block) {
      for (int t = threadIdx.x; t < kRowThreads; t += RANK) sum += *map_shared(partial + t, block);
    }
    out[at.da + threadIdx.x] = sum;
  }
  cluster_arrive();  // no block leaves while its memory is read
  cluster_wait();
#endif
}

template <typename F>
void with_kernel(DType dtype, int64_t rank, F f) {
  with_half_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    switch (padded_rank(rank)) {
      case 16:
        return f(type, adapter_cluster_kernel<T, 16>);
      case 32:
        return f(type, adapter_cluster_kernel<T, 32>);
      default:
        return f(type, adapter_cluster_kernel<T, 64>);
    }
  });
}

ClusterLayout plan_of(const AdapterCluster& args) {
  return plan_cluster(chip(), args.dy.cols, args.h.cols, args.w_up.cols, args.dh.data != nullptr);
}

Grid grid_of(const ClusterLayout& plan, int64_t clusters) {
  Grid grid{};
  grid.x = clusters * plan.blocks;
  grid.threads = kRowThreads;
  grid.shared_bytes = plan.shared_bytes;
  grid.shared_limit = chip().shared_block;
  grid.cluster = plan.blocks;
  return grid;
}

// How many clusters the device holds at once; none where its processors are too few, or shared.
// Asked once per kind of launch.
int resident_clusters(DType dtype, int64_t rank, const ClusterLayout& plan) {
  static std::mutex mutex;
  static std::map<std::tuple<int, DType, int, int, int64_t>, int> known;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [entry, fresh] = known.try_emplace(
      {device, dtype, padded_rank(rank), plan.blocks, plan.shared_bytes}, 0);
  if (!fresh) return entry->second;
  with_kernel(dtype, rank, [&](auto*, auto* kernel) {
    cudaLaunchConfig_t config{};
    cudaLaunchAttribute attribute{};
    configure(config, attribute, "adapter_cluster", kernel, grid_of(plan, 1), nullptr);
    check(cudaOccupancyMaxActiveClusters(&entry->second, kernel, &config),
          "cudaOccupancyMaxActiveClusters");
  });
  return entry->second;
}

}  // namespace

ClusterSizes adapter_cluster_sizes(DType dtype, const AdapterCluster& args) {
  const auto vectors = [](const Matrix& m) {
    return m.data == nullptr || (m.cols % 8 == 0 && view<__half>(m).vectors);
  };
  if (dtype == DType::fp32 || args.dy.rows == 0) return {0, 0};
  if (!vectors(args.dy) || !vectors(args.h) || !vectors(args.dh)) return {0, 0};
  const ClusterLayout plan = plan_of(args);
  if (plan.blocks == 0) return {0, 0};
  const int64_t blocks_m = ceil_div(args.dy.rows, kClusterRows);
  const int64_t resident = resident_clusters(dtype, args.w_up.cols, plan);
  const int64_t clusters = blocks_m < resident ? blocks_m : resident;
  return {clusters, clusters * sums_of(args.dy.cols, args.h.cols, args.w_up.cols).all};
}

void adapter_cluster_backward(DType dtype, const AdapterCluster& args, int64_t clusters,
                              cudaStream_t stream) {
  const int64_t rank = args.w_up.cols;
  with_kernel(dtype, rank, [&](auto* type, auto* kernel) {
    using T = std::remove_pointer_t<decltype(type)>;
    Params<T> p{};
    p.dy = view<T>(args.dy);
    p.h = view<T>(args.h);
    p.w_up = view<T>(args.w_up);
    p.w_down = view<T>(args.w_down);
    p.a = view<T>(args.a);
    p.middle = bottleneck<T>(args.modulation, rank, args.activation);
    p.da = static_cast<T*>(args.da.data);
    p.dz = args.dz;
    p.dh = static_cast<T*>(args.dh.data);
    p.dh_stride = args.dh.stride;
    p.workspace = args.workspace;
    p.layout = plan_of(args);
    launch("adapter_cluster", kernel, grid_of(p.layout, clusters), stream, p);
  });
  if (args.workspace == nullptr) return;
  add_parts(args.workspace, clusters,
            {{args.dy.cols * rank, args.g_up}, {args.dy.cols, args.dy_sum},
             {rank * args.h.cols, args.dw_down}, {rank, args.da_sum}},
            stream);
}

}  // namespace a3fta::cuda
