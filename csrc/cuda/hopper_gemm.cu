// The wide products of adapter_linear on Hopper, one kernel for three uses:
//
//     fused   y = h @ weight.T + z @ v.T + bias + residual, where z comes from
//             a = h[:, start : start + C] @ w_down.T + b_down on the way
//     concat  y = [h, z] @ [weight, v].T + bias + residual
//     dgrad   dh = dy @ weight, and da @ w_down on top in columns start .. start + C
//
// A block is three warpgroups: one thread of the first keeps a ring of shared-memory stages full,
// the other two own 64 rows each of a 128 x BLOCK_N tile of the output and multiply. A step of the
// reduction is 64 wide. Fused, the rows of w_down stand below those of the weight in the same
// stage, so that one instruction multiplies h by both; the last RANK columns of its sums are a,
// which becomes z in registers, the left operand of a last product with v. The grid is
// persistent: while the sums of a tile are stored, the ring fills for the next.

#include "hopper_gemm.h"

#include <cuda.h>

#include "bottleneck.cuh"
#include "hopper.cuh"
#include "hopper_plan.h"
#include "hopper_store.cuh"
#include "tensor_map.h"

namespace a3fta::cuda {
namespace {

constexpr int kGroup = 128;  // threads of a warpgroup
constexpr int kBlockThreads = 3 * kGroup;
constexpr int kRowBytes = 128;  // one k-step of a row
constexpr int kAtom = 8 * kRowBytes;  // the swizzle repeats every 8 rows
constexpr int kHopperShared = 227 * 1024;

template <typename T>
struct Params {
  CUtensorMap a, b;    // fused: h, weight; concat: the same; dgrad: dy, weight
  CUtensorMap a2, b2;  // fused: w_down, v; concat: z, v; dgrad: da, w_down
  HopperPlan plan;
  int64_t rows, depth, rank;
  int64_t start, length;  // fused: the adapter's part of the depth
  Output<T> out;
  Vector b_down;
  Bottleneck<T> middle;
  T* bottleneck;  // fused: a, out
};

template <int BLOCK_N, int RANK>
struct Shared {
  static constexpr int kLeft = kHopperBlockM * kRowBytes;
  static constexpr int kRight = BLOCK_N * kRowBytes;
  static constexpr int kDown = RANK * kRowBytes;
  static constexpr int kStage = kLeft + kRight + kDown;
  static constexpr int kSpare = kAtom + 256;  // to align the first stage, and for the barriers
  static constexpr int kFit = (kHopperShared - kSpare) / kStage;
  static constexpr int kStages = kFit < 6 ? kFit : 6;
  static constexpr int kBytes = kStages * kStage + kSpare;
  static_assert(kStage % kAtom == 0 && kStages >= 3 && kBytes <= kHopperShared);
};

// Where a warpgroup is in the ring. The parity tells this round's fill of a stage from the last.
template <int STAGES>
struct Position {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Fills the ring for one tile; run by one thread.
template <typename T, HopperUse USE, int BLOCK_N, int RANK, typename Ring>
__device__ __forceinline__ void produce(const Params<T>& p, const HopperTile& tile,
                                        unsigned char* stages, Barrier* full, Barrier* empty,
                                        Ring& ring) {
  using S = Shared<BLOCK_N, RANK>;
  const auto fill = [&](int bytes, auto copies) {
    empty[ring.stage].wait(ring.parity ^ 1);
    full[ring.stage].arrive_and_expect(bytes);
    copies(stages + ring.stage * S::kStage, &full[ring.stage]);
    ring.advance();
  };
  const int row0 = static_cast<int>(tile.row0);
  const auto load_right = [&](unsigned char* to, const CUtensorMap* map, Barrier* barrier,
                              int64_t n0, int64_t k) {
    if constexpr (USE == HopperUse::dgrad) {
#pragma unroll
      for (int n = 0; n < BLOCK_N; n += hopper_box(BLOCK_N)) {
        load_box(to + n * kRowBytes, map, barrier, static_cast<int>(n0 + n), static_cast<int>(k));
      }
    } else {
      load_box(to, map, barrier, static_cast<int>(k), static_cast<int>(n0));
    }
  };

  const int64_t n0 = hopper_run(p.plan, tile.run).begin + tile.n0;
  for (int64_t k = 0; k < p.depth; k += kHopperBlockK) {
    const bool down =
        USE == HopperUse::fused && k >= p.start && k < p.start + p.length;
    fill(S::kLeft + S::kRight + (down ? S::kDown : 0), [&](unsigned char* to, Barrier* barrier) {
      load_box(to, &p.a, barrier, static_cast<int>(k), row0);
      load_right(to + S::kLeft, &p.b, barrier, n0, k);
      if (down) {
        load_box(to + S::kLeft + S::kRight, &p.a2, barrier, static_cast<int>(k - p.start), 0);
      }
    });
  }
  if (tile.run != 1) return;
  for (int64_t k = 0; k < p.rank; k += kHopperBlockK) {
    constexpr bool kLeftToo = USE != HopperUse::fused;
    fill(S::kRight + (kLeftToo ? S::kLeft : 0), [&](unsigned char* to, Barrier* barrier) {
      if (kLeftToo) load_box(to, &p.a2, barrier, static_cast<int>(k), row0);
      load_right(to + S::kLeft, &p.b2, barrier, tile.n0, k);
    });
  }
}

// Multiplies what `produce` brings, for the 64 rows of one warpgroup; then stores them.
template <typename T, HopperUse USE, int BLOCK_N, int RANK, typename Ring>
__device__ __forceinline__ void consume(const Params<T>& p, const HopperTile& tile,
                                        unsigned char* stages, Barrier* full, Barrier* empty,
                                        Ring& ring) {
  using S = Shared<BLOCK_N, RANK>;
  constexpr int kTranspose = USE == HopperUse::dgrad ? 1 : 0;
  // a transposed operand: 64 rows of this many bytes, then the next columns
  constexpr int kBoxBytes = hopper_box(BLOCK_N) * 2;
  // 16 elements of the reduction further on, in the 16-byte units of a descriptor
  constexpr int kNextLeft = 16 * 2 / 16;
  constexpr int kNextRight = kTranspose ? 16 * kBoxBytes / 16 : kNextLeft;
  const int group = warp_uniform(static_cast<int>(threadIdx.x) / kGroup - 1);
  float sums[(BLOCK_N + RANK) / 2];
#pragma unroll
  for (int i = BLOCK_N / 2; i < (BLOCK_N + RANK) / 2; ++i) sums[i] = 0.0f;
  bool started = false;
  int reading = -1;  // the stage that the products under way read

  const auto left = [&] {
    return matrix_descriptor(stages + ring.stage * S::kStage + group * 64 * kRowBytes, 0, kAtom);
  };
  const auto right = [&] {
    const unsigned char* const start = stages + ring.stage * S::kStage + S::kLeft;
    if (kTranspose == 0) return matrix_descriptor(start, 0, kAtom);
    return matrix_descriptor(start, kHopperBlockK * kBoxBytes, 8 * kBoxBytes,
                             kBoxBytes == 128 ? Swizzle::bytes128 : Swizzle::bytes64);
  };
  // every warp gives the stage back once its own products have read it
  const auto release = [&] {
    if (reading >= 0 && threadIdx.x % 32 == 0) empty[reading].arrive();
  };
  const auto commit = [&] {
    wgmma_commit();
    wgmma_wait<1>();
    release();
    reading = ring.stage;
    ring.advance();
  };
  const auto finish = [&] {
    wgmma_finish(sums);
    release();
    reading = -1;
  };
  // one stage's products, 16 of the reduction each
  const auto step = [&](auto width, auto count) {
    full[ring.stage].wait(ring.parity);
    const uint64_t a = left(), b = right();
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < decltype(count)::value; ++k) {
      Wgmma<decltype(width)::value>::template from_shared<T, kTranspose>(
          sums, a + k * kNextLeft, b + k * kNextRight, started || k > 0);
    }
    started = true;
    commit();
  };
  // `width` columns an instruction; between two widths all products finish. Of the last step the
  // part beyond the depth is zero: most of it is left out.
  const auto multiply = [&](auto width, int64_t depth) {
    for (; depth > 32; depth -= kHopperBlockK) step(width, std::integral_constant<int, 4>{});
    if (depth > 16) {
      step(width, std::integral_constant<int, 2>{});
    } else if (depth > 0) {
      step(width, std::integral_constant<int, 1>{});
    }
  };

