// A stand-in for the CUDA headers: compiles csrc/cuda/*.cu with a host compiler and runs each
// block on the CPU, one fiber per CUDA thread, so that the kernels' own source is tested where
// there is no GPU.
//
// It is stricter than a GPU where that finds mistakes: shared memory starts as NaN; asynchronous
// copies happen only when they are waited for; a barrier that not all threads of a block reach
// fails, and so do misaligned vectors and matrix fragments, a warp whose lanes do not all come to
// the same instruction, a cluster barrier that some thread does not reach, and bytes that are
// waited for but not sent. Under ThreadSanitizer only barriers and mailboxes order the fibers, so
// that it sees every missing __syncthreads.
//
// The blocks of a cluster run side by side, each with its own shared memory; other blocks run one
// after the other. What a chip has (`Chip`) can be set, so that the plans for others run, too.
//
// Left out: caches, warp scheduling, the order of sums inside a tensor-core instruction.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  dim3(unsigned x, unsigned y, unsigned z) : x(x), y(y), z(z) {}
};

struct uint2 {
  unsigned x, y;
};

extern dim3 gridDim, blockDim;

namespace emulator {

constexpr int kWarp = 32;

// What cudaDeviceGetAttribute answers.
struct Chip {
  int capability, processors, shared_block, shared_processor;
};
constexpr Chip kHopper = {90, 17, 227 * 1024, 228 * 1024};
const Chip& chip();
void use_chip(const Chip& chip);  // as a device of its own
int device();

dim3 thread_index();
dim3 block_index();
unsigned char* shared_memory();
void barrier(int line);
void copy_async(void* to, const void* from, size_t bytes, bool real = true);
void commit();
void wait_prior(size_t groups);
void run(const void* kernel, dim3 grid, dim3 block, unsigned cluster, size_t shared_bytes,
         const std::function<void()>& body);

// One instruction of a whole warp: `work` runs once, with the arguments of all lanes, when all of
// them have come.
using WarpWork = void (*)(void* const* lanes);
void collective(WarpWork work, void* lane, int line);

unsigned cluster_rank();
unsigned cluster_size();
void cluster_arrive();
void cluster_wait();
void* map_shared(void* address, unsigned rank);

// Words that count the bytes sent to a block. What is sent lies there at once, or only when a
// phase's end is waited for: the first shows ThreadSanitizer who overwrites what is still read,
// the second everyone what is read without waiting.
void mailbox_set_up(uint64_t* box);
void mailbox_expect(uint64_t* box, int bytes);
void mailbox_wait(uint64_t* box, int parity);
void send(void* to, uint2 value, uint64_t* box);
void deliver_late(bool on);  // the default
bool delivers_late();

// The 16-byte accesses of device memory, by vector: what a kernel moves can be held to its floor.
void count_read(const void* from);
void count_written(const void* to);

// Runs the last cluster of a grid only, for grids whose first blocks are like any other.
void run_last_only(bool on);

// For waits that are no barriers: other threads run; it is an error if none of them makes progress
// any more. An acquire sees what came before the releases at the same place.
void yield();
void progressed();
void acquire_at(void* at);
void release_at(void* at);
// called before each launch, and around each cluster's run
void begin_launch(const void* kernel, unsigned threads);
void begin_block(unsigned threads);
void end_block();

[[noreturn]] void fail(const char* what, long value = 0);
void allow_shared(const void* kernel, int bytes);
void allow_large_clusters(const void* kernel);

inline void require(bool ok, const char* what, long value = 0) {
  if (!ok) fail(what, value);
}
inline void require_aligned(const void* p, size_t bytes) {
  require(reinterpret_cast<uintptr_t>(p) % bytes == 0, "misaligned address for bytes", bytes);
}

}  // namespace emulator

#define threadIdx (::emulator::thread_index())
#define blockIdx (::emulator::block_index())
#define __syncthreads() ::emulator::barrier(__LINE__)

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  emulator::require_aligned(to, bytes);
  emulator::require_aligned(from, bytes);
  emulator::copy_async(to, from, bytes);
}
inline void __pipeline_commit() { emulator::commit(); }
inline void __pipeline_wait_prior(size_t groups) { emulator::wait_prior(groups); }

// the CUDA runtime

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidClusterSize = 912,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 9,
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
};
using cudaStream_t = void*;

struct cudaFuncAttributes {
  int ptxVersion;
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid value"; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute which, int value) {
  if (which == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    emulator::allow_shared(kernel, value);
  } else {
    emulator::allow_large_clusters(kernel);
  }
  return cudaSuccess;
}

