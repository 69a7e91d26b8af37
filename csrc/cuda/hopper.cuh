// Hopper's own instructions, one thin function each: barriers in shared memory, tensor copies,
// warpgroup matrix products, registers per warpgroup. What each does stands in the PTX ISA under
// the name of the instruction. The emulator in tests/ has a file of the same functions and takes
// it in place of this one by defining the guard.
#ifndef A3FTA_HOPPER_CUH
#define A3FTA_HOPPER_CUH

#include <cuda.h>

#include <cstdint>

#include "mma.cuh"
#include "wgmma.cuh"

namespace a3fta::cuda {

// An mbarrier: a phase ends when all arrivals and all bytes announced for it have come.
struct Barrier {
  uint64_t state;

  __device__ __forceinline__ void init(uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)),
                 "r"(arrivals)
                 : "memory");
  }
  __device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this))
                 : "memory");
  }
  __device__ __forceinline__ void arrive_and_expect(uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                     shared_address(this)),
                 "r"(bytes)
                 : "memory");
  }
  // until the phase of this parity is over; of a fresh barrier, phase 1 is
  __device__ __forceinline__ void wait(uint32_t parity) {
    uint32_t over = 0;
    while (over == 0) {
      asm volatile(
          "{\n.reg .pred over;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
          "selp.u32 %0, 1, 0, over;\n}"
          : "=r"(over)
          : "r"(shared_address(this)), "r"(parity)
          : "memory");
    }
  }
};

// after the init of barriers, by the thread that did it, before the block's __syncthreads
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(map)) : "memory");
}

// The box of `map` at (column, row) into shared memory, zeros beyond the edges. The barrier gets
// the bytes of the whole box.
__device__ __forceinline__ void load_box(void* to, const CUtensorMap* map, Barrier* barrier,
                                         int32_t column, int32_t row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(to)),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(shared_address(barrier)), "r"(column), "r"(row)
      : "memory");
}

// The matrix descriptor of an operand in swizzled shared memory, start and offsets in bytes.
// K-major: `stride` between groups of 8 rows, `leading` unused. MN-major: `leading` between columns
// of the swizzle's width, `stride` between groups of 8 k.
enum class Swizzle : uint64_t { bytes128 = 1, bytes64 = 2 };
__device__ __forceinline__ uint64_t matrix_descriptor(const void* start, uint32_t leading,
                                                      uint32_t stride,
                                                      Swizzle swizzle = Swizzle::bytes128) {
  return static_cast<uint64_t>(swizzle) << 62 |
         static_cast<uint64_t>((stride & 0x3ffff) >> 4) << 32 |
         static_cast<uint64_t>((leading & 0x3ffff) >> 4) << 16 |
         ((shared_address(start) & 0x3ffff) >> 4);
}

// before a run of products: registers written up to here are seen by it
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// until at most PENDING committed groups are still at work
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// until all are done; the compiler moves no use of the sums across
template <int SUMS>
__device__ __forceinline__ void wgmma_finish(float (&sums)[SUMS]) {
  wgmma_wait<0>();
#pragma unroll
  for (float& sum : sums) asm volatile("" : "+f"(sum)::"memory");
}

// registers per thread of this warpgroup, by all its warps
template <int COUNT>
__device__ __forceinline__ void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

__device__ __forceinline__ uint32_t shuffle_xor(uint32_t x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}

// x, the same in all threads of the warp, where the compiler sees that it is
__device__ __forceinline__ int warp_uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

// two numbers, rounded, in one register; the first in the lower half
template <typename T>
__device__ __forceinline__ uint32_t pack(float first, float second) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

}  // namespace a3fta::cuda

#endif