  const std::integral_constant<int, BLOCK_N> narrow{};
  if constexpr (USE == HopperUse::fused) {
    const std::integral_constant<int, BLOCK_N + RANK> wide{};
    if (p.start > 0) {
      multiply(narrow, p.start);
      finish();
    }
    multiply(wide, p.length);
    finish();
    if (p.start + p.length < p.depth) {
      multiply(narrow, p.depth - p.start - p.length);
      finish();
    }
    uint32_t z[RANK / 16][4];
    make_z<RANK, T>(sums + BLOCK_N / 2, tile.row0 + group * 64, p.rows, tile.first, p.b_down,
                    p.middle, p.bottleneck, z);
    full[ring.stage].wait(ring.parity);
    const uint64_t b = right();
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < RANK / 16; ++k) {
      Wgmma<BLOCK_N>::template from_registers<T>(sums, z[k], b + k * kNextRight);
    }
    commit();
    finish();  // z is read until here
  } else {
    multiply(narrow, p.depth);
    if (tile.run == 1) multiply(narrow, p.rank);
    finish();
  }
  const HopperRun run = hopper_run(p.plan, tile.run);
  store_sums<BLOCK_N>(sums, tile.row0 + group * 64, p.rows, run.begin + tile.n0,
                      run.begin + run.length, p.out);
}

template <typename T, HopperUse USE, int BLOCK_N, int RANK>
__global__ void __launch_bounds__(kBlockThreads, 1)
    hopper_kernel(const __grid_constant__ Params<T> p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = Shared<BLOCK_N, RANK>;
  unsigned char* const base = shared_memory();
  unsigned char* const stages = base + (kAtom - shared_address(base) % kAtom) % kAtom;
  Barrier* const full = reinterpret_cast<Barrier*>(stages + S::kStages * S::kStage);
  Barrier* const empty = full + S::kStages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      full[i].init(1);
      empty[i].init(2 * kGroup / 32);
    }
    publish_barriers();
    prefetch_map(&p.a);
    prefetch_map(&p.b);
  }
  __syncthreads();

  // 64 K registers: 168 per thread at the start, then 40 and twice 232
  Position<S::kStages> ring;
  if (threadIdx.x < kGroup) {
    lower_registers<40>();
    if (threadIdx.x == 0) {
      for (int64_t i = blockIdx.x; i < p.plan.tiles(); i += gridDim.x) {
        produce<T, USE, BLOCK_N, RANK>(p, hopper_tile(p.plan, i), stages, full, empty, ring);
      }
    }
  } else {
    raise_registers<232>();
    for (int64_t i = blockIdx.x; i < p.plan.tiles(); i += gridDim.x) {
      consume<T, USE, BLOCK_N, RANK>(p, hopper_tile(p.plan, i), stages, full, empty, ring);
    }
  }