// the kernels are compiled for every chip
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
  found->ptxVersion = emulator::chip().capability;
  return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = emulator::device();
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  const emulator::Chip& c = emulator::chip();
  const int values[] = {c.processors, c.capability / 10, c.capability % 10, c.shared_block,
                        c.shared_processor};
  *value = values[which];
  return cudaSuccess;
}

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  const unsigned cluster = config->numAttrs == 0 ? 1 : config->attrs[0].val.clusterDim.x;
  emulator::run(reinterpret_cast<const void*>(kernel), config->gridDim, config->blockDim, cluster,
                config->dynamicSmemBytes, [&] { kernel(args...); });
  return cudaSuccess;
}

// as many as there are processors for: one block on each
template <typename... Params>
cudaError_t cudaOccupancyMaxActiveClusters(int* count, void (*)(Params...),
                                           const cudaLaunchConfig_t* config) {
  *count = emulator::chip().processors / static_cast<int>(config->attrs[0].val.clusterDim.x);
  return cudaSuccess;
}

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// a value of the lane whose number differs in the bits of the mask
struct ExchangeLane {
  float value, found;
  int mask;
};

__attribute__((no_sanitize("thread", "address"))) inline void exchange_lanes(void* const* lanes) {
  for (int i = 0; i < emulator::kWarp; ++i) {
    ExchangeLane& lane = *static_cast<ExchangeLane*>(lanes[i]);
    lane.found = static_cast<ExchangeLane*>(lanes[i ^ lane.mask])->value;
  }
}

inline float __shfl_xor_sync(unsigned, float x, int mask, int line = __builtin_LINE()) {
  ExchangeLane lane{x, x, mask};
  emulator::collective(exchange_lanes, &lane, line);
  return lane.found;
}

// 16-bit floats, rounded to nearest even

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31;
  const int fraction = x.bits & 1023;
  float value;
  if (exponent == 31) {
    value = fraction != 0 ? NAN : INFINITY;
  } else if (exponent == 0) {
    value = std::ldexp(static_cast<float>(fraction), -24);
  } else {
    value = std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  }
  return x.bits & 0x8000 ? -value : value;
}

inline __half __float2half_rn(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = bits >> 16 & 0x8000;
  const float size = std::fabs(x);
  if (x != x) return {0x7fff};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (size < 0x1p-14f) return {static_cast<uint16_t>(sign | std::lrint(size * 0x1p24f))};
  bits &= 0x7fffffff;
  bits += 0xfff + (bits >> 13 & 1);
  return {static_cast<uint16_t>(sign | ((bits >> 13) - (112 << 10)))};
}

namespace emulator {
inline float widen(float x) { return x; }
inline float widen(__half x) { return __half2float(x); }
inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
}  // namespace emulator

// Warp-wide matrix fragments: lane 0 holds and computes the whole fragment of its warp.
namespace nvcuda::wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major, mem_col_major };

template <typename Use, int M, int N, int K, typename T, typename Layout = void>
struct fragment {
  static_assert(M == 16 && N == 16 && K == 16);
  float values[16][16];
};

inline bool leads() { return threadIdx.x % emulator::kWarp == 0; }

template <typename F>
void fill_fragment(F& f, float value) {
  if (!leads()) return;
  for (auto& row : f.values) {
    for (float& x : row) x = value;
  }
}

template <typename Use, typename T, typename Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& f, const T* from, unsigned stride) {
  emulator::require_aligned(from, 32);
  emulator::require(stride * sizeof(T) % 16 == 0, "fragment stride", stride);
  if (!leads()) return;
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) {
      const bool by_rows = std::is_same_v<Layout, row_major>;
      f.values[i][j] = emulator::widen(from[by_rows ? i * stride + j : j * stride + i]);
    }
  }
}

template <typename D, typename A, typename B>
void mma_sync(D& d, const A& a, const B& b, const D& c) {
  if (!leads()) return;
  for (int i = 0; i < 16; ++i) {
    float sums[16];
    for (int j = 0; j < 16; ++j) sums[j] = c.values[i][j];
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < 16; ++j) sums[j] += a.values[i][k] * b.values[k][j];
    }
    for (int j = 0; j < 16; ++j) d.values[i][j] = sums[j];
  }
}

template <typename F>
void store_matrix_sync(float* to, const F& f, unsigned stride, layout_t layout) {
  emulator::require_aligned(to, 32);
  emulator::require(stride % 4 == 0 && layout == mem_row_major, "fragment stride", stride);
  if (!leads()) return;
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) to[i * stride + j] = f.values[i][j];
  }
}

}  // namespace nvcuda::wmma
