// Launchers of the sums over rows: weight gradients, bias gradients, per-sample gradients. All
// results are fp32 and the same in every run: parts of the rows are summed on their own into a
// workspace, then the parts are added in order.
#pragma once

#include "launch.h"

namespace a3fta::cuda {

// product = left.T @ right and sums = the column sums of left, both fp32, contiguous.
struct RowProduct {
  Matrix left, right;  // (M, N), (M, R)
  float* product;      // (N, R) out
  float* sums;         // (N,) out
  float* workspace;    // row_product_parts * (N * R + N); unused with one part
};

int64_t row_product_parts(int64_t m, int64_t n, int64_t r);
void row_product(DType dtype, const RowProduct& args, cudaStream_t stream);

// dgamma = sum over a sample's rows of dz * act(a), dbeta = the same of dz: (B, R) fp32.
struct SampleSums {
  const float* dz;  // (M, R)
  Matrix a;         // (M, R)
  int activation;
  int64_t samples;
  float* dgamma;     // out, may be null
  float* dbeta;      // out, may be null
  float* workspace;  // sample_sum_parts * 2 * B * R
};

int64_t sample_sum_parts(int64_t m, int64_t samples, int64_t rank);
void sample_sums(DType dtype, const SampleSums& args, cudaStream_t stream);

// The results of one part lie behind each other: out[i] = the sum over the parts of run i, added
// in their order. A run without `out` is passed over.
struct PartRun {
  int64_t count;
  float* out;
};
constexpr int kPartRuns = 4;
void add_parts(const float* workspace, int64_t parts, const PartRun (&runs)[kPartRuns],
               cudaStream_t stream);

}  // namespace a3fta::cuda
