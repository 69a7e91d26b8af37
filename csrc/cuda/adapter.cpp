// `adapter` on CUDA tensors: outputs, workspaces, the order of the launches.

#include "adapter.h"

#include "adapter_cluster.h"
#include "product.h"
#include "row_sums.h"
#include "tensors.h"

namespace a3fta::cuda {

RowProductResult row_product(const Call& call, const Matrix& left, const Matrix& right) {
  const int64_t m = left.rows;
  const int64_t n = left.cols;
  const int64_t r = right.cols;
  RowProductResult result{call.wide(n, r), call.wide(n)};
  const int64_t parts = row_product_parts(m, n, r);
  const Tensor workspace = call.wide(parts > 1 ? parts * (n * r + n) : 0);
  row_product(call.dtype(),
              RowProduct{left, right, static_cast<float*>(result.product.data_ptr()),
                         static_cast<float*>(result.sums.data_ptr()),
                         static_cast<float*>(workspace.data_ptr())},
              call.stream());
  return result;
}

namespace {

// dgamma and dbeta of `result` from dz (M, R)
void add_sample_sums(BottleneckGradients& result, const Call& call, const Tensor& dz,
                     const Matrix& a, const OptionalTensor& gamma, const OptionalTensor& beta,
                     int activation) {
  const int64_t rank = a.cols;
  SampleSums sums{};
  sums.samples = (gamma.has_value() ? gamma : beta)->size(0);
  if (gamma.has_value()) result.dgamma = call.wide(sums.samples, rank);
  if (beta.has_value()) result.dbeta = call.wide(sums.samples, rank);
  const Tensor workspace =
      call.wide(sample_sum_parts(a.rows, sums.samples, rank) * 2 * sums.samples * rank);
  sums.dz = static_cast<const float*>(dz.data_ptr());
  sums.a = a;
  sums.activation = activation;
  if (gamma.has_value()) sums.dgamma = static_cast<float*>(result.dgamma.data_ptr());
  if (beta.has_value()) sums.dbeta = static_cast<float*>(result.dbeta.data_ptr());
  sums.workspace = static_cast<float*>(workspace.data_ptr());
  sample_sums(call.dtype(), sums, call.stream());
}

// One pass by clusters; `args` lacks its sums.
void run_cluster(BottleneckGradients& result, const Call& call, AdapterCluster& args,
                 const ClusterSizes& sizes, bool need_dw) {
  const int64_t n = args.dy.cols;
  const int64_t rank = args.w_up.cols;
  const Tensor workspace = call.wide(need_dw ? sizes.workspace : 0);
  if (need_dw) {
    result.up = {call.wide(n, rank), call.wide(n)};
    args.workspace = static_cast<float*>(workspace.data_ptr());
    args.g_up = static_cast<float*>(result.up.product.data_ptr());
    args.dy_sum = static_cast<float*>(result.up.sums.data_ptr());
    if (args.h.cols > 0) {
      result.down = {call.wide(rank, args.h.cols), call.wide(rank)};
      args.dw_down = static_cast<float*>(result.down.product.data_ptr());
      args.da_sum = static_cast<float*>(result.down.sums.data_ptr());
    }
  }
  adapter_cluster_backward(call.dtype(), args, sizes.clusters, call.stream());
}

}  // namespace

BottleneckGradients bottleneck_gradients(const Call& call, const Matrix& dy, const Matrix& h,
                                         const Matrix& a, const Matrix& w_up,
                                         const OptionalTensor& gamma, const OptionalTensor& beta,
                                         int64_t activation, bool need_dw, const Matrix& w_down,
                                         const Matrix& dh) {
  const int64_t m = dy.rows;
  const int64_t rank = w_up.cols;
  const RowProductResult none{call.none(), call.none()};
  BottleneckGradients result{call.none(), none, none, call.none(), call.none()};
  const bool need_down = need_dw && h.cols > 0;  // M may be 0
  const bool need_samples = need_dw && (gamma.has_value() || beta.has_value());
  const Tensor dz = call.wide(need_samples ? m : 0, rank);

  AdapterCluster cluster{};
  cluster.dy = dy;
  cluster.a = a;
  cluster.w_up = w_up;
  cluster.modulation = call.modulation(gamma, beta, m, rank);
  cluster.activation = static_cast<int>(activation);
  if (need_down) cluster.h = h;
  if (dh.data != nullptr) {
    cluster.w_down = w_down;
    cluster.dh = dh;
  }
  const ClusterSizes sizes = adapter_cluster_sizes(call.dtype(), cluster);
  const bool one_pass = sizes.clusters > 0;
  if (h.cols == 0 || !one_pass) result.da = call.empty(m, rank);
  if (one_pass) {
    if (h.cols == 0) cluster.da = whole(result.da);
    if (need_samples) cluster.dz = static_cast<float*>(dz.data_ptr());
    run_cluster(result, call, cluster, sizes, need_dw);
  } else {
    const Tensor z = call.empty(need_dw ? m : 0, rank);
    AdapterBackward args{};
    args.dy = dy;
    args.a = a;
    args.w_up = w_up;
    args.modulation = cluster.modulation;
    args.activation = cluster.activation;
    args.da = whole(result.da);
    if (need_dw) args.z = whole(z);
    if (need_samples) args.dz = static_cast<float*>(dz.data_ptr());
    if (dh.data != nullptr && adapter_fits(call.dtype(), rank)) {
      args.w_down = w_down;
      args.dh = dh;
    }
    adapter_backward(call.dtype(), args, call.stream());
    if (dh.data != nullptr && args.dh.data == nullptr) {
      Product back{};
      back.a = args.da;
      back.b = w_down;
      back.residual = dy;
      back.y = dh;
      product(call.dtype(), false, back, call.stream());
    }
    if (need_dw) result.up = row_product(call, dy, whole(z));
    if (need_down) result.down = row_product(call, args.da, h);
  }
  if (need_samples) add_sample_sums(result, call, dz, a, gamma, beta, cluster.activation);
  return result;
}

namespace {

std::tuple<Tensor, Tensor> forward(Tensor h, Tensor w_down, Tensor w_up, OptionalTensor b_down,
                                   OptionalTensor b_up, OptionalTensor gamma, OptionalTensor beta,
                                   int64_t activation) {
  const Call call(h);
  const int64_t m = h.size(0);
  const int64_t channels = h.size(1);
  const int64_t rank = w_down.size(0);
  const Tensor y = call.empty(m, channels);
  const Tensor a = call.empty(m, rank);
  const bool fits = adapter_fits(call.dtype(), rank);
  const Tensor z = call.empty(fits ? 0 : m, rank);

  AdapterForward args{};
  args.h = call.matrix("h", h, m, channels);
  args.w_down = call.matrix("w_down", w_down, rank, channels);
  args.b_down = call.vector("b_down", b_down, rank);
  args.modulation = call.modulation(gamma, beta, m, rank);
  args.activation = static_cast<int>(activation);
  args.a = whole(a);
  const Matrix up = call.matrix("w_up", w_up, channels, rank);
  const Vector b = call.vector("b_up", b_up, channels);
  if (fits) {
    args.w_up = up;
    args.b_up = b;
    args.y = whole(y);
    const int64_t clusters = cluster_forward_clusters(call.dtype(), args);
    if (clusters > 0) {
      cluster_forward(call.dtype(), args, clusters, call.stream());
    } else if (adapter_rows_fits(call.dtype(), args)) {
      adapter_rows_forward(call.dtype(), args, call.stream());
    } else {
      adapter_forward(call.dtype(), args, call.stream());
    }
  } else {
    args.z = whole(z);
    adapter_forward(call.dtype(), args, call.stream());
    Product back{};
    back.a = args.z;
    back.b = up;
    back.bias = b;
    back.residual = args.h;
    back.y = whole(y);
    product(call.dtype(), true, back, call.stream());
  }
  return {y, a};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor dy, Tensor h, Tensor a, Tensor w_down, Tensor w_up, OptionalTensor gamma,
    OptionalTensor beta, int64_t activation, bool need_dh, bool need_dw) {
  const Call call(h);
  const int64_t m = h.size(0);
  const int64_t channels = h.size(1);
  const int64_t rank = w_down.size(0);
  const Tensor dh = need_dh ? call.empty(m, channels) : call.none();
  const Matrix h_rows = call.matrix("h", h, m, channels);
  const Matrix down = call.matrix("w_down", w_down, rank, channels);
  const BottleneckGradients found = bottleneck_gradients(
      call, call.matrix("dy", dy, m, channels), h_rows, call.matrix("a", a, m, rank),
      call.matrix("w_up", w_up, channels, rank), gamma, beta, activation, need_dw,
      need_dh ? down : Matrix{}, need_dh ? whole(dh) : Matrix{});
  return {dh,            found.down.product, found.up.product, found.down.sums,
          found.up.sums, found.dgamma,       found.dbeta};
}

}  // namespace
}  // namespace a3fta::cuda

STABLE_TORCH_LIBRARY_IMPL(a3fta_native, A3FTA_CUDA_KEY, m) {
  m.impl("adapter_forward", TORCH_BOX(&a3fta::cuda::forward));
  m.impl("adapter_backward", TORCH_BOX(&a3fta::cuda::backward));
}
