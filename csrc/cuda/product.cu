// y = residual + bias + a @ b + a2 @ b2: one product whose reduction runs over two pairs of
// operands ("K-concat"). A block owns kBlockM x kBlockN elements of y.
//
// The columns of y come in three runs, and only the middle one has the second pair. The grid
// tiles each run on its own, so a block lies in one of them, and no NaN of a2 leaves its columns.

#include "product.h"

#include "tile.cuh"

namespace a3fta::cuda {
namespace {

constexpr int kBlockN = 128;
constexpr int kRuns = 3;

struct Run {
  int64_t begin, length, first_tile;
};

template <typename T>
struct Params {
  View<T> a, b, a2, b2, residual;
  Vector bias;
  T* y;
  int64_t y_stride, rows, tiles_n;
  Run runs[kRuns];
};

template <typename T, bool TRANSPOSED>
__global__ void __launch_bounds__(kThreads, 2) product_kernel(const Params<T> p) {
  constexpr Order kOrder = TRANSPOSED ? Order::outer_k : Order::k_outer;
  T* const tiles = reinterpret_cast<T*>(shared_memory());
  float* const stage = reinterpret_cast<float*>(shared_memory());  // used after the products

  const int64_t row0 = blockIdx.x / p.tiles_n * kBlockM;
  const int64_t tile = blockIdx.x % p.tiles_n;
  const int which = tile >= p.runs[2].first_tile ? 2 : tile >= p.runs[1].first_tile ? 1 : 0;
  const Run run = which == 2 ? p.runs[2] : which == 1 ? p.runs[1] : p.runs[0];
  const int64_t n0 = (tile - run.first_tile) * kBlockN;  // within the run

  Accumulator<T, kBlockN> acc;
  acc.zero();
  if (p.a.data != nullptr) {
    const View<T> b = TRANSPOSED ? p.b : p.b.columns(run.begin, run.length);
    multiply<kOrder>(acc, p.a, row0, b, n0, tiles);
  }
  if (which == 1 && p.a2.data != nullptr) multiply<kOrder>(acc, p.a2, row0, p.b2, n0, tiles);
  store_block(acc, stage, row0, p.rows, run.begin + n0, run.begin + run.length, p.bias,
              p.residual, p.y, p.y_stride);
}

template <typename T, bool TRANSPOSED>
void launch_product(const Product& args, cudaStream_t stream) {
  constexpr Order kOrder = TRANSPOSED ? Order::outer_k : Order::k_outer;
  constexpr int64_t kTiles = kTileBytes<kOrder, kBlockN, T>;
  constexpr int64_t kShared = kTiles > kStageBytes<kBlockN> ? kTiles : kStageBytes<kBlockN>;
  Params<T> p{view<T>(args.a),  view<T>(args.b),        view<T>(args.a2),
              view<T>(args.b2), view<T>(args.residual), args.bias,
              static_cast<T*>(args.y.data), args.y.stride, args.y.rows, 0, {}};
  const int64_t width = TRANSPOSED || args.b2.data == nullptr ? args.y.cols : args.b2.cols;
  const int64_t begins[kRuns + 1] = {0, args.start, args.start + width, args.y.cols};
  for (int i = 0; i < kRuns; ++i) {
    p.runs[i] = {begins[i], begins[i + 1] - begins[i], p.tiles_n};
    p.tiles_n += ceil_div(p.runs[i].length, kBlockN);
  }
  launch("product", product_kernel<T, TRANSPOSED>, ceil_div(p.rows, kBlockM) * p.tiles_n, 1,
         kThreads, kShared, stream, p);
}

}  // namespace

void product(DType dtype, bool transposed, const Product& args, cudaStream_t stream) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    transposed ? launch_product<T, true>(args, stream) : launch_product<T, false>(args, stream);
  });
}

}  // namespace a3fta::cuda
