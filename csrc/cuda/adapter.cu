// The adapter over blocks of rows: any type, rank, width and chip. adapter_rows.cu and
// adapter_cluster*.cu are faster where they fit.
//
//     forward    a = x @ first.T + b;  z = act(a) * (1 + gamma) + beta;  y = x + z @ second.T + b'
//     backward   dz = x @ first;  da = dz * (1 + gamma) * act'(a);       y = x + da @ second
//
// where (x, first, second) is (h, w_down, w_up) and (dy, w_up, w_down). A block owns kBlockM rows:
// it reduces over the columns of x, one chunk of the rank after the other, keeps the middle (z or
// da) in shared memory and multiplies it back. Without `y` it stops at the middle, and the chunks
// are spread over the grid.

#include "adapter.h"

#include "bottleneck.cuh"

namespace a3fta::cuda {
namespace {

template <typename T>
struct Params {
  View<T> x, first, second, a_in;
  Vector bias_first, bias_second;
  Bottleneck<T> middle;
  T* a;      // forward: out
  T* z;      // may be null
  T* da;     // backward: out
  float* dz;  // backward; may be null
  T* y;      // may be null
  int64_t y_stride;
};

constexpr int kBlockN = 64;

template <typename T, bool BACKWARD>
__global__ void __launch_bounds__(kThreads, 2) adapter_kernel(const Params<T> p) {
  // the weight of either product is stored along the reduction in the forward, across it in the
  // backward
  constexpr Order kOrder = BACKWARD ? Order::k_outer : Order::outer_k;

  const int64_t rank = p.middle.rank;
  const int64_t rows = p.x.rows;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kBlockM;
  T* const resident = p.y == nullptr ? nullptr : reinterpret_cast<T*>(shared_memory());
  unsigned char* const scratch =
      shared_memory() + (p.y == nullptr ? 0 : middle_bytes<T>(rank));
  T* const tiles = reinterpret_cast<T*>(scratch);
  float* const stage = reinterpret_cast<float*>(scratch);  // used only between two products

  for (int64_t chunk = blockIdx.y; chunk * kRankChunk < rank; chunk += gridDim.y) {
    Accumulator<T, kRankChunk> acc;
    acc.zero();
    multiply<kOrder>(acc, p.x, row0, p.first, chunk * kRankChunk, tiles);
    acc.store(stage, kStageStride<kRankChunk>);
    __syncthreads();
    for_middle(stage, row0, rows, chunk, rank, resident,
               [&](int64_t m, int64_t r, float sum) -> T {
                 const int64_t i = m * rank + r;
                 if constexpr (BACKWARD) {
                   const float a = to_float(p.a_in.data[m * p.a_in.stride + r]);
                   const T da = from_float<T>(p.middle.da(sum, a, m, r));
                   p.da[i] = da;
                   if (p.z != nullptr) p.z[i] = from_float<T>(p.middle.z(a, m, r));
                   if (p.dz != nullptr) p.dz[i] = sum;
                   return da;
                 } else {
                   if (p.bias_first.data != nullptr) sum += at<T>(p.bias_first, r);
                   const T a = from_float<T>(sum);  // as the backward will see it
                   const T z = from_float<T>(p.middle.z(to_float(a), m, r));
                   p.a[i] = a;
                   if (p.z != nullptr) p.z[i] = z;
                   return z;
                 }
               });
    __syncthreads();  // the stage is read, the resident block written
  }

  if (p.y == nullptr) return;
  for (int64_t n0 = 0; n0 < p.x.cols; n0 += kBlockN) {
    Accumulator<T, kBlockN> acc;
    acc.zero();
    multiply_resident<kOrder>(acc, resident, static_cast<int>(middle_stride<T>(rank)), rank,
                              p.second, n0, tiles);
    store_block(acc, stage, row0, rows, n0, p.x.cols, p.bias_second, p.x, p.y, p.y_stride);
  }
}

template <typename T, bool BACKWARD>
constexpr int64_t scratch_bytes() {
  constexpr Order kOrder = BACKWARD ? Order::k_outer : Order::outer_k;
  constexpr int64_t kTiles = kTileBytes<kOrder, kBlockN, T>;
  return kTiles > kStageBytes<kBlockN> ? kTiles : kStageBytes<kBlockN>;
}

template <typename T, bool BACKWARD>
void run(const Params<T>& p, cudaStream_t stream) {
  const int64_t rank = p.middle.rank;
  const bool through = p.y != nullptr;
  const int64_t shared = scratch_bytes<T, BACKWARD>() + (through ? middle_bytes<T>(rank) : 0);
  launch(BACKWARD ? "adapter_backward" : "adapter_forward", adapter_kernel<T, BACKWARD>,
         ceil_div(p.x.rows, kBlockM), through ? 1 : ceil_div(rank, kRankChunk), kThreads, shared,
         stream, p);
}

}  // namespace

bool adapter_fits(DType dtype, int64_t rank) {
  bool fits = false;
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int64_t kForward = scratch_bytes<T, false>();
    constexpr int64_t kBackward = scratch_bytes<T, true>();
    fits = middle_bytes<T>(rank) + (kForward > kBackward ? kForward : kBackward) <= kSharedLimit;
  });
  return fits;
}

void adapter_forward(DType dtype, const AdapterForward& args, cudaStream_t stream) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Params<T> p{};
    p.x = view<T>(args.h);
    p.first = view<T>(args.w_down);
    p.second = view<T>(args.w_up);
    p.bias_first = args.b_down;
    p.bias_second = args.b_up;
    p.middle = bottleneck<T>(args.modulation, args.w_down.rows, args.activation);
    p.a = static_cast<T*>(args.a.data);
    p.z = static_cast<T*>(args.z.data);
    p.y = static_cast<T*>(args.y.data);
    p.y_stride = args.y.stride;
    run<T, false>(p, stream);
  });
}

void adapter_backward(DType dtype, const AdapterBackward& args, cudaStream_t stream) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Params<T> p{};
    p.x = view<T>(args.dy);
    p.first = view<T>(args.w_up);
    p.second = view<T>(args.w_down);
    p.a_in = view<T>(args.a);
    p.middle = bottleneck<T>(args.modulation, args.w_up.cols, args.activation);
    p.da = static_cast<T*>(args.da.data);
    p.z = static_cast<T*>(args.z.data);
    p.dz = args.dz;
    p.y = static_cast<T*>(args.dh.data);
    p.y_stride = args.dh.stride;
    run<T, true>(p, stream);
  });
}

}  // namespace a3fta::cuda
