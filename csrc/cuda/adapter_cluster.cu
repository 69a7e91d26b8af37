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
// cluster.cuh says how the middle, da and z of a step, goes round. Copies run ahead: of dy by
// dy_buffers - 1 steps, of h by one, since the products lag by one.
//
// At the end each cluster's sums go to a workspace, and are added in order: the same in every run.

#include "adapter_cluster.h"

#include "cluster.cuh"
#include "row_sums.h"

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

#if defined(A3FTA_CLUSTERS)

// Sums over rows of one slice in registers, left.T @ right: tiles of 16 columns of left go round
// among the warps, which take all columns of right or, of 64, half each.
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

#endif  // A3FTA_CLUSTERS

template <typename T, int RANK>
__global__ void __launch_bounds__(kRowThreads, 1) adapter_cluster_kernel(const Params<T> p) {
#if defined(A3FTA_CLUSTERS)
  using Accumulators = SliceSums<RANK>;
  constexpr int kMiddleStride = Walk<T, RANK>::kMiddleStride;
  constexpr int kMiddle = Walk<T, RANK>::kMiddle;

  const ClusterLayout& s = p.layout;
  const Walk<T, RANK> walk(p.dy.rows, s.blocks, 2);
  const int n_stride = s.n_width + 8;
  const int c_stride = s.c_width + 8;
  T* const w_up = walk.memory();
  T* const w_down = w_up + s.n_width * kMiddleStride;
  T* const middles = w_down + (s.through ? RANK * n_stride : 0);  // da and z, of two steps
  T* const dys = middles + 4 * kMiddle;
  T* const hs = dys + s.dy_buffers * kClusterRows * n_stride;

  const int64_t rank = p.middle.rank;
  const int64_t n_begin = static_cast<int64_t>(walk.place) * s.n_width;
  const int64_t c_begin = static_cast<int64_t>(walk.place) * s.c_width;
  const View<T> dy = p.dy.slice(n_begin, s.n_width);
  const View<T> h = p.h.slice(c_begin, s.c_width);
  const int ahead = s.dy_buffers - 1;

  const auto dy_of = [&](int step) { return dys + step % s.dy_buffers * kClusterRows * n_stride; };
  const auto h_of = [&](int step) { return hs + step % 2 * kClusterRows * c_stride; };
  const auto da_of = [&](int step) { return middles + step % 2 * 2 * kMiddle; };
  // what turn i waits for: dy of its step, and h of the one before
  const auto fetch = [&](int i) {
    if (i < walk.steps) {
      load_slice(dy_of(i), n_stride, dy, walk.row_of(i), kClusterRows, s.n_width);
    }
    if (i > 0 && i <= walk.steps) {
      load_slice(h_of(i - 1), c_stride, h, walk.row_of(i - 1), kClusterRows, s.c_width);
    }
    __pipeline_commit();
  };

  load_slice(w_up, kMiddleStride, p.w_up.row_range(n_begin, dy.cols), 0, s.n_width, RANK);
  if (s.through) {
    load_slice(w_down, n_stride, p.w_down.slice(n_begin, s.n_width), 0, RANK, s.n_width);
  }
  for (int i = 0; i < ahead; ++i) fetch(i);
  cluster_wait();

  Accumulators up;
  Accumulators down;
  up.zero();
  down.zero();
  float dy_sums[Accumulators::kTilesM][4] = {};
  float da_sum = 0.0f;
  const uint32_t ones = two_ones<T>();

  for (int i = 0; i <= walk.steps; ++i) {
    const bool makes = i < walk.steps;  // a middle; the last turn only has products left
    ahead > 1 ? __pipeline_wait_prior(1) : __pipeline_wait_prior(0);
    __syncthreads();  // what this turn waits for is here

    float dz[RANK / 16][4] = {};
    Pack<T, 4> a[Walk<T, RANK>::kItems];
    if (makes) {
      walk.for_items([&](int j, int row, int r) {
        const int64_t m = walk.row_of(i) + row;
        a[j] = {};
        if (m < walk.rows) a[j] = load_four(p.a.data + m * p.a.stride, r, rank, p.a.vectors);
      });
      multiply_slice<Order::k_outer, RANK>(dz, dy_of(i), n_stride, w_up, kMiddleStride, s.n_width);
    }
    if (i > 0) walk.await_middle(i - 1);
    if (makes) walk.send_partials(dz);

    if (i > 0) {
      T* const dy_tile = dy_of(i - 1);
      const T* const da = da_of(i - 1);
      const T* const z = da + kMiddle;
      if (p.workspace != nullptr) {
        up.add(dy_tile, n_stride, s.n_width, z, kMiddleStride,
               [&](int tile, const uint32_t (&left)[4]) {
                 if (Accumulators::n0() == 0) mma<T>(dy_sums[tile], left, ones, ones);
               });
        down.add(h_of(i - 1), c_stride, s.c_width, da, kMiddleStride,
                 [](int, const uint32_t (&)[4]) {});
        // each block the rows that it made
        for (int row = threadIdx.x / RANK; row < walk.share; row += kRowThreads / RANK) {
          da_sum += to_float(
              da[(walk.place * walk.share + row) * kMiddleStride + threadIdx.x % RANK]);
        }
      }
      if (s.through) {
        __syncthreads();  // dy is read: dh takes its place
        add_product<Order::k_outer, RANK>(dy_tile, n_stride, s.n_width, da, w_down, n_stride,
                                          [](int) { return 0.0f; });
        __syncthreads();
        store_slice(p.dh + n_begin, p.dh_stride, walk.row_of(i - 1), walk.rows, dy_tile, n_stride,
                    dy.cols);
      }
    }
    __syncthreads();  // the tiles of the last step are free
    fetch(i + ahead);

    if (makes) {
      walk.await_partials(i);
      walk.for_items([&](int j, int row, int r) {
        const int64_t m = walk.row_of(i) + row;
        const Pack<float, 4> sum = walk.add_partials(row, r);
        Pack<T, 4> da, z;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const bool real = m < walk.rows && r + e < rank;
          const float x = to_float(a[j].values[e]);
          da.values[e] = from_float<T>(real ? p.middle.da(sum.values[e], x, m, r + e) : 0.0f);
          z.values[e] = from_float<T>(real ? p.middle.z(x, m, r + e) : 0.0f);
        }
        walk.send_middle(da_of(i), row, r, da);
        walk.send_middle(da_of(i) + kMiddle, row, r, z);
        if (m < walk.rows && p.da != nullptr) store_four(p.da + m * rank, r, rank, da);
        if (m < walk.rows && p.dz != nullptr) store_four(p.dz + m * rank, r, rank, sum);
      });
    }
  }
  __pipeline_wait_prior(0);

  if (p.workspace == nullptr) return;
  const int lane = threadIdx.x % 32;
  const Sums at = sums_of(p.dy.cols, p.h.cols, rank);
  float* const out = p.workspace + walk.cluster * at.all;
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
  walk.inbox[threadIdx.x] = da_sum;
  cluster_arrive();
  cluster_wait();
  if (walk.place == 0 && threadIdx.x < rank) {
    float sum = 0.0f;
    for (int block = 0; block < s.blocks; ++block) {
      for (int t = threadIdx.x; t < kRowThreads; t += RANK) {
        sum += *map_shared(walk.inbox + t, block);
      }
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

}  // namespace

ClusterSizes adapter_cluster_sizes(DType dtype, const AdapterCluster& args) {
  const auto vectors = [](const Matrix& m) {
    return m.data == nullptr || (m.cols % 8 == 0 && view<__half>(m).vectors);
  };
  if (dtype == DType::fp32 || args.dy.rows == 0) return {0, 0};
  if (!vectors(args.dy) || !vectors(args.h) || !vectors(args.dh)) return {0, 0};
  const ClusterLayout plan = plan_of(args);
  if (plan.blocks == 0) return {0, 0};
  int64_t clusters = 0;
  with_kernel(dtype, args.w_up.cols, [&](auto*, auto* kernel) {
    clusters = cluster_count("adapter_cluster", kernel, plan.blocks, plan.shared_bytes,
                             args.dy.rows);
  });
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
    launch("adapter_cluster", kernel,
           cluster_grid(clusters, p.layout.blocks, p.layout.shared_bytes), stream, p);
  });
  if (args.workspace == nullptr) return;
  add_parts(args.workspace, clusters,
            {{args.dy.cols * rank, args.g_up}, {args.dy.cols, args.dy_sum},
             {rank * args.h.cols, args.dw_down}, {rank, args.da_sum}},
            stream);
}

}  // namespace a3fta::cuda
