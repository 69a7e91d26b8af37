// Runs the Hopper products on exactly-sized heap buffers for the sanitizers, as sanitize.cpp does
// for the others; with a name as its argument, a small product with that mistake planted, which
// the emulator, a sanitizer or the result must show.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "../../csrc/cuda/hopper_gemm.h"
#include "emulator.h"
#include "hopper.h"

using namespace a3fta::cuda;

namespace {

uint16_t bits(DType dtype, float x) {
  return dtype == DType::fp16 ? __float2half_rn(x).bits : __float2bfloat16_rn(x).bits;
}

class Buffers {
 public:
  explicit Buffers(DType dtype) : dtype_(dtype) {}

  // small numbers, or NaN
  Matrix matrix(int64_t rows, int64_t cols, bool out = false) {
    auto* data = static_cast<uint16_t*>(allocate(rows * cols * 2));
    for (int64_t i = 0; i < rows * cols; ++i) {
      next_ = next_ * 1664525u + 1013904223u;
      data[i] = bits(dtype_, out ? NAN : static_cast<float>(next_ >> 24) / 256.0f - 0.5f);
    }
    return {data, rows, cols, cols};
  }
  Vector vector(int64_t size) { return {matrix(1, size).data, false}; }
  void expect_finite(const char* what, const Matrix& m) const {
    const auto* data = static_cast<const uint16_t*>(m.data);
    for (int64_t i = 0; i < m.rows * m.cols; ++i) {
      const float x = dtype_ == DType::fp16 ? __half2float(__half{data[i]})
                                            : __bfloat162float(__nv_bfloat16{data[i]});
      if (std::isfinite(x)) continue;
      std::fprintf(stderr, "%s: not written, or not finite\n", what);
      std::exit(1);
    }
  }

 private:
  void* allocate(int64_t bytes) {
    held_.emplace_back(std::malloc(static_cast<size_t>(bytes)), std::free);
    return held_.back().get();
  }

  DType dtype_;
  uint32_t next_ = 1;
  std::vector<std::unique_ptr<void, void (*)(void*)>> held_;
};

// K wider than the ring, and more tiles than blocks: stages are filled again, also across tiles
void run_products(DType dtype) {
  Buffers b(dtype);
  const int64_t m = 130, n = 136, k = 456, rank = 24, start = 64, channels = 128;
  AdapterLinearForward f{};
  f.h = b.matrix(m, k);
  f.weight = b.matrix(n, k);
  f.w_down = b.matrix(rank, channels);
  f.v = b.matrix(n, rank);
  f.bias = b.vector(n);
  f.b_down = b.vector(rank);
  f.modulation = {b.vector(2 * rank).data, b.vector(2 * rank).data, m / 2};
  f.residual = b.matrix(m, n);
  f.start = start;
  f.activation = 2;
  f.y = b.matrix(m, n, true);
  f.a = b.matrix(m, rank, true);
  emulator::require(hopper_takes(dtype, f), "the fused product was refused");
  hopper_adapter_linear(dtype, f, nullptr);
  b.expect_finite("fused y", f.y);
  b.expect_finite("fused a", f.a);

  Product c{};
  c.a = f.h;
  c.b = f.weight;
  c.a2 = b.matrix(m, rank);
  c.b2 = f.v;
  c.bias = f.bias;
  c.residual = f.residual;
  c.y = b.matrix(m, n, true);
  emulator::require(hopper_takes(dtype, true, c), "the K-concat product was refused");
  hopper_product(dtype, true, c, nullptr);
  b.expect_finite("concat", c.y);

  Product d{};
  d.a = b.matrix(m, n);
  d.b = f.weight;
  d.a2 = c.a2;
  d.b2 = f.w_down;
  d.start = start;
  d.y = b.matrix(m, k, true);
  emulator::require(hopper_takes(dtype, false, d), "dh's product was refused");
  hopper_product(dtype, false, d, nullptr);
  b.expect_finite("dgrad", d.y);
}

enum class Mistake {
  none,
  unmade_barriers,   // nobody publishes them
  no_syncthreads,    // others may come before they are made
  unwaited_load,     // products of what has not landed
  early_release,     // a stage given back while products read it
  never_released,
  no_fence,
  unwaited_product,  // sums used too soon
  two_shapes,        // at work on the same sums
  one_thread_less,   // in a warpgroup's instruction
  other_stride,      // in a descriptor
};
const char* const kNames[] = {"none",           "unmade_barriers", "no_syncthreads",
                              "unwaited_load",  "early_release",   "never_released",
                              "no_fence",       "unwaited_product", "two_shapes",
                              "one_thread_less", "other_stride"};

// out (64, 128) = the sum over steps of a (64, 64 per step) @ b (128, 64 per step).T
template <Mistake MISTAKE>
void small_product(const CUtensorMap a, const CUtensorMap b, int steps, float* out) {
  constexpr int kStages = 2, kA = 64 * 128, kStage = kA + 128 * 128;
  unsigned char* const base = emulator::shared_memory();
  unsigned char* const stages = base + (1024 - shared_address(base) % 1024) % 1024;
  Barrier* const full = reinterpret_cast<Barrier*>(stages + kStages * kStage);
  Barrier* const empty = full + kStages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      full[i].init(1);
      empty[i].init(4);
    }
    if (MISTAKE != Mistake::unmade_barriers) publish_barriers();
  }
  if (MISTAKE != Mistake::no_syncthreads) __syncthreads();
  if (threadIdx.x < 128) {
    for (int i = 0; threadIdx.x == 0 && i < steps; ++i) {
      empty[i % kStages].wait(i / kStages % 2 ^ 1);
      full[i % kStages].arrive_and_expect(kStage);
      load_box(stages + i % kStages * kStage, &a, &full[i % kStages], i * 64, 0);
      load_box(stages + i % kStages * kStage + kA, &b, &full[i % kStages], i * 64, 0);
    }
    return;
  }
  float sums[64];
  for (int i = 0; i < steps; ++i) {
    const int stage = i % kStages;
    if (MISTAKE != Mistake::unwaited_load || i + kStages < steps) {
      full[stage].wait(i / kStages % 2);
    }
    const uint64_t left = matrix_descriptor(stages + stage * kStage, 0, 1024);
    const uint64_t right = matrix_descriptor(stages + stage * kStage + kA, 0,
                                             MISTAKE == Mistake::other_stride ? 2048 : 1024);
    if (MISTAKE != Mistake::no_fence) wgmma_fence();
    for (int k = 0; k < 4; ++k) {
      if (MISTAKE == Mistake::one_thread_less && threadIdx.x == 200) continue;
      Wgmma<128>::from_shared<__nv_bfloat16, 0>(sums, left + 2 * k, right + 2 * k, i + k > 0);
    }
    if (MISTAKE == Mistake::two_shapes && i == 1) {
      Wgmma<64>::from_shared<__nv_bfloat16, 0>(sums, left, right, true);
    }
    wgmma_commit();
    if (MISTAKE == Mistake::early_release && threadIdx.x % 32 == 0) empty[stage].arrive();
    const bool last = i + 1 == steps;
    if (!(MISTAKE == Mistake::unwaited_product && last)) wgmma_finish(sums);
    const bool releases =
        MISTAKE != Mistake::early_release && MISTAKE != Mistake::never_released;
    if (releases && threadIdx.x % 32 == 0) empty[stage].arrive();
  }
  for (int i = 0; i < 64; ++i) {
    const int row = emulator::fragment_row(i / 2 % 2);
    out[row * 128 + emulator::fragment_column(i / 4, i % 2)] = sums[i];
  }
  if (MISTAKE == Mistake::unwaited_product) wgmma_finish(sums);
}

