// The emulator's version of csrc/cuda/hopper.cuh and wgmma.cuh: the same functions for the CPU.
//
// Stricter than the hardware where that finds mistakes:
// - A tensor copy lands either as it is issued or, as a coin falls, not before somebody waits for
//   its barrier: a missing wait reads old bytes, a stage given back too early is overwritten.
// - A product computes when it is waited for, from what shared memory and registers hold then.
// - A wait that nothing can end is found, and so are an operand of another layout, products of two
//   shapes at work on the same sums, a run of products without a fence, warps of a group that do
//   not issue the same, and registers beyond the 64 K of a block.
// Under ThreadSanitizer an arrival at a barrier orders what came before it, and nothing else does.
//
// Facts are from the PTX ISA 8.x, under the names given at each piece, and for tensor maps from
// the driver API's cuTensorMapEncodeTiled.
#pragma once

#define A3FTA_HOPPER_CUH
#define __CUDA_ARCH_FEAT_SM90_ALL 1
#define __grid_constant__

#include "emulator.h"

// What the driver makes of a matrix, for the copy engine.
struct alignas(64) CUtensorMap {
  const unsigned char* data;
  uint64_t sizes[2];   // elements, the contiguous dimension first
  uint64_t row_bytes;  // between rows
  uint32_t box[2];
  uint32_t swizzle;  // 128 or 64 bytes
};

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType {
  CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6,
  CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9,
};
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE = 0 };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_64B = 2, CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0 };

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                void* data, const cuuint64_t* sizes, const cuuint64_t* strides,
                                const cuuint32_t* box, const cuuint32_t* steps,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill);

