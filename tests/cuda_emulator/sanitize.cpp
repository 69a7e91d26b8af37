// Runs every launcher on exactly-sized heap buffers at awkward sizes, for the sanitizers: reads
// and writes out of bounds, races between barriers, undefined behaviour. Results are only checked
// to be written and finite; their values are checked elsewhere.
#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "../../csrc/cuda/adapter.h"
#include "../../csrc/cuda/adapter_cluster.h"
#include "../../csrc/cuda/adapter_linear.h"
#include "../../csrc/cuda/geglu.h"
#include "../../csrc/cuda/norm.h"
#include "../../csrc/cuda/product.h"
#include "../../csrc/cuda/quantize.h"
#include "../../csrc/cuda/row_sums.h"
#include "../../csrc/cuda/tile.cuh"
#include "emulator.h"
#include "planted.h"

using namespace a3fta::cuda;

namespace {

struct Case {
  DType dtype;
  int64_t samples, tokens, channels, rank, outputs, before, after;  // columns around the slice
  bool aligned;  // rows start at multiples of 16 bytes
};

const float kNaN = NAN;

// Buffers of one case: inputs hold small numbers, outputs and the gaps between rows NaN.
class Buffers {
 public:
  explicit Buffers(const Case& c) : dtype_(c.dtype), aligned_(c.aligned) {}

  Matrix input(int64_t rows, int64_t cols) { return make(rows, cols, false); }
  Matrix output(int64_t rows, int64_t cols) { return make(rows, cols, true); }
  Vector vector(int64_t size) { return {make(1, size, false).data, false}; }
  float* floats(int64_t count) {
    float* data = static_cast<float*>(allocate(count * 4));
    for (int64_t i = 0; i < count; ++i) data[i] = kNaN;
    return data;
  }

  void expect_finite(const char* what, const Matrix& m) {
    for (int64_t i = 0; i < m.rows; ++i) {
      for (int64_t j = 0; j < m.cols; ++j) expect(what, load(m, i * m.stride + j));
    }
  }
  void expect_finite(const char* what, const float* data, int64_t count) {
    for (int64_t i = 0; i < count; ++i) expect(what, data[i]);
  }

 private:
  Matrix make(int64_t rows, int64_t cols, bool out) {
    const int64_t size = dtype_ == DType::fp32 ? 4 : 2;
    int64_t stride = cols + 1;
    if (aligned_) stride = (cols * size + 15) / 16 * 16 / size;
    const int64_t count = rows == 0 ? 0 : (rows - 1) * stride + cols;  // ends with the last row
    const Matrix m{allocate(count * size), rows, cols, stride};
    for (int64_t i = 0; i < count; ++i) {
      const bool gap = i % stride >= cols;
      next_ = next_ * 1664525u + 1013904223u;
      store(m, i, out || gap ? kNaN : static_cast<float>(next_ >> 24) / 256.0f - 0.5f);
    }
    return m;
  }
  void* allocate(int64_t bytes) {
    held_.emplace_back(std::malloc(static_cast<size_t>(bytes)), std::free);
    return held_.back().get();
  }
  float load(const Matrix& m, int64_t i) const {
    if (dtype_ == DType::fp32) return static_cast<float*>(m.data)[i];
    const uint16_t bits = static_cast<uint16_t*>(m.data)[i];
    return dtype_ == DType::fp16 ? __half2float(__half{bits})
                                 : __bfloat162float(__nv_bfloat16{bits});
  }
  void store(const Matrix& m, int64_t i, float x) const {
    if (dtype_ == DType::fp32) {
      static_cast<float*>(m.data)[i] = x;
    } else {
      static_cast<uint16_t*>(m.data)[i] =
          dtype_ == DType::fp16 ? __float2half_rn(x).bits : __float2bfloat16_rn(x).bits;
    }
  }
  static void expect(const char* what, float x) {
    if (!std::isfinite(x)) {
      std::fprintf(stderr, "%s: not written, or not finite\n", what);
      std::exit(1);
    }
  }

  DType dtype_;
  bool aligned_;
  uint32_t next_ = 1;
  std::vector<std::unique_ptr<void, void (*)(void*)>> held_;
};

void run(const Case& c) {
  Buffers b(c);
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
  Buffers b(c);
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

void run_elementwise(DType dtype, int64_t m, int64_t width, bool aligned) {
  Buffers b({dtype, 1, 1, 1, 1, 1, 0, 0, aligned});
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

void run_norms(DType dtype, int64_t samples, int64_t channels, int64_t positions, int64_t groups,
               bool aligned) {
  Buffers b({dtype, 1, 1, 1, 1, 1, 0, 0, aligned});
  const int64_t rows = samples * positions;
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

  for (const bool last : {false, true}) {
    GroupNorm g{};
    const Matrix x = b.input(1, rows * channels), y = b.output(1, rows * channels);
    g.x = x.data;
    g.out = y.data;
    g.weight = l.weight;
    g.bias = l.bias;
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
    const Matrix dx = b.output(1, rows * channels);
    g.dy = b.input(1, rows * channels).data;
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
  Buffers b({DType::bf16, 1, 1, 1, 1, 1, 0, 0, true});
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
      run_elementwise(dtype, 1, 1, aligned);
      run_elementwise(dtype, 23, 40, aligned);
      run_elementwise(dtype, 9, 131, aligned);
      run_norms(dtype, 1, 1, 1, 1, aligned);
      run_norms(dtype, 2, 24, 35, 3, aligned);
      run_norms(dtype, 3, 40, 16, 4, aligned);
      run_norms(dtype, 1, 10, 6600, 2, aligned);
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
