// The adapter's forward in one pass over h by clusters, for 16-bit types:
//
//     a = h @ w_down.T + b_down;  z = act(a) * (1 + gamma) + beta;  y = h + z @ w_up.T + b_up
//
// adapter_rows.cu reads the weights once per block of rows, which costs more than h itself where
// the rank is large or the rows are few (adapter_plan.h: prefer_cluster). Here they are read once:
// a cluster walks over blocks of 64 rows, as cluster.cuh says, each block with its slice of the
// columns of h and y and its slices of both weights in shared memory. The partial is that of a,
// the middle is z. h waits in its buffer for z, y takes its place there and leaves in 16-byte
// vectors; copies run ahead by h_buffers - 1 steps.

#include "adapter_cluster.h"

#include "cluster.cuh"

namespace a3fta::cuda {
namespace {

template <typename T>
struct Params {
  View<T> h, w_down, w_up;
  Vector b_down, b_up;
  Bottleneck<T> middle;
  T* a;
  T* y;
  int64_t y_stride;
  ForwardLayout layout;
};

template <typename T, int RANK>
__global__ void __launch_bounds__(kRowThreads, 1) cluster_forward_kernel(const Params<T> p) {
#if defined(A3FTA_CLUSTERS)
  constexpr int kMiddleStride = Walk<T, RANK>::kMiddleStride;
  constexpr int kMiddle = Walk<T, RANK>::kMiddle;

  const ForwardLayout& s = p.layout;
  const Walk<T, RANK> walk(p.h.rows, s.blocks, 1);
  const int stride = s.width + 8;
  T* const w_down = walk.memory();
  T* const w_up = w_down + RANK * stride;
  T* const middles = w_up + s.width * kMiddleStride;  // z of two steps
  T* const hs = middles + 2 * kMiddle;
  float* const b_up = reinterpret_cast<float*>(hs + s.h_buffers * kClusterRows * stride);

  const int64_t rank = p.middle.rank;
  const int64_t begin = static_cast<int64_t>(walk.place) * s.width;
  const View<T> h = p.h.slice(begin, s.width);
  const int ahead = s.h_buffers - 1;

  const auto h_of = [&](int step) { return hs + step % s.h_buffers * kClusterRows * stride; };
  const auto z_of = [&](int step) { return middles + step % 2 * kMiddle; };
  const auto fetch = [&](int i) {
    if (i < walk.steps) load_slice(h_of(i), stride, h, walk.row_of(i), kClusterRows, s.width);
    __pipeline_commit();
  };

  load_slice(w_down, stride, p.w_down.slice(begin, s.width), 0, RANK, s.width);
  load_slice(w_up, kMiddleStride, p.w_up.row_range(begin, h.cols), 0, s.width, RANK);
  for (int i = 0; i < ahead; ++i) fetch(i);
  for (int col = threadIdx.x; col < s.width; col += kRowThreads) {
    b_up[col] = p.b_up.data != nullptr && col < h.cols ? at<T>(p.b_up, begin + col) : 0.0f;
  }
  float b_down[4];  // of the columns of the middle that this thread makes
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int r = threadIdx.x % (RANK / 4) * 4 + e;
    b_down[e] = p.b_down.data != nullptr && r < rank ? at<T>(p.b_down, r) : 0.0f;
  }
  cluster_wait();

  for (int i = 0; i <= walk.steps; ++i) {
    const bool makes = i < walk.steps;  // a middle; the last turn only has a product left
    ahead > 1 ? __pipeline_wait_prior(1) : __pipeline_wait_prior(0);
    __syncthreads();  // h of this step is here

    float sums[RANK / 16][4] = {};
    if (makes) {
      multiply_slice<Order::outer_k, RANK>(sums, h_of(i), stride, w_down, stride, s.width);
    }
    if (i > 0) walk.await_middle(i - 1);
    if (makes) walk.send_partials(sums);
    if (i > 0) {
      T* const tile = h_of(i - 1);
      add_product<Order::outer_k, RANK>(tile, stride, s.width, z_of(i - 1), w_up, kMiddleStride,
                                        [&](int col) { return b_up[col]; });
      __syncthreads();
      store_slice(p.y + begin, p.y_stride, walk.row_of(i - 1), walk.rows, tile, stride, h.cols);
    }
    __syncthreads();  // the tile of the last step is free
    fetch(i + ahead);

    if (makes) {
      walk.await_partials(i);
      walk.for_items([&](int, int row, int r) {
        const int64_t m = walk.row_of(i) + row;
        const Pack<float, 4> sum = walk.add_partials(row, r);
        Pack<T, 4> a, z;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const bool real = m < walk.rows && r + e < rank;
          a.values[e] = from_float<T>(sum.values[e] + b_down[e]);  // as the backward will see it
          z.values[e] = from_float<T>(real ? p.middle.z(to_float(a.values[e]), m, r + e) : 0.0f);
        }
        walk.send_middle(z_of(i), row, r, z);
        if (m < walk.rows) store_four(p.a + m * rank, r, rank, a);
      });
    }
  }
  __pipeline_wait_prior(0);
#endif
}

template <typename F>
void with_kernel(DType dtype, int64_t rank, F f) {
  with_half_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    switch (padded_rank(rank)) {
      case 16:
        return f(type, cluster_forward_kernel<T, 16>);
      case 32:
        return f(type, cluster_forward_kernel<T, 32>);
      default:
        return f(type, cluster_forward_kernel<T, 64>);
    }
  });
}

}  // namespace

int64_t cluster_forward_clusters(DType dtype, const AdapterForward& args) {
  const int64_t rank = args.w_down.rows;
  const auto vectors = [](const Matrix& m) { return view<__half>(m).vectors; };
  if (dtype == DType::fp32 || args.h.rows == 0 || args.y.data == nullptr) return 0;
  if (args.h.cols % 8 != 0 || !vectors(args.h) || !vectors(args.y)) return 0;
  const ForwardLayout plan = plan_cluster_forward(chip(), args.h.cols, rank);
  if (plan.blocks == 0 || !prefer_cluster(chip(), args.h.rows, args.h.cols, rank)) return 0;
  int64_t clusters = 0;
  with_kernel(dtype, rank, [&](auto*, auto* kernel) {
    clusters = cluster_count("cluster_forward", kernel, plan.blocks, plan.shared_bytes,
                             args.h.rows);
  });
  return clusters;
}

void cluster_forward(DType dtype, const AdapterForward& args, int64_t clusters,
                     cudaStream_t stream) {
  const int64_t rank = args.w_down.rows;
  with_kernel(dtype, rank, [&](auto* type, auto* kernel) {
    using T = std::remove_pointer_t<decltype(type)>;
    Params<T> p{};
    p.h = view<T>(args.h);
    p.w_down = view<T>(args.w_down);
    p.w_up = view<T>(args.w_up);
    p.b_down = args.b_down;
    p.b_up = args.b_up;
    p.middle = bottleneck<T>(args.modulation, rank, args.activation);
    p.a = static_cast<T*>(args.a.data);
    p.y = static_cast<T*>(args.y.data);
    p.y_stride = args.y.stride;
    p.layout = plan_cluster_forward(chip(), args.h.cols, rank);
    launch("cluster_forward", kernel,
           cluster_grid(clusters, p.layout.blocks, p.layout.shared_bytes), stream, p);
  });
}

}  // namespace a3fta::cuda