#define CUDART_VERSION 13000
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0 };
enum { cudaEnableDefault = 0 };
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                                    unsigned long long,
                                                    cudaDriverEntryPointQueryResult* found) {
  emulator::require(std::strcmp(name, "cuTensorMapEncodeTiled") == 0, "an unknown driver function");
  *function = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

namespace emulator {

// An address of shared memory as instructions see it, and back. The window does not start at a
// multiple of 1024, so that kernels must align their tiles.
uint32_t shared_offset(const void* p);
const unsigned char* shared_at(uint32_t offset, size_t bytes);

void barrier_init(void* barrier, uint32_t arrivals);
void barrier_publish();
void barrier_arrive(void* barrier, uint32_t bytes);
void barrier_wait(void* barrier, uint32_t parity);
void load_box(void* to, const CUtensorMap& map, void* barrier, int32_t column, int32_t row);

// A product to be computed by the calling thread when it waits. `sums` and `shape` say on what and
// with how many columns; `what` is the same in all threads of a warpgroup.
void issue_product(const void* sums, int shape, uint64_t what, std::function<void()> compute);
void fence_products();
void commit_products();
void wait_products(size_t groups);

void set_registers(int count, bool raise);
// x of each of the four neighbouring threads that share rows
void exchange_quad(uint32_t x, uint32_t (&all)[4]);

// "Swizzling modes": the 16-byte chunk of an address, bits 4-6, is XORed with bits 7-9 in 128-byte
// mode; in 64-byte mode bits 4-5 are, with bits 7-8.
inline uint32_t swizzled(uint32_t address, uint32_t width) {
  return address ^ ((address >> 7 & (width / 16 - 1)) << 4);
}

// "Asynchronous Warpgroup Level Matrix Shared Memory Layout", "Matrix Descriptor Format": bits 0-13
// the start, 16-29 the leading and 32-45 the stride byte offset, all without their lowest four
// bits; 49-51 the base offset, zero where the pattern starts at a multiple of its size; 62-63 the
// swizzle, 1 for 128 bytes, 2 for 64.
//
// "Strides": of a K-major operand 8 rows of the swizzle's width follow each other, and groups of 8
// rows are the stride offset apart. Of an MN-major one, the outer dimension fills the swizzle's
// width, 8 such rows along k follow each other, groups of 8 along k are the stride offset apart, and
// the next outer elements the leading offset.
template <typename T>
float operand(uint64_t descriptor, bool outer_major, int outer, int k) {
  const uint64_t mode = descriptor >> 62;
  require((mode == 1 || mode == 2) && (descriptor >> 49 & 7) == 0, "a descriptor of another layout");
  const uint32_t width = mode == 1 ? 128 : 64;
  const uint32_t start = (descriptor & 0x3fff) << 4;
  const uint32_t leading = (descriptor >> 16 & 0x3fff) << 4;
  const uint32_t stride = (descriptor >> 32 & 0x3fff) << 4;
  const uint32_t m = outer, elements = width / 2;
  const uint32_t address = outer_major ? start + m / elements * leading + m % elements * 2 +
                                             k / 8 * stride + k % 8 * width
                                       : start + m / 8 * stride + m % 8 * width + k * 2;
  return widen(*reinterpret_cast<const T*>(shared_at(swizzled(address, width), 2)));
}

// "Register Fragments and Shared Memory Matrix Layouts", D of m64nNk16 (and A, of N = 16): row and
// column of a thread's sums
inline int fragment_row(int half) {
  const int t = static_cast<int>(thread_index().x) % 128;
  return t / 32 * 16 + t % 32 / 4 + 8 * half;
}
inline int fragment_column(int block, int e) {
  return 8 * block + static_cast<int>(thread_index().x) % 4 * 2 + e;
}

// left[half][k]: the operand's elements in this thread's two rows
template <int N, typename T>
void multiply(float* d, const float (&left)[2][16], uint64_t b, bool outer_major,
              bool accumulate) {
  for (int block = 0; block < N / 8; ++block) {
    for (int e = 0; e < 2; ++e) {
      float sums[2];
      for (int half = 0; half < 2; ++half) {
        sums[half] = accumulate ? d[4 * block + 2 * half + e] : 0.0f;
      }
      for (int k = 0; k < 16; ++k) {
        const float right = operand<T>(b, outer_major, fragment_column(block, e), k);
        for (int half = 0; half < 2; ++half) sums[half] += left[half][k] * right;
      }
      for (int half = 0; half < 2; ++half) d[4 * block + 2 * half + e] = sums[half];
    }
  }
}

}  // namespace emulator

namespace a3fta::cuda {

inline uint32_t shared_address(const void* p) { return emulator::shared_offset(p); }

struct Barrier {
  uint64_t state;

  void init(uint32_t arrivals) {
    state = 0;  // a write that the other threads' reads must be ordered after
    emulator::barrier_init(this, arrivals);
  }
  void arrive() { arrive_and_expect(0); }
  void arrive_and_expect(uint32_t bytes) {
    emulator::require(state == 0, "a barrier that was not made");
    emulator::barrier_arrive(this, bytes);
  }
  void wait(uint32_t parity) {
    emulator::require(state == 0, "a barrier that was not made");
    emulator::barrier_wait(this, parity);
  }
};

inline void publish_barriers() { emulator::barrier_publish(); }
inline void prefetch_map(const CUtensorMap*) {}
inline void load_box(void* to, const CUtensorMap* map, Barrier* barrier, int32_t column,
                     int32_t row) {
  emulator::load_box(to, *map, barrier, column, row);
}

enum class Swizzle : uint64_t { bytes128 = 1, bytes64 = 2 };
inline uint64_t matrix_descriptor(const void* start, uint32_t leading, uint32_t stride,
                                  Swizzle swizzle = Swizzle::bytes128) {
  return static_cast<uint64_t>(swizzle) << 62 | static_cast<uint64_t>(stride >> 4) << 32 |
         static_cast<uint64_t>(leading >> 4) << 16 | shared_address(start) >> 4;
}

inline void wgmma_fence() { emulator::fence_products(); }
inline void wgmma_commit() { emulator::commit_products(); }
template <int PENDING>
void wgmma_wait() {
  emulator::wait_products(PENDING);
}
template <int SUMS>
void wgmma_finish(float (&)[SUMS]) {
  emulator::wait_products(0);
}

template <int COUNT>
void lower_registers() {
  emulator::set_registers(COUNT, false);
}
template <int COUNT>
void raise_registers() {
  emulator::set_registers(COUNT, true);
}

inline uint32_t shuffle_xor(uint32_t x, int mask) {
  emulator::require(mask >= 0 && mask < 4, "a shuffle out of four threads");
  uint32_t all[4];
  emulator::exchange_quad(x, all);
  return all[threadIdx.x % 4 ^ static_cast<unsigned>(mask)];
}
inline int warp_uniform(int x) { return x; }

inline uint16_t half_bits(float x, __half*) { return __float2half_rn(x).bits; }
inline uint16_t half_bits(float x, __nv_bfloat16*) { return __float2bfloat16_rn(x).bits; }

template <typename T>
uint32_t pack(float first, float second) {
  T* const type = nullptr;
  return half_bits(first, type) | static_cast<uint32_t>(half_bits(second, type)) << 16;
}

// "wgmma.mma_async": D = A B + D, or D = A B
template <int N>
struct Wgmma {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256);

  template <typename T, int TRANSPOSE_B>
  static void from_shared(float* d, uint64_t a, uint64_t b, bool accumulate) {
    const uint64_t what = a * 31 + b * 17 + N * 2 + accumulate;
    emulator::issue_product(d, N, what, [=] {
      float left[2][16];
      for (int half = 0; half < 2; ++half) {
        for (int k = 0; k < 16; ++k) {
          left[half][k] = emulator::operand<T>(a, false, emulator::fragment_row(half), k);
        }
      }
      emulator::multiply<N, T>(d, left, b, TRANSPOSE_B != 0, accumulate);
    });
  }

  // A's fragment: register 2 (k / 8) + half of thread k % 8 / 2 of four holds columns k and k + 1
  template <typename T>
  static void from_registers(float* d, const uint32_t* a, uint64_t b) {
    emulator::issue_product(d, N, b * 17 + N, [=] {
      float left[2][16];
      for (int i = 0; i < 4; ++i) {
        uint32_t all[4];
        emulator::exchange_quad(a[i], all);
        for (int k = 0; k < 8; ++k) {
          const auto bits = static_cast<uint16_t>(all[k / 2] >> k % 2 * 16);
          left[i % 2][i / 2 * 8 + k] = emulator::widen(T{bits});
        }
      }
      emulator::multiply<N, T>(d, left, b, false, true);
    });
  }
};

}  // namespace a3fta::cuda
