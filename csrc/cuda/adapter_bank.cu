// The adapters of a batch whose samples have adapters of their own: one launch, in which a block
// owns rows of one sample and reads the weights of that sample's adapter.
//
//     y_b = residual_b + s * (act(h_b @ w_down[k].T + b_down[k]) @ w_up[k].T + b_up[k])
//
// with k = index[b] and s = scale[k]; a block whose k is -1 copies its rows. Where adapter_rows.cuh
// fits, h is read once; else it is read again as the residual.

#include "adapter_bank.h"

#include <cmath>

#include "adapter_rows.cuh"

namespace a3fta::cuda {
namespace {

template <typename T>
struct Params {
  View<T> h, residual;
  View<T> w_down, w_up;  // (adapters * R, C), (adapters * C, R)
  const T* b_down;
  const T* b_up;
  const float* scale;
  const int32_t* index;
  int64_t rows_per_sample, rank;
  int adapters, tiles_per_sample;
  int activation, block_m;
  T* y;
};

// What a block works on: a part of one sample, with the weights of its adapter.
template <typename T>
struct Block {
  int64_t first;  // row of the sample's first in the batch
  int64_t row0;   // the block's first, counted from there
  int32_t adapter;
  float scale;
  View<T> w_down, w_up;
  Vector b_down, b_up;
};

template <typename T>
__device__ __forceinline__ Block<T> block_of(const Params<T>& p) {
  const int sample = static_cast<int>(blockIdx.x) / p.tiles_per_sample;
  Block<T> b{};
  b.first = sample * p.rows_per_sample;
  b.row0 = (static_cast<int64_t>(blockIdx.x) - sample * p.tiles_per_sample) * p.block_m;
  b.adapter = p.index[sample];
  const bool known = b.adapter >= 0 && b.adapter < p.adapters;
  // an adapter that is not there must show, and nothing be read beside the bank
  b.scale = known ? p.scale[b.adapter] : NAN;
  const int64_t k = known ? b.adapter : 0;
  const int64_t channels = p.h.cols;
  b.w_down = p.w_down.row_range(k * p.rank, p.rank);
  b.w_up = p.w_up.row_range(k * channels, channels);
  if (p.b_down != nullptr) b.b_down.data = p.b_down + k * p.rank;
  if (p.b_up != nullptr) b.b_up.data = p.b_up + k * channels;
  return b;
}

// the block's rows of y = residual
template <typename T>
__device__ __forceinline__ void copy_rows(const Params<T>& p, const Block<T>& b, int threads) {
  const int64_t left = p.rows_per_sample - b.row0;
  const int64_t rows = left < p.block_m ? left : p.block_m;
  const int64_t cols = p.h.cols;
  const T* const from = p.residual.data + (b.first + b.row0) * p.residual.stride;
  T* const to = p.y + (b.first + b.row0) * cols;
  constexpr int N = kVector<T>;
  const bool vectors = p.residual.vectors && cols % N == 0;
  const int64_t per_row = vectors ? cols / N : cols;
  for (int64_t i = threadIdx.x; i < rows * per_row; i += threads) {
    const int64_t row = i / per_row, col = i % per_row;
    if (vectors) {
      const T* const source = from + row * p.residual.stride + col * N;
      write_pack(reinterpret_cast<Pack<T, N>*>(to + row * cols + col * N),
                 read_pack(reinterpret_cast<const Pack<T, N>*>(source)));
    } else {
      to[row * cols + col] = from[row * p.residual.stride + col];
    }
  }
}

template <typename T, int RANK>
__global__ void __launch_bounds__(kRowThreads, 2) bank_rows_kernel(const Params<T> p) {
  const Block<T> b = block_of(p);
  if (b.adapter == -1) return copy_rows(p, b, kRowThreads);
  RowsTask<T> task{};
  task.h = p.h.row_range(b.first, p.rows_per_sample);
  task.w_down = b.w_down;
  task.w_up = b.w_up;
  task.b_down = b.b_down;
  task.b_up = b.b_up;
  task.middle = Bottleneck<T>{nullptr, nullptr, 1, p.rank, p.activation};
  task.y = p.y + b.first * p.h.cols;
  task.y_stride = p.h.cols;
  task.block_m = p.block_m;
  adapter_rows<T, RANK>(task, b.row0, b.scale);
}

constexpr int kBlockN = 64;

// any type, width and residual, and ranks whose middle stays in shared memory: as adapter.cu
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) bank_kernel(const Params<T> p) {
  const Block<T> b = block_of(p);
  if (b.adapter == -1) return copy_rows(p, b, kThreads);
  const int64_t rank = p.rank;
  const View<T> h = p.h.row_range(b.first, p.rows_per_sample);
  const View<T> residual = p.residual.row_range(b.first, p.rows_per_sample);
  T* const middle = reinterpret_cast<T*>(shared_memory());
  unsigned char* const scratch = shared_memory() + middle_bytes<T>(rank);
  T* const tiles = reinterpret_cast<T*>(scratch);
  float* const stage = reinterpret_cast<float*>(scratch);  // used only between two products

  for (int64_t chunk = 0; chunk * kRankChunk < rank; ++chunk) {
    Accumulator<T, kRankChunk> acc;
    acc.zero();
    multiply<Order::outer_k>(acc, h, b.row0, b.w_down, chunk * kRankChunk, tiles);
    acc.store(stage, kStageStride<kRankChunk>);
    __syncthreads();
    for_middle(stage, b.row0, h.rows, chunk, rank, middle,
               [&](int64_t, int64_t r, float sum) -> T {
                 if (b.b_down.data != nullptr) sum += at<T>(b.b_down, r);
                 return from_float<T>(b.scale * scalar::activate(sum, p.activation));
               });
    __syncthreads();  // the stage is read, the middle written
  }
  for (int64_t n0 = 0; n0 < h.cols; n0 += kBlockN) {
    Accumulator<T, kBlockN> acc;
    acc.zero();
    multiply_resident<Order::outer_k>(acc, middle, static_cast<int>(middle_stride<T>(rank)), rank,
                                      b.w_up, n0, tiles);
    store_block(acc, stage, b.row0, h.rows, n0, h.cols, b.b_up, residual, p.y + b.first * h.cols,
                h.cols, b.scale);
  }
}

template <typename T>
constexpr int64_t scratch_bytes() {
  constexpr int64_t kTiles = kTileBytes<Order::outer_k, kBlockN, T>;
  return kTiles > kStageBytes<kBlockN> ? kTiles : kStageBytes<kBlockN>;
}

template <typename T>
void start(Params<T>& p, const AdapterBank& args, const char* name, void (*kernel)(Params<T>),
           Grid grid, int block_m, cudaStream_t stream) {
  p.block_m = block_m;
  const int64_t tiles = ceil_div(p.rows_per_sample, block_m);
  p.tiles_per_sample = static_cast<int>(tiles);  // `launch` refuses what does not fit
  grid.x = args.samples * tiles;
  launch(name, kernel, grid, stream, p);
}

}  // namespace

