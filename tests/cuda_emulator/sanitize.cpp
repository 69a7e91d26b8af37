// Runs every launcher on exactly-sized heap buffers at awkward sizes, for the sanitizers: reads
// and writes out of bounds, races between barriers, undefined behaviour. Results are only checked
// to be written and finite; their values are checked elsewhere.
#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../csrc/cuda/adapter.h"
#include "../../csrc/cuda/adapter_bank.h"
#include "../../csrc/cuda/adapter_cluster.h"
#include "../../csrc/cuda/adapter_linear.h"
#include "../../csrc/cuda/geglu.h"
#include "../../csrc/cuda/norm.h"
#include "../../csrc/cuda/product.h"
#include "../../csrc/cuda/quantize.h"
#include "../../csrc/cuda/row_sums.h"
#include "../../csrc/cuda/tile.cuh"
#include "buffers.h"
#include "emulator.h"
#include "planted.h"

using namespace a3fta::cuda;

namespace {

struct Case {
  DType dtype;
  int64_t samples, tokens, channels, rank, outputs, before, after;  // columns around the slice
  bool aligned;  // rows start at multiples of 16 bytes
};

void run(const Case& c) {
  Buffers b(c.dtype, c.aligned);
  const int64_t m = c.samples * c.tokens;
  const int64_t width = c.before + c.channels + c.after;
  const Matrix h = b.input(m, c.channels);
  const Matrix w_down = b.input(c.rank, c.channels);
  const Matrix w_up = b.input(c.channels, c.rank);
  const Modulation modulation{b.vector(c.samples * c.rank).data,
                              b.vector(c.samples * c.rank).data, c.tokens};

  for (const bool through : {false, true}) {
    AdapterForward f{};
    f.h = h;
    f.w_down = w_down;
    f.b_down = b.vector(c.rank);
    f.modulation = modulation;
    f.activation = 2;
    f.a = b.output(m, c.rank);
    f.z = b.output(m, c.rank);
    f.a.stride = f.z.stride = c.rank;
    AdapterBackward g{};
    g.dy = b.input(m, c.channels);
    g.a = b.input(m, c.rank);
    g.w_up = w_up;
    g.modulation = modulation;
    g.activation = 4;
    g.da = b.output(m, c.rank);
    g.z = b.output(m, c.rank);
    g.da.stride = g.z.stride = c.rank;
    g.dz = b.floats(m * c.rank);
    if (through) {
      f.w_up = w_up;
      f.b_up = b.vector(c.channels);
      f.y = b.output(m, c.channels);
      g.w_down = w_down;
      g.dh = b.output(m, c.channels);
    }
    adapter_forward(c.dtype, f, nullptr);
    adapter_backward(c.dtype, g, nullptr);
    b.expect_finite("a", f.a);
    b.expect_finite("z", f.z);
    b.expect_finite("y", f.y);
    b.expect_finite("da", g.da);
    b.expect_finite("z of the backward", g.z);
    b.expect_finite("dz", g.dz, m * c.rank);
    b.expect_finite("dh", g.dh);
    if (through) continue;

    SampleSums s{g.dz, g.a, 3, c.samples, b.floats(c.samples * c.rank),
                 b.floats(c.samples * c.rank),
                 b.floats(sample_sum_parts(m, c.samples, c.rank) * 2 * c.samples * c.rank)};
    sample_sums(c.dtype, s, nullptr);
    b.expect_finite("dgamma", s.dgamma, c.samples * c.rank);
    b.expect_finite("dbeta", s.dbeta, c.samples * c.rank);

    const int64_t parts = row_product_parts(m, c.rank, c.channels);
    RowProduct r{g.da, h, b.floats(c.rank * c.channels), b.floats(c.rank),
                 b.floats(parts > 1 ? parts * (c.rank * c.channels + c.rank) : 0)};
    row_product(c.dtype, r, nullptr);
    b.expect_finite("dw_down", r.product, c.rank * c.channels);
    b.expect_finite("da_sum", r.sums, c.rank);
  }

  AdapterLinearForward l{};
  l.h = b.input(m, width);
  l.weight = b.input(c.outputs, width);
  l.w_down = w_down;
  l.v = b.input(c.outputs, c.rank);
  l.bias = {b.floats(c.outputs), true};
  for (int64_t i = 0; i < c.outputs; ++i) {
    static_cast<float*>(const_cast<void*>(l.bias.data))[i] = 0.25f;
  }
  l.b_down = b.vector(c.rank);
  l.modulation = modulation;
  l.residual = b.input(m, c.outputs);
  l.start = c.before;
  l.activation = 1;
  l.y = b.output(m, c.outputs);
  l.a = b.output(m, c.rank);
  l.a.stride = c.rank;
  adapter_linear_forward(c.dtype, l, nullptr);
  b.expect_finite("fused y", l.y);
  b.expect_finite("fused a", l.a);

  Product d{};
  d.a = b.input(m, c.outputs);
  d.b = l.weight;
  d.a2 = l.a;
  d.b2 = w_down;
  d.start = c.before;
  d.y = b.output(m, width);
  product(c.dtype, false, d, nullptr);
  b.expect_finite("fused dh", d.y);

  Product in_place{};
  in_place.a = l.a;
  in_place.b = w_down;
  in_place.residual = in_place.y = b.input(m, c.channels);
  product(c.dtype, false, in_place, nullptr);
  b.expect_finite("dh in place", in_place.y);

  Product up{};
  up.a = l.a;
  up.b = l.v;
  up.bias = l.bias;
  up.residual = l.residual;
  up.y = b.output(m, c.outputs);
  product(c.dtype, true, up, nullptr);
  b.expect_finite("up", up.y);
}

// The one-pass kernels: 16-bit types, rows of whole vectors.
void run_one_pass(const Case& c) {
  Buffers b(c.dtype, c.aligned);
  const int64_t m = c.samples * c.tokens;
  const Modulation modulation{b.vector(c.samples * c.rank).data,
                              b.vector(c.samples * c.rank).data, c.tokens};
  const auto whole = [&](int64_t rows, int64_t cols, bool out) -> Matrix {
    return {(out ? b.output(1, rows * cols) : b.input(1, rows * cols)).data, rows, cols, cols};
  };
  AdapterForward f{};
  f.h = b.input(m, c.channels);
  f.w_down = whole(c.rank, c.channels, false);
  f.w_up = whole(c.channels, c.rank, false);
  f.b_down = b.vector(c.rank);
  f.b_up = b.vector(c.channels);
  f.modulation = modulation;
  f.activation = 2;
  f.a = whole(m, c.rank, true);
  f.y = b.output(m, c.channels);
  emulator::require(adapter_rows_fits(c.dtype, f), "the one-pass forward does not take this case");
  adapter_rows_forward(c.dtype, f, nullptr);
  b.expect_finite("one-pass a", f.a);
  b.expect_finite("one-pass y", f.y);
  const int64_t clusters = cluster_forward_clusters(c.dtype, f);
  emulator::require(clusters > 0 || c.rank < 16, "no clusters for this forward");
  f.a = whole(m, c.rank, true);
  f.y = b.output(m, c.channels);
  clusters > 0 ? cluster_forward(c.dtype, f, clusters, nullptr)
               : adapter_rows_forward(c.dtype, f, nullptr);
  b.expect_finite("a by clusters", f.a);
  b.expect_finite("y by clusters", f.y);

  const bool through = c.outputs == c.channels;
  AdapterCluster g{};
  g.dy = b.input(m, c.outputs);
  g.h = f.h;
  g.a = f.a;
  g.w_up = whole(c.outputs, c.rank, false);
  g.modulation = modulation;
  g.activation = 4;
  if (through) {
    g.w_down = f.w_down;
    g.dh = b.output(m, c.outputs);
  } else {
    g.da = whole(m, c.rank, true);
  }
  g.dz = b.floats(m * c.rank);
  const ClusterSizes sizes = adapter_cluster_sizes(c.dtype, g);
  emulator::require(sizes.clusters > 0, "the one-pass backward does not take this case");
  g.workspace = b.floats(sizes.workspace);
  g.g_up = b.floats(c.outputs * c.rank);
  g.dy_sum = b.floats(c.outputs);
  g.dw_down = b.floats(c.rank * c.channels);
  g.da_sum = b.floats(c.rank);
  adapter_cluster_backward(c.dtype, g, sizes.clusters, nullptr);
  b.expect_finite("one-pass dh", g.dh);
  b.expect_finite("one-pass da", g.da);
  b.expect_finite("one-pass dz", g.dz, m * c.rank);
  b.expect_finite("one-pass g_up", g.g_up, c.outputs * c.rank);
  b.expect_finite("one-pass dy_sum", g.dy_sum, c.outputs);
  b.expect_finite("one-pass dw_down", g.dw_down, c.rank * c.channels);
  b.expect_finite("one-pass da_sum", g.da_sum, c.rank);
}

// Three samples: with the bank's last adapter, without one, with its first.
void run_bank(DType dtype, int64_t tokens, int64_t channels, int64_t rank, bool aligned) {
  Buffers b(dtype, aligned);
  const float scale[] = {0.5f, 2.0f};
  const int32_t index[] = {1, -1, 0};
  AdapterBank a{};
  a.samples = 3;
  a.adapters = 2;
  a.rank = rank;
  a.h = b.input(3 * tokens, channels);
  a.w_down = b.vector(2 * rank * channels).data;
  a.w_up = b.vector(2 * channels * rank).data;
  a.b_down = b.vector(2 * rank).data;
  a.b_up = b.vector(2 * channels).data;
  a.scale = scale;
  a.index = index;
  a.activation = 2;
  for (const Matrix& residual : {a.h, b.input(3 * tokens, channels)}) {
    a.residual = residual;
    a.y = {b.output(1, 3 * tokens * channels).data, 3 * tokens, channels, channels};
    adapter_bank(dtype, a, nullptr);
    b.expect_finite("bank y", a.y);
  }
}

void run_elementwise(DType dtype, int64_t m, int64_t width, bool aligned) {
  Buffers b(dtype, aligned);
  Geglu g{};
  g.p = b.input(m, 2 * width);
  g.out = b.output(m, width);
  g.activation = 2;
  geglu(dtype, g, nullptr);
  b.expect_finite("geglu y", g.out);
  g.dy = b.input(m, width);
  g.out = b.output(m, 2 * width);
  geglu(dtype, g, nullptr);
  b.expect_finite("geglu dp", g.out);

  const int64_t n = m * width;
  const Matrix x = b.input(1, n), back = b.output(1, n);
  std::vector<int8_t> codes(static_cast<size_t>(n));
  std::vector<uint16_t> ranges(static_cast<size_t>(2 * ceil_div(n, 128)));
  const Quantized kept{codes.data(), ranges.data(), n};
  quantize(dtype, x.data, kept, nullptr);
  dequantize(dtype, kept, back.data, nullptr);
  b.expect_finite("dequantized", back);
}

void run_layer_norm(DType dtype, int64_t rows, int64_t channels, bool aligned) {
  Buffers b(dtype, aligned);
  LayerNorm l{};
  l.x = b.input(rows, channels);
  l.out = {b.output(1, rows * channels).data, rows, channels, channels};
  l.weight = b.vector(channels);
  l.bias = b.vector(channels);
  l.mean = b.floats(rows);
  l.rstd = b.floats(rows);
  l.eps = 1e-5f;
  layer_norm(dtype, l, nullptr);
  b.expect_finite("layer_norm y", l.out);
  b.expect_finite("layer_norm rstd", l.rstd, rows);
  l.dy = b.input(rows, channels);
  l.out.data = b.output(1, rows * channels).data;
  layer_norm(dtype, l, nullptr);
  b.expect_finite("layer_norm dx", l.out);
}

void run_group_norm(DType dtype, int64_t samples, int64_t channels, int64_t positions,
                    int64_t groups, bool aligned) {
  Buffers b(dtype, aligned);
  const int64_t size = samples * channels * positions;
  const Vector weight = b.vector(channels), bias = b.vector(channels);
  for (const bool last : {false, true}) {
    GroupNorm g{};
    const Matrix x = b.input(1, size), y = b.output(1, size);
    g.x = x.data;
    g.out = y.data;
    g.weight = weight;
    g.bias = bias;
    g.mean = b.floats(samples * groups);
    g.rstd = b.floats(samples * groups);
    g.samples = samples;
    g.channels = channels;
    g.positions = positions;
    g.groups = groups;
    g.last = last;
    g.activation = 4;
    g.eps = 1e-5f;
    g.workspace = b.floats(group_norm_workspace(dtype, g));
    group_norm(dtype, g, nullptr);
    b.expect_finite("group_norm y", y);
    b.expect_finite("group_norm mean", g.mean, samples * groups);
    const Matrix dx = b.output(1, size);
    g.dy = b.input(1, size).data;
    g.out = dx.data;
    g.workspace = b.floats(group_norm_workspace(dtype, g));
    group_norm(dtype, g, nullptr);
    b.expect_finite("group_norm dx", dx);
  }
}

// Rows so far into memory that their elements have no 32-bit index: first by their stride, then
// by their number.
void run_far(int64_t m, int64_t stride, bool last_only) {
  const int64_t channels = 8;
  const int64_t rank = 8;
  const int64_t bytes = 2 * ((m - 1) * stride + channels);
  const auto reserve = [](int64_t size) {
    void* data = mmap(nullptr, static_cast<size_t>(size), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    emulator::require(data != MAP_FAILED, "no address space for gigabytes", size);
    return data;
  };
  Buffers b(DType::bf16, true);
  AdapterForward f{};
  f.h = {reserve(bytes), m, channels, stride};
  f.y = {reserve(bytes), m, channels, stride};
  f.a = {reserve(2 * m * rank), m, rank, rank};
  f.w_down = b.input(rank, channels);
  f.w_up = b.input(channels, rank);
  uint16_t* const h = static_cast<uint16_t*>(f.h.data) + (m - 1) * stride;
  const uint16_t* const y = static_cast<const uint16_t*>(f.y.data) + (m - 1) * stride;
  for (int64_t i = 0; i < channels; ++i) h[i] = __float2bfloat16_rn(1.0f).bits;
  emulator::require(adapter_rows_fits(DType::bf16, f), "the one-pass forward does not take this");
  emulator::run_last_only(last_only);
  adapter_rows_forward(DType::bf16, f, nullptr);
  emulator::run_last_only(false);
  const auto expect_written = [&] {
    float sum = 0.0f;
    for (int64_t i = 0; i < channels; ++i) sum += std::fabs(__bfloat162float({y[i]}));
    emulator::require(sum > 1.0f, "the last row was not written");
  };
  expect_written();
  if (!last_only) {
    AdapterCluster g{};
    g.dy = g.h = f.h;
    g.a = f.a;
    g.w_up = f.w_up;
    g.w_down = f.w_down;
    g.dh = f.y;
    const ClusterSizes sizes = adapter_cluster_sizes(DType::bf16, g);
    emulator::require(sizes.clusters > 0, "the one-pass backward does not take this");
    std::memset(static_cast<uint16_t*>(f.y.data) + (m - 1) * stride, 0, 2 * channels);
    adapter_cluster_backward(DType::bf16, g, sizes.clusters, nullptr);
    expect_written();
  }
  Geglu pair{};
  pair.p = {f.h.data, m, channels, stride};
  pair.out = {f.y.data, m, channels / 2, stride};
  pair.activation = 2;
  std::memset(static_cast<uint16_t*>(f.y.data) + (m - 1) * stride, 0, 2 * channels);
  if (!last_only) {
    geglu(DType::bf16, pair, nullptr);
    expect_written();
  }
  munmap(f.h.data, static_cast<size_t>(bytes));
  munmap(f.y.data, static_cast<size_t>(bytes));
  munmap(f.a.data, static_cast<size_t>(2 * m * rank));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) {
    run_planted(argv[1]);
    std::puts("not found");
    return 0;
  }
  emulator::deliver_late(false);
  for (const DType dtype : {DType::fp32, DType::fp16, DType::bf16}) {
    for (const bool aligned : {true, false}) {
      run({dtype, 1, 1, 1, 1, 1, 0, 0, aligned});
      run({dtype, 3, 23, 40, 8, 24, 0, 0, aligned});
      run({dtype, 2, 33, 67, 70, 131, 5, 9, aligned});
      run({dtype, 1, 64, 64, 64, 128, 8, 64, aligned});
      run_bank(dtype, 1, 1, 1, aligned);
      run_bank(dtype, 23, 40, 8, aligned);
      run_bank(dtype, 67, 131, 70, aligned);
      run_bank(dtype, 33, 264, 64, aligned);
      run_elementwise(dtype, 1, 1, aligned);
      run_elementwise(dtype, 23, 40, aligned);
      run_elementwise(dtype, 9, 131, aligned);
      run_layer_norm(dtype, 1, 1, aligned);
      run_layer_norm(dtype, 70, 24, aligned);
      run_layer_norm(dtype, 9, 520, aligned);
      run_group_norm(dtype, 1, 1, 1, 1, aligned);
      run_group_norm(dtype, 2, 24, 35, 3, aligned);
      run_group_norm(dtype, 3, 40, 16, 4, aligned);
      // groups of more than one part
      run_group_norm(dtype, 1, 10, 6600, 2, aligned);
    }
    run({dtype, 1, 600, 16, 4, 8, 0, 8, true});
    if (dtype == DType::fp32) continue;
    run_one_pass({dtype, 1, 1, 8, 1, 8, 0, 0, true});
    run_one_pass({dtype, 3, 43, 136, 20, 136, 0, 0, true});
    run_one_pass({dtype, 2, 33, 264, 64, 264, 0, 0, true});
    run_one_pass({dtype, 2, 33, 72, 32, 280, 0, 0, true});
  }
  // more blocks of rows than clusters
  emulator::use_chip({90, 2, 227 * 1024, 228 * 1024});
  run_one_pass({DType::bf16, 1, 330, 264, 50, 264, 0, 0, true});
  run_far(3, (int64_t{1} << 30) + 8, false);
  run_far((int64_t{1} << 31) / 8 + 1, 8, true);
  std::puts("clean");
}
