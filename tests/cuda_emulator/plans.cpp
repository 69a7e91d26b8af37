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
