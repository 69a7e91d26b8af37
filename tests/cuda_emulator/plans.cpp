// The plans of csrc/cuda/adapter_plan.h, for Python.
#include "../../csrc/cuda/adapter_plan.h"

using namespace a3fta::cuda;

extern "C" void plan_of_rows(int capability, int processors, int shared_kb, int64_t rows,
                             int64_t channels, int64_t rank, int64_t* found) {
  const Chip chip{capability, processors, shared_kb * 1024, (shared_kb + 1) * 1024};
  const RowsPlan plan = plan_rows(chip, rows, channels, rank);
  found[0] = plan.block_m;
  found[1] = plan.shared_bytes;
}

extern "C" void plan_of_cluster(int capability, int processors, int shared_kb, int64_t n, int64_t c,
                                int64_t rank, bool through, int64_t* found) {
  const Chip chip{capability, processors, shared_kb * 1024, (shared_kb + 1) * 1024};
  const ClusterLayout plan = plan_cluster(chip, n, c, rank, through);
  const int64_t values[] = {plan.blocks, plan.n_width, plan.c_width, plan.dy_buffers,
                            plan.shared_bytes};
  for (int i = 0; i < 5; ++i) found[i] = values[i];
}

extern "C" void plan_of_forward(int capability, int processors, int shared_kb, int64_t rows,
                                int64_t channels, int64_t rank, int64_t* found) {
  const Chip chip{capability, processors, shared_kb * 1024, (shared_kb + 1) * 1024};
  ForwardLayout plan = plan_cluster_forward(chip, channels, rank);
  if (!prefer_cluster(chip, rows, channels, rank)) plan = {};
  const int64_t values[] = {plan.blocks, plan.width, plan.h_buffers, plan.shared_bytes};
  for (int i = 0; i < 4; ++i) found[i] = values[i];
}
