// y = h @ weight.T + z @ v.T + bias + residual, with z made on the way:
//
//     a = h[:, start : start + C] @ w_down.T + b_down;  z = act(a) * (1 + gamma) + beta
//
// A block owns kBlockM x kBlockN elements of y. Its main loop multiplies each tile of h by the
// tile of the weight and, in the adapter's columns, by the tile of w_down; z stays in shared
// memory and one more small product with v ends the sum. Every block of a row recomputes a, the
// first one stores it. A rank above kRankChunk reads the adapter's columns of h again per chunk.

#include "adapter_linear.h"

#include "bottleneck.cuh"

namespace a3fta::cuda {
namespace {

constexpr int kBlockN = 128;

template <typename T>
struct Params {
  View<T> h, weight, w_down, v, residual;
  Vector bias, b_down;
  Bottleneck<T> middle;
  int64_t start, tiles_n;
  T* y;
  int64_t y_stride;
  T* a;
};

template <typename T>
using TileH = Tile<T, Order::outer_k, kBlockM>;
template <typename T>
using TileWeight = Tile<T, Order::outer_k, kBlockN>;
template <typename T>
using TileDown = Tile<T, Order::outer_k, kRankChunk>;

template <typename T>
constexpr int kBuffer = TileH<T>::kSize + TileWeight<T>::kSize + TileDown<T>::kSize;

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) adapter_linear_kernel(const Params<T> p) {
  const int64_t rank = p.middle.rank;
  T* const resident = reinterpret_cast<T*>(shared_memory());
  T* const tiles = reinterpret_cast<T*>(shared_memory() + middle_bytes<T>(rank));
  float* const stage = reinterpret_cast<float*>(tiles);  // used only between two products

  const int64_t rows = p.h.rows;
  const int64_t row0 = blockIdx.x / p.tiles_n * kBlockM;
  const int64_t n0 = blockIdx.x % p.tiles_n * kBlockN;

  Accumulator<T, kBlockN> acc;
  acc.zero();
  for (int64_t chunk = 0; chunk * kRankChunk < rank; ++chunk) {
    Accumulator<T, kRankChunk> down;
    down.zero();
    // the columns before, inside and after the adapter's: each run is tiled on its own, so that
    // nothing outside reaches a
    for (int run = 0; run < 3; ++run) {
      const bool inside = run == 1;
      const bool outer = chunk == 0;  // the projection itself needs one pass only
      const int64_t end = p.start + p.w_down.cols;
      const int64_t begin = run == 0 ? 0 : inside ? p.start : end;
      const int64_t length = run == 0 ? p.start : inside ? p.w_down.cols : p.h.cols - end;
      if (!inside && !outer) continue;
      const View<T> h = p.h.columns(begin, length);
      const View<T> weight = p.weight.columns(begin, length);
      pipeline(
          ceil_div(length, kBlockK<T>),
          [&](int64_t step, int buffer) {
            T* tile = tiles + buffer * kBuffer<T>;
            TileH<T>::load(tile, h, row0, step);
            tile += TileH<T>::kSize;
            if (outer) TileWeight<T>::load(tile, weight, n0, step);
            tile += TileWeight<T>::kSize;
            if (inside) TileDown<T>::load(tile, p.w_down, chunk * kRankChunk, step);
          },
          [&](int64_t, int buffer) {
            const T* left = tiles + buffer * kBuffer<T>;
            const T* right = left + TileH<T>::kSize;
            const T* right_down = right + TileWeight<T>::kSize;
            if (outer) {
              acc.template multiply<Order::outer_k, Order::outer_k>(
                  left, TileH<T>::kStride, right, TileWeight<T>::kStride);
            }
            if (inside) {
              down.template multiply<Order::outer_k, Order::outer_k>(
                  left, TileH<T>::kStride, right_down, TileDown<T>::kStride);
            }
          });
    }
    down.store(stage, kStageStride<kRankChunk>);
    __syncthreads();
    for_middle(stage, row0, rows, chunk, rank, resident,
               [&](int64_t m, int64_t r, float sum) -> T {
                 if (p.b_down.data != nullptr) sum += at<T>(p.b_down, r);
                 const T a = from_float<T>(sum);  // as the backward will see it
                 if (n0 == 0) p.a[m * rank + r] = a;
                 return from_float<T>(p.middle.z(to_float(a), m, r));
               });
    __syncthreads();  // the stage is read, the resident block written
  }

  multiply_resident<Order::outer_k>(acc, resident, static_cast<int>(middle_stride<T>(rank)), rank,
                                    p.v, n0, tiles);
  store_block(acc, stage, row0, rows, n0, p.weight.rows, p.bias, p.residual, p.y, p.y_stride);
}

template <typename T>
constexpr int64_t shared_bytes(int64_t rank) {
  constexpr int64_t kTiles = 2 * static_cast<int64_t>(sizeof(T)) * kBuffer<T>;
  return middle_bytes<T>(rank) + (kTiles > kStageBytes<kBlockN> ? kTiles : kStageBytes<kBlockN>);
}

}  // namespace

bool adapter_linear_fits(DType dtype, int64_t rank) {
  bool fits = false;
  with_type(dtype, [&](auto* type) {
    fits = shared_bytes<std::remove_pointer_t<decltype(type)>>(rank) <= kSharedLimit;
  });
  return fits;
}

void adapter_linear_forward(DType dtype, const AdapterLinearForward& args, cudaStream_t stream) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Params<T> p{};
    p.h = view<T>(args.h);
    p.weight = view<T>(args.weight);
    p.w_down = view<T>(args.w_down);
    p.v = view<T>(args.v);
    p.residual = view<T>(args.residual);
    p.bias = args.bias;
    p.b_down = args.b_down;
    p.middle = bottleneck<T>(args.modulation, args.w_down.rows, args.activation);
    p.start = args.start;
    p.tiles_n = ceil_div(args.weight.rows, kBlockN);
    p.y = static_cast<T*>(args.y.data);
    p.y_stride = args.y.stride;
    p.a = static_cast<T*>(args.a.data);
    launch("adapter_linear_forward", adapter_linear_kernel<T>,
           ceil_div(p.h.rows, kBlockM) * p.tiles_n, 1, kThreads,
           shared_bytes<T>(args.w_down.rows), stream, p);
  });
}

}  // namespace a3fta::cuda
