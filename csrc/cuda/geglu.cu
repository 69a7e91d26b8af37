// The gated linear unit, element by element.
//
//     forward    y  = hidden * act(gate)                               p = [hidden | gate]
//     backward   dp = [dy * act(gate) | dy * hidden * act'(gate)]
//
// A thread takes N neighbours of a row at a time: one vector of 16 bytes of each tensor, or one
// element where the rows do not start at such addresses.

#include "geglu.h"

#include "../math.h"
#include "packs.cuh"

namespace a3fta::cuda {
namespace {

template <typename T>
struct Params {
  const T* p;
  const T* dy;
  T* out;
  int64_t p_stride, dy_stride, out_stride;
  int64_t width;    // F
  int64_t per_row;  // packs of a row of y
  int64_t packs;    // of all rows
  int activation;
};

template <typename T, int N, bool BACKWARD>
__global__ void __launch_bounds__(kPackThreads) geglu_kernel(const Params<T> p) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kPackThreads;
  const bool narrow = p.packs <= INT32_MAX;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x; i < p.packs;
       i += step) {
    // a division of 64 bits would cost more than the rest
    const int64_t row = narrow ? static_cast<uint32_t>(i) / static_cast<uint32_t>(p.per_row)
                               : i / p.per_row;
    const int64_t col = (i - row * p.per_row) * N;
    const T* const from = p.p + row * p.p_stride + col;
    T* const to = p.out + row * p.out_stride + col;
    float hidden[N], gate[N];
    load_pack(hidden, from);
    load_pack(gate, from + p.width);
    if constexpr (BACKWARD) {
      float dy[N];
      load_pack(dy, p.dy + row * p.dy_stride + col);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const float slope = scalar::activate_backward(dy[e] * hidden[e], gate[e], p.activation);
        hidden[e] = dy[e] * scalar::activate(gate[e], p.activation);
        gate[e] = slope;
      }
      store_pack(to, hidden);
      store_pack(to + p.width, gate);
    } else {
#pragma unroll
      for (int e = 0; e < N; ++e) hidden[e] *= scalar::activate(gate[e], p.activation);
      store_pack(to, hidden);
    }
  }
}

template <typename T, int N>
void run(Params<T> p, int64_t rows, cudaStream_t stream) {
  p.per_row = p.width / N;
  p.packs = rows * p.per_row;
  const bool backward = p.dy != nullptr;
  launch(backward ? "geglu_backward" : "geglu_forward",
         backward ? geglu_kernel<T, N, true> : geglu_kernel<T, N, false>, blocks_for(p.packs), 1,
         kPackThreads, 0, stream, p);
}

}  // namespace

void geglu(DType dtype, const Geglu& args, cudaStream_t stream) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Params<T> p{};
    p.p = static_cast<const T*>(args.p.data);
    p.dy = static_cast<const T*>(args.dy.data);
    p.out = static_cast<T*>(args.out.data);
    p.p_stride = args.p.stride;
    p.dy_stride = args.dy.stride;
    p.out_stride = args.out.stride;
    p.width = args.p.cols / 2;
    p.activation = args.activation;
    const bool whole = p.width % kVector<T> == 0 && view<T>(args.p).vectors &&
                       view<T>(args.dy).vectors && view<T>(args.out).vectors;
    whole ? run<T, kVector<T>>(p, args.p.rows, stream) : run<T, 1>(p, args.p.rows, stream);
  });
}

}  // namespace a3fta::cuda
