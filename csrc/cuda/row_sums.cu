// Sums over rows, in two stages: parts of the rows into a workspace, then the parts in order.

#include "row_sums.h"

#include <algorithm>

#include "../math.h"
#include "tile.cuh"

namespace a3fta::cuda {
namespace {

constexpr int kBlock = 64;  // both sides of a block of the product
constexpr int64_t kWantedBlocks = 264;  // enough for the largest chips; fixed, so results are too
constexpr int64_t kMinRows = 256;       // per part

int64_t parts_for(int64_t blocks, int64_t rows) {
  const int64_t wanted = ceil_div(kWantedBlocks, std::max<int64_t>(blocks, 1));
  return std::max<int64_t>(1, std::min(wanted, ceil_div(rows, kMinRows)));
}

template <typename T>
struct ProductParams {
  View<T> left, right;
  int64_t rows_per_part, tiles_n, tiles_r;
  float* product;
  float* sums;
  int64_t part_stride;  // between the results of two parts
};

template <typename T>
using BlockTile = Tile<T, Order::k_outer, kBlock>;

template <typename T>
constexpr int64_t product_shared_bytes() {
  constexpr int64_t kTiles = 4 * static_cast<int64_t>(sizeof(T)) * BlockTile<T>::kSize;
  return kTiles > kStageBytes<kBlock> ? kTiles : kStageBytes<kBlock>;
}

// One kBlock x kBlock block of left.T @ right over one part of the rows. The blocks of the first
// column also sum the columns of `left`, which pass through their shared memory.
template <typename T>
__global__ void __launch_bounds__(kThreads) row_product_kernel(const ProductParams<T> p) {
  T* const tiles = reinterpret_cast<T*>(shared_memory());
  float* const stage = reinterpret_cast<float*>(shared_memory());  // used after the product

  const int64_t r0 = blockIdx.x % p.tiles_r * kBlock;
  const int64_t n0 = blockIdx.x / p.tiles_r % p.tiles_n * kBlock;
  const int64_t part = blockIdx.x / p.tiles_r / p.tiles_n;
  const int64_t begin = part * p.rows_per_part;
  const int64_t left_rows = p.left.rows - begin;
  const int64_t count = left_rows < 0 ? 0 : left_rows < p.rows_per_part ? left_rows
                                                                        : p.rows_per_part;
  const View<T> left = p.left.row_range(begin, count);
  const View<T> right = p.right.row_range(begin, count);
  const bool summing = r0 == 0 && threadIdx.x < kBlock;

  Accumulator<T, kBlock> acc;
  acc.zero();
  float sum = 0.0f;
  pipeline(
      ceil_div(count, kBlockK<T>),
      [&](int64_t step, int buffer) {
        T* tile = tiles + buffer * 2 * BlockTile<T>::kSize;
        BlockTile<T>::load(tile, left, n0, step);
        BlockTile<T>::load(tile + BlockTile<T>::kSize, right, r0, step);
      },
      [&](int64_t, int buffer) {
        const T* tile = tiles + buffer * 2 * BlockTile<T>::kSize;
        acc.template multiply<Order::k_outer, Order::k_outer>(
            tile, BlockTile<T>::kStride, tile + BlockTile<T>::kSize, BlockTile<T>::kStride);
        if (summing) {
          for (int k = 0; k < kBlockK<T>; ++k) {
            sum += to_float(tile[k * BlockTile<T>::kStride + threadIdx.x]);
          }
        }
      });
  acc.store(stage, kStageStride<kBlock>);
  __syncthreads();

  float* const product = p.product + part * p.part_stride;
  for (int i = threadIdx.x; i < kBlock * kBlock; i += kThreads) {
    const int64_t n = n0 + i / kBlock;
    const int64_t r = r0 + i % kBlock;
    if (n < p.left.cols && r < p.right.cols) {
      product[n * p.right.cols + r] = stage[i / kBlock * kStageStride<kBlock> + i % kBlock];
    }
  }
  if (summing && n0 + threadIdx.x < p.left.cols) {
    p.sums[part * p.part_stride + n0 + threadIdx.x] = sum;
  }
}

struct ReduceParams {
  const float* workspace;  // (parts, stride)
  int64_t parts, stride;
  PartRun runs[kPartRuns];
};

__global__ void __launch_bounds__(kThreads) reduce_kernel(const ReduceParams p) {
  int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.stride) return;
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t part = 0; part < p.parts; ++part) sum += p.workspace[part * p.stride + i];
#pragma unroll
  for (const PartRun& run : p.runs) {
    if (i >= 0 && i < run.count && run.out != nullptr) run.out[i] = sum;
    i -= run.count;
  }
}

constexpr int kRankLanes = 32;
constexpr int kRowLanes = kThreads / kRankLanes;