#endif
}

// Whether the device runs the kernel's code: elsewhere its body is empty.
bool chip_fits() {
#if defined(A3FTA_SM90A) || !defined(__CUDACC__)
  return chip().capability == 90;
#else
  return false;
#endif
}

// what 32-bit coordinates reach, with a tile to spare
constexpr int64_t kLargest = INT32_MAX - 256;

bool takes(const Matrix& m) {
  return tensor_map_takes(m) && m.rows <= kLargest && m.cols <= kLargest;
}

// what is read or written 16 bytes at a time, by whole rows
bool vectors(const Matrix& m) {
  return m.data == nullptr || (takes(m) && m.cols % 8 == 0);
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <typename T, HopperUse USE, int BLOCK_N, int RANK>
void launch_kernel(const Params<T>& p, cudaStream_t stream) {
  const auto kernel = hopper_kernel<T, USE, BLOCK_N, RANK>;
  constexpr int kBytes = Shared<BLOCK_N, RANK>::kBytes;
  Grid grid{};
  grid.x = p.plan.blocks;
  grid.threads = kBlockThreads;
  grid.shared_bytes = grid.shared_limit = kBytes;
  launch("hopper_kernel", kernel, grid, stream, p);
}

template <typename T, HopperUse USE, int BLOCK_N>
void launch_fused(const Params<T>& p, cudaStream_t stream) {
  switch (p.plan.rank_padded) {
    case 16:
      return launch_kernel<T, USE, BLOCK_N, 16>(p, stream);
    case 32:
      return launch_kernel<T, USE, BLOCK_N, 32>(p, stream);
    default:
      return launch_kernel<T, USE, BLOCK_N, 64>(p, stream);
  }
}

template <typename T>
Output<T> output(const Vector& bias, const Matrix& residual, const Matrix& y) {
  return {bias, static_cast<const T*>(residual.data), residual.stride, static_cast<T*>(y.data),
          y.stride};
}

}  // namespace