bool adapter_bank_fits(DType dtype, int64_t rank) {
  bool fits = false;
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    fits = middle_bytes<T>(rank) + scratch_bytes<T>() <= kSharedLimit;
  });
  return fits;
}

void adapter_bank(DType dtype, const AdapterBank& args, cudaStream_t stream) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t channels = args.h.cols;
    Params<T> p{};
    p.h = view<T>(args.h);
    p.residual = view<T>(args.residual);
    const int64_t rank = args.rank, adapters = args.adapters;
    p.w_down = view<T>({const_cast<void*>(args.w_down), adapters * rank, channels, channels});
    p.w_up = view<T>({const_cast<void*>(args.w_up), adapters * channels, rank, rank});
    p.b_down = static_cast<const T*>(args.b_down);
    p.b_up = static_cast<const T*>(args.b_up);
    p.scale = args.scale;
    p.index = args.index;
    p.rows_per_sample = args.h.rows / args.samples;
    p.rank = rank;
    p.adapters = static_cast<int>(adapters);
    p.activation = args.activation;
    p.y = static_cast<T*>(args.y.data);

    if constexpr (!std::is_same_v<T, float>) {
      const RowsPlan plan = plan_rows(chip(), args.h.rows, channels, rank);
      const bool own = args.residual.data == args.h.data && args.residual.stride == args.h.stride;
      if (own && plan.block_m > 0 && channels % 8 == 0 && p.h.vectors) {
        Grid grid{};
        grid.threads = kRowThreads;
        grid.shared_bytes = plan.shared_bytes;
        grid.shared_limit = chip().shared_block;
        const int padded = padded_rank(rank);
        const auto kernel = padded == 16   ? bank_rows_kernel<T, 16>
                            : padded == 32 ? bank_rows_kernel<T, 32>
                                           : bank_rows_kernel<T, 64>;
        // no more rows than a sample has; blocks of fewer take no more memory
        int block_m = plan.block_m;
        while (block_m > 16 && block_m / 2 >= p.rows_per_sample) block_m /= 2;
        return start(p, args, "adapter_bank_rows", kernel, grid, block_m, stream);
      }
    }
    Grid grid{};
    grid.threads = kThreads;
    grid.shared_bytes = scratch_bytes<T>() + middle_bytes<T>(rank);
    start(p, args, "adapter_bank", bank_kernel<T>, grid, kBlockM, stream);
  });
}

}  // namespace a3fta::cuda