template <int MISTAKE>
void run_planted(const char* name) {
  if constexpr (MISTAKE < static_cast<int>(std::size(kNames))) {
    if (std::strcmp(name, kNames[MISTAKE]) != 0) return run_planted<MISTAKE + 1>(name);
    constexpr int kSteps = 7, kDepth = 64 * kSteps;
    Buffers buffers(DType::bf16);
    const Matrix a = buffers.matrix(64, kDepth), b = buffers.matrix(128, kDepth);
    CUtensorMap maps[2];
    for (int i = 0; i < 2; ++i) {
      const Matrix& m = i == 0 ? a : b;
      const uint64_t sizes[2] = {kDepth, static_cast<uint64_t>(m.rows)}, stride = kDepth * 2;
      const uint32_t box[2] = {64, static_cast<uint32_t>(m.rows)}, ones[2] = {1, 1};
      cuTensorMapEncodeTiled(&maps[i], CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, m.data, sizes,
                             &stride, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
                             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    }
    std::vector<float> out(64 * 128, NAN);
    const auto kernel = small_product<static_cast<Mistake>(MISTAKE)>;
    const auto* address = reinterpret_cast<const void*>(kernel);
    constexpr int kShared = 2 * (64 + 128) * 128 + 1024 + 64;
    emulator::allow_shared(address, kShared);
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(1, 1, 1);
    config.blockDim = dim3(256, 1, 1);
    config.dynamicSmemBytes = kShared;
    cudaLaunchKernelEx(&config, kernel, maps[0], maps[1], kSteps, out.data());
    bool right = true;
    const auto at = [](const Matrix& m, int64_t row, int64_t k) {
      return __bfloat162float({static_cast<const uint16_t*>(m.data)[row * kDepth + k]});
    };
    for (int64_t i = 0; i < 64 * 128; ++i) {
      float sum = 0.0f;
      for (int64_t k = 0; k < kDepth; ++k) sum += at(a, i / 128, k) * at(b, i % 128, k);
      right = right && std::fabs(sum - out[i]) < 1e-3f;
    }
    std::puts(right ? "right" : "wrong");
  } else {
    std::puts("no such mistake");
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) {
    run_planted<0>(argv[1]);
    return 0;
  }
  emulator::use_chip({90, 2, 227 * 1024, 228 * 1024});
  run_products(DType::bf16);
  run_products(DType::fp16);
  std::puts("clean");
}
