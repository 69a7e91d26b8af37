// The instructions that CUDA C++ has no name for, one function each, and how the operands of a
// product of tiles are loaded. The functions of the first part exist a second time in
// tests/cuda_emulator, where the kernels run on the CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>

#include <cstdint>
#include <type_traits>

// clusters of blocks: in what is compiled for sm_90 and later
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define A3FTA_CLUSTERS
#endif

#if !defined(__CUDACC__)
#include <emulated_mma.h>
#else

namespace a3fta::cuda {

// The block's dynamic shared memory.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  return dynamic_shared;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Four 8 x 8 matrices of 16-bit elements: lane 8 j + k brings the address of row k of matrix j;
// r[j] is elements 2 (lane % 4) and the next of row lane / 4 of matrix j (column if transposed).
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b with a 16 x 16, b 16 x 8, both of T, and d in fp32: d[0], d[1] are columns
// 2 (lane % 4) and the next of row lane / 4, d[2], d[3] the same eight rows below.
template <typename T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Copies 16 bytes into shared memory, asynchronously: commit and wait before use. Zeros where the
// source is not `real`.
__device__ __forceinline__ void copy16(void* to, const void* from, bool real) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(to)), "l"(from), "r"(real ? 16 : 0)
               : "memory");
}

// Stores 16 bytes of shared memory to device memory.
__device__ __forceinline__ void store16(void* to, const void* from) {
  *static_cast<uint4*>(to) = *static_cast<const uint4*>(from);
}

// A pack of up to 16 bytes of device memory, from or to a multiple of its size, at once.
template <typename P>
__device__ __forceinline__ P read_pack(const P* from) {
  return *from;
}
template <typename P>
__device__ __forceinline__ void write_pack(P* to, const P& pack) {
  *to = pack;
}

#if defined(A3FTA_CLUSTERS)
// The place of this block in its cluster.
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// A barrier of all threads of the cluster in two halves: what came before the arrival of every
// thread is seen after the wait.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" : : : "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" : : : "memory");
}

// Where the block `rank` of the cluster has what lies at `address` of this block's shared memory.
template <typename T>
__device__ __forceinline__ T* map_shared(T* address, unsigned rank) {
  uint64_t mapped;
  asm("mapa.u64 %0, %1, %2;"
      : "=l"(mapped)
      : "l"(reinterpret_cast<uint64_t>(address)), "r"(rank));
  return reinterpret_cast<T*>(mapped);
}

// A mailbox: a word of shared memory that counts the bytes sent to this block. One thread sets it
// up, before a barrier of the cluster, and says for each phase how many bytes make it complete.
__device__ __forceinline__ void mailbox_set_up(uint64_t* box) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" : : "r"(shared_address(box)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
}
__device__ __forceinline__ void mailbox_expect(uint64_t* box, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :
               : "r"(shared_address(box)), "r"(bytes)
               : "memory");
}

// Waits for the end of phase `phase`; then everything sent in it is seen.
__device__ __forceinline__ void mailbox_wait(uint64_t* box, int phase) {
  uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{.reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;}"
        : "=r"(done)
        : "r"(shared_address(box)), "r"(phase & 1)
        : "memory");
  }
}

// Stores 8 bytes where the block `rank` has `to`, and counts them in its `box`; does not wait.
__device__ __forceinline__ void send8(void* to, uint2 value, uint64_t* box, unsigned rank) {
  asm volatile(
      "{.reg .b32 to, box;\n"
      "mapa.shared::cluster.u32 to, %0, %4;\n"
      "mapa.shared::cluster.u32 box, %3, %4;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [to], {%1, %2}, [box];}"
      :
      : "r"(shared_address(to)), "r"(value.x), "r"(value.y), "r"(shared_address(box)), "r"(rank)
      : "memory");
}
#endif

}  // namespace a3fta::cuda

#endif

namespace a3fta::cuda {

// The 16 x 16 left operand at `tile`, stored [m][k] or, transposed, [k][m].
template <typename T>
__device__ __forceinline__ void load_left(uint32_t (&a)[4], const T* tile, int stride) {
  const int lane = threadIdx.x % 32;
  ldmatrix(a, tile + lane % 16 * stride + lane / 16 * 8);
}
template <typename T>
__device__ __forceinline__ void load_left_trans(uint32_t (&a)[4], const T* tile, int stride) {
  const int lane = threadIdx.x % 32;
  ldmatrix_trans(a, tile + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
}

// The 16 x 16 right operand at `tile`, stored [n][k] or, transposed, [k][n]: b[0], b[1] are its
// first eight columns, b[2], b[3] the others.
template <typename T>
__device__ __forceinline__ void load_right(uint32_t (&b)[4], const T* tile, int stride) {
  const int lane = threadIdx.x % 32;
  ldmatrix(b, tile + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
}
template <typename T>
__device__ __forceinline__ void load_right_trans(uint32_t (&b)[4], const T* tile, int stride) {
  const int lane = threadIdx.x % 32;
  ldmatrix_trans(b, tile + lane % 16 * stride + lane / 16 * 8);
}

}  // namespace a3fta::cuda