template <typename T>
struct SampleParams {
  const float* dz;
  View<T> a;
  int activation;
  int64_t samples, rows_per_sample, rank, tiles_r, rows_per_part;
  float* workspace;  // (parts, 2, B, R)
};

// dgamma and dbeta of kRankLanes ranks of one sample over one part of its rows
template <typename T>
__global__ void __launch_bounds__(kThreads) sample_sums_kernel(const SampleParams<T> p) {
  float* const lanes = reinterpret_cast<float*>(shared_memory());  // (2, kThreads)

  const int64_t r = blockIdx.x % p.tiles_r * kRankLanes + threadIdx.x % kRankLanes;
  const int64_t sample = blockIdx.x / p.tiles_r % p.samples;
  const int64_t part = blockIdx.x / p.tiles_r / p.samples;
  const int64_t first = part * p.rows_per_part;
  const int64_t last = first + p.rows_per_part < p.rows_per_sample ? first + p.rows_per_part
                                                                   : p.rows_per_sample;
  float dgamma = 0.0f;
  float dbeta = 0.0f;
  if (r < p.rank) {
    for (int64_t l = first + threadIdx.x / kRankLanes; l < last; l += kRowLanes) {
      const int64_t m = sample * p.rows_per_sample + l;
      const float dz = p.dz[m * p.rank + r];
      dgamma += dz * scalar::activate(to_float(p.a.data[m * p.a.stride + r]), p.activation);
      dbeta += dz;
    }
  }
  lanes[threadIdx.x] = dgamma;
  lanes[kThreads + threadIdx.x] = dbeta;
  __syncthreads();
  if (threadIdx.x >= kRankLanes || r >= p.rank) return;
  for (int lane = 1; lane < kRowLanes; ++lane) {
    dgamma += lanes[lane * kRankLanes + threadIdx.x];
    dbeta += lanes[kThreads + lane * kRankLanes + threadIdx.x];
  }
  const int64_t count = p.samples * p.rank;
  float* const out = p.workspace + part * 2 * count + sample * p.rank + r;
  out[0] = dgamma;
  out[count] = dbeta;
}

}  // namespace

int64_t row_product_parts(int64_t m, int64_t n, int64_t r) {
  return parts_for(ceil_div(n, kBlock) * ceil_div(r, kBlock), m);
}

void row_product(DType dtype, const RowProduct& args, cudaStream_t stream) {
  const int64_t m = args.left.rows;
  const int64_t n = args.left.cols;
  const int64_t r = args.right.cols;
  const int64_t parts = row_product_parts(m, n, r);
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    ProductParams<T> p{view<T>(args.left), view<T>(args.right), ceil_div(m, parts),
                       ceil_div(n, kBlock), ceil_div(r, kBlock), args.product, args.sums, 0};
    if (parts > 1) {
      p.product = args.workspace;
      p.sums = args.workspace + n * r;
      p.part_stride = n * r + n;
    }
    launch("row_product", row_product_kernel<T>, p.tiles_n * p.tiles_r * parts, 1, kThreads,
           product_shared_bytes<T>(), stream, p);
  });
  if (parts > 1) {
    add_parts(args.workspace, parts, {{n * r, args.product}, {n, args.sums}, {}, {}}, stream);
  }
}

int64_t sample_sum_parts(int64_t m, int64_t samples, int64_t rank) {
  return parts_for(samples * ceil_div(rank, kRankLanes), samples == 0 ? 0 : m / samples);
}

void sample_sums(DType dtype, const SampleSums& args, cudaStream_t stream) {
  const int64_t rank = args.a.cols;
  const int64_t parts = sample_sum_parts(args.a.rows, args.samples, rank);
  const int64_t rows_per_sample = args.samples == 0 ? 0 : args.a.rows / args.samples;
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const SampleParams<T> p{args.dz,         view<T>(args.a), args.activation,
                            args.samples,    rows_per_sample, rank,
                            ceil_div(rank, kRankLanes), ceil_div(rows_per_sample, parts),
                            args.workspace};
    launch("sample_sums", sample_sums_kernel<T>, p.tiles_r * args.samples * parts, 1, kThreads,
           2 * kThreads * 4, stream, p);
  });
  const int64_t count = args.samples * rank;
  add_parts(args.workspace, parts, {{count, args.dgamma}, {count, args.dbeta}, {}, {}}, stream);
}

void add_parts(const float* workspace, int64_t parts, const PartRun (&runs)[kPartRuns],
               cudaStream_t stream) {
  ReduceParams p{workspace, parts, 0, {}};
  for (int i = 0; i < kPartRuns; ++i) {
    p.runs[i] = runs[i];
    p.stride += runs[i].count;
  }
  launch("reduce", reduce_kernel, ceil_div(p.stride, kThreads), 1, kThreads, 0, stream, p);
}

}  // namespace a3fta::cuda