bool hopper_takes(DType dtype, const AdapterLinearForward& args) {
  const int64_t length = args.w_down.cols;
  const bool whole_steps =
      args.start % kHopperBlockK == 0 &&
      (length % kHopperBlockK == 0 || args.start + length == args.h.cols);
  return dtype != DType::fp32 && args.w_down.rows <= 64 && whole_steps && takes(args.h) &&
         takes(args.weight) && takes(args.w_down) && vectors(args.v) && vectors(args.residual) &&
         vectors(args.y) && aligned(args.bias.data) && aligned(args.b_down.data) &&
         aligned(args.a.data) && aligned(args.modulation.gamma) &&
         aligned(args.modulation.beta) && chip_fits();
}

bool hopper_takes(DType dtype, bool transposed, const Product& args) {
  const bool slice = transposed || (args.start % 8 == 0 && args.b2.cols % 8 == 0);
  return dtype != DType::fp32 && slice && takes(args.a) && takes(args.b) && takes(args.a2) &&
         takes(args.b2) && vectors(args.residual) && vectors(args.y) &&
         aligned(args.bias.data) && chip_fits();
}

void hopper_adapter_linear(DType dtype, const AdapterLinearForward& args, cudaStream_t stream) {
  const int64_t n = args.weight.rows;
  const HopperPlan plan = hopper_plan(HopperUse::fused, args.h.rows, n, args.h.cols,
                                      args.w_down.rows, 0, n, chip().processors);
  with_half_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Params<T> p{};
    p.a = tensor_map("h", dtype, args.h, kHopperBlockM);
    p.b = tensor_map("weight", dtype, args.weight, plan.block_n);
    p.a2 = tensor_map("w_down", dtype, args.w_down, plan.rank_padded);
    p.b2 = tensor_map("v", dtype, args.v, plan.block_n);
    p.plan = plan;
    p.rows = args.h.rows;
    p.depth = args.h.cols;
    p.rank = args.w_down.rows;
    p.start = args.start;
    p.length = args.w_down.cols;
    p.out = output<T>(args.bias, args.residual, args.y);
    p.b_down = args.b_down;
    p.middle = bottleneck<T>(args.modulation, args.w_down.rows, args.activation);
    p.bottleneck = static_cast<T*>(args.a.data);
    switch (plan.block_n) {
      case 128:
        return launch_fused<T, HopperUse::fused, 128>(p, stream);
      case 160:
        return launch_fused<T, HopperUse::fused, 160>(p, stream);
      default:
        return launch_fused<T, HopperUse::fused, 192>(p, stream);
    }
  });
}

void hopper_product(DType dtype, bool transposed, const Product& args, cudaStream_t stream) {
  const HopperUse use = transposed ? HopperUse::concat : HopperUse::dgrad;
  const int64_t n = args.y.cols;
  const HopperPlan plan =
      hopper_plan(use, args.y.rows, n, args.a.cols, args.a2.cols, args.start,
                  transposed ? n : args.b2.cols, chip().processors);
  with_half_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int right_rows = transposed ? plan.block_n : kHopperBlockK;
    const int right_cols = transposed ? kHopperBlockK : hopper_box(plan.block_n);
    Params<T> p{};
    p.a = tensor_map("a", dtype, args.a, kHopperBlockM);
    p.b = tensor_map("b", dtype, args.b, right_rows, right_cols);
    p.a2 = tensor_map("a2", dtype, args.a2, kHopperBlockM);
    p.b2 = tensor_map("b2", dtype, args.b2, right_rows, right_cols);
    p.plan = plan;
    p.rows = args.y.rows;
    p.depth = args.a.cols;
    p.rank = args.a2.cols;
    p.out = output<T>(args.bias, args.residual, args.y);
    if (transposed) {
      switch (plan.block_n) {
        case 128:
          return launch_kernel<T, HopperUse::concat, 128, 0>(p, stream);
        case 160:
          return launch_kernel<T, HopperUse::concat, 160, 0>(p, stream);
        case 192:
          return launch_kernel<T, HopperUse::concat, 192, 0>(p, stream);
        default:
          return launch_kernel<T, HopperUse::concat, 256, 0>(p, stream);
      }
    }
    switch (plan.block_n) {
      case 128:
        return launch_kernel<T, HopperUse::dgrad, 128, 0>(p, stream);
      case 160:
        return launch_kernel<T, HopperUse::dgrad, 160, 0>(p, stream);
      case 192:
        return launch_kernel<T, HopperUse::dgrad, 192, 0>(p, stream);
      default:
        return launch_kernel<T, HopperUse::dgrad, 256, 0>(p, stream);
    }
  });
}

}  // namespace a3fta::cuda
