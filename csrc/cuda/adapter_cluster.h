// Launchers of the passes by clusters of blocks: the backward over dy and h (adapter_cluster.cu),
// the forward over h (adapter_cluster_forward.cu). They run on 16-bit types, ranks up to 64 and
// rows of whole 16-byte vectors, where the chip has clusters (sm_90 and later) and holds slices of
// the columns in shared memory (adapter_plan.h).
#pragma once

#include "adapter.h"

namespace a3fta::cuda {

// dz = dy @ w_up and all that follows; see csrc/ops.cpp for the formulas.
struct AdapterCluster {
  Matrix dy, a, w_up;  // (M, N), (M, R), (N, R)
  Modulation modulation;
  int activation;
  Matrix h;              // (M, C), absent: no dw_down
  Matrix w_down, dh;     // absent together: dh = dy + da @ w_down, (M, N) out
  Matrix da;             // (M, R) out, may be absent
  float* dz = nullptr;   // (M, R) out, may be absent
  // absent together, with h: sums over rows in fp32
  float* workspace = nullptr;
  float* g_up = nullptr;     // (N, R) out: dy.T @ z
  float* dy_sum = nullptr;   // (N,) out
  float* dw_down = nullptr;  // (R, C) out: da.T @ h
  float* da_sum = nullptr;   // (R,) out
};

struct ClusterSizes {
  int64_t clusters;   // 0: it does not run here
  int64_t workspace;  // elements
};

// The sums and the workspace need not be set yet.
ClusterSizes adapter_cluster_sizes(DType dtype, const AdapterCluster& args);

void adapter_cluster_backward(DType dtype, const AdapterCluster& args, int64_t clusters,
                              cudaStream_t stream);

// How many clusters the forward runs with; 0: it does not run here, or adapter_rows.cu is better.
int64_t cluster_forward_clusters(DType dtype, const AdapterForward& args);
void cluster_forward(DType dtype, const AdapterForward& args, int64_t clusters,
                     cudaStream_t stream);

}  // namespace a3fta::cuda
