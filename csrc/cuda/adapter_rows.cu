// `adapter` in one pass over h, by blocks of rows: adapter_rows.cuh.

#include "adapter_rows.cuh"

#include "adapter.h"

namespace a3fta::cuda {
namespace {

template <typename T, int RANK>
__global__ void __launch_bounds__(kRowThreads, 2) adapter_rows_kernel(const RowsTask<T> p) {
  adapter_rows<T, RANK>(p, static_cast<int64_t>(blockIdx.x) * p.block_m, 1.0f);
}

template <typename T, int RANK>
void run(RowsTask<T>& p, const RowsPlan& plan, cudaStream_t stream) {
  p.block_m = plan.block_m;
  Grid grid{};
  grid.x = ceil_div(p.h.rows, plan.block_m);
  grid.threads = kRowThreads;
  grid.shared_bytes = plan.shared_bytes;
  grid.shared_limit = chip().shared_block;
  launch("adapter_rows", adapter_rows_kernel<T, RANK>, grid, stream, p);
}

}  // namespace

bool adapter_rows_fits(DType dtype, const AdapterForward& args) {
  if (dtype == DType::fp32 || args.y.data == nullptr || args.z.data != nullptr) return false;
  // rows of whole 16-byte vectors
  const auto vectors = [](const Matrix& m) { return view<__half>(m).vectors; };
  if (args.h.cols % 8 != 0 || !vectors(args.h) || !vectors(args.y)) return false;
  return plan_rows(chip(), args.h.rows, args.h.cols, args.w_down.rows).block_m > 0;
}

void adapter_rows_forward(DType dtype, const AdapterForward& args, cudaStream_t stream) {
  const RowsPlan plan = plan_rows(chip(), args.h.rows, args.h.cols, args.w_down.rows);
  with_half_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    RowsTask<T> p{};
    p.h = view<T>(args.h);
    p.w_down = view<T>(args.w_down);
    p.w_up = view<T>(args.w_up);
    p.b_down = args.b_down;
    p.b_up = args.b_up;
    p.middle = bottleneck<T>(args.modulation, args.w_down.rows, args.activation);
    p.a = static_cast<T*>(args.a.data);
    p.y = static_cast<T*>(args.y.data);
    p.y_stride = args.y.stride;
    switch (padded_rank(args.w_down.rows)) {
      case 16:
        return run<T, 16>(p, plan, stream);
      case 32:
        return run<T, 32>(p, plan, stream);
      default:
        return run<T, 64>(p, plan, stream);
    }
  });
}

}  // namespace a3fta::cuda
