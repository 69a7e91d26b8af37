// layer_norm: a warp per row, which it reads from memory once and again from its cache.

#include "norm.cuh"

namespace a3fta::cuda {
namespace {

template <typename T>
struct Params {
  const T* x;
  const T* dy;
  T* out;
  int64_t rows, channels, x_stride, dy_stride;
  Vector weight, bias;
  float* mean;
  float* rstd;
  float eps;
};

template <typename T, int N, bool BACKWARD>
__global__ void __launch_bounds__(kNormThreads) layer_norm_kernel(const Params<T> p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kNormWarps + threadIdx.x / 32;
  if (row >= p.rows) return;
  const int lane = threadIdx.x % 32;
  const T* const x = p.x + row * p.x_stride;
  T* const out = p.out + row * p.channels;
  const float count = static_cast<float>(p.channels);
  const auto each_pack = [&](const auto& body) {
    for (int64_t c = lane * N; c < p.channels; c += 32 * N) {
      float v[N];
      load_pack(v, x + c);
      body(c, v);
    }
  };

  if constexpr (BACKWARD) {
    const T* const dy = p.dy + row * p.dy_stride;
    const float mean = p.mean[row], rstd = p.rstd[row];
    float sum_g = 0.0f, sum_gx = 0.0f;
    each_pack([&](int64_t c, float(&v)[N]) {
      float d[N], weight[N];
      load_pack(d, dy + c);
      load_parameter<T>(weight, p.weight, c, 1.0f);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const float g = d[e] * weight[e];
        sum_g += g;
        sum_gx += g * ((v[e] - mean) * rstd);
      }
    });
    const float mean_g = warp_sum(sum_g) / count, mean_gx = warp_sum(sum_gx) / count;
    each_pack([&](int64_t c, float(&v)[N]) {
      float d[N], weight[N];
      load_pack(d, dy + c);
      load_parameter<T>(weight, p.weight, c, 1.0f);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        v[e] = rstd * (d[e] * weight[e] - mean_g - (v[e] - mean) * rstd * mean_gx);
      }
      store_pack(out + c, v);
    });
  } else {
    float sum = 0.0f;
    each_pack([&](int64_t, float(&v)[N]) {
#pragma unroll
      for (int e = 0; e < N; ++e) sum += v[e];
    });
    float mean = warp_sum(sum) / count;
    // what the sum's roundings left of the mean comes with the squares
    float lack = 0.0f, squares = 0.0f;
    each_pack([&](int64_t, float(&v)[N]) {
#pragma unroll
      for (int e = 0; e < N; ++e) {
        lack += v[e] - mean;
        squares += (v[e] - mean) * (v[e] - mean);
      }
    });
    mean += warp_sum(lack) / count;
    const float rstd = rstd_of(warp_sum(squares), count, p.eps);
    if (lane == 0) {
      p.mean[row] = mean;
      p.rstd[row] = rstd;
    }
    each_pack([&](int64_t c, float(&v)[N]) {
      float weight[N], bias[N];
      load_parameter<T>(weight, p.weight, c, 1.0f);
      load_parameter<T>(bias, p.bias, c, 0.0f);
#pragma unroll
      for (int e = 0; e < N; ++e) v[e] = (v[e] - mean) * rstd * weight[e] + bias[e];
      store_pack(out + c, v);
    });
  }
}

template <typename T, int N>
void run(const Params<T>& p, cudaStream_t stream) {
  const bool backward = p.dy != nullptr;
  launch(backward ? "layer_norm_backward" : "layer_norm_forward",
         backward ? layer_norm_kernel<T, N, true> : layer_norm_kernel<T, N, false>,
         ceil_div(p.rows, kNormWarps), 1, kNormThreads, 0, stream, p);
}

}  // namespace

void layer_norm(DType dtype, const LayerNorm& args, cudaStream_t stream) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Params<T> p{static_cast<const T*>(args.x.data),
                      static_cast<const T*>(args.dy.data),
                      static_cast<T*>(args.out.data),
                      args.x.rows,
                      args.x.cols,
                      args.x.stride,
                      args.dy.stride,
                      args.weight,
                      args.bias,
                      args.mean,
                      args.rstd,
                      args.eps};
    const bool packs = p.channels % kVector<T> == 0 && view<T>(args.x).vectors &&
                       view<T>(args.dy).vectors && view<T>(args.out).vectors &&
                       whole(args.weight) && whole(args.bias);
    packs ? run<T, kVector<T>>(p, stream) : run<T, 1>(p, stream);
  });
}

}  // namespace a3fta::cuda
