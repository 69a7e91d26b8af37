// wgmma.mma_async of m64 nN k16 on 16-bit operands with fp32 sums (PTX ISA 9.7.15, "Asynchronous
// Warpgroup Level Matrix Instructions"). Included by hopper.cuh.
//
// The assembler wants every register of the sums by name, so each N needs a text of its own. The
// macros below write it in rows of eight registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace a3fta::cuda {

// N / 2 sums per thread. Thread t of the warpgroup holds rows 16 (t / 32) + t % 32 / 4 and the
// 8th row after that; sums 4 j + {0, 1} are columns 8 j + 2 (t % 4) + {0, 1} of the first row, sums
// 4 j + {2, 3} the same columns of the second. The 16-bit operand `a` in registers of
// `from_registers` is laid out as such a block of 16 columns, two to a register.
template <int N>
struct Wgmma;

#define A3FTA_ROW(a, b, c, d, e, f, g, h) \
  "%" #a ", %" #b ", %" #c ", %" #d ", %" #e ", %" #f ", %" #g ", %" #h
#define A3FTA_TEXT64                                                               \
  A3FTA_ROW(0, 1, 2, 3, 4, 5, 6, 7) ", "                                           \
  A3FTA_ROW(8, 9, 10, 11, 12, 13, 14, 15) ", "                                     \
  A3FTA_ROW(16, 17, 18, 19, 20, 21, 22, 23) ", "                                   \
  A3FTA_ROW(24, 25, 26, 27, 28, 29, 30, 31) ", "                                   \
  A3FTA_ROW(32, 33, 34, 35, 36, 37, 38, 39) ", "                                   \
  A3FTA_ROW(40, 41, 42, 43, 44, 45, 46, 47) ", "                                   \
  A3FTA_ROW(48, 49, 50, 51, 52, 53, 54, 55) ", "                                   \
  A3FTA_ROW(56, 57, 58, 59, 60, 61, 62, 63)
#define A3FTA_TEXT72 A3FTA_TEXT64 ", " A3FTA_ROW(64, 65, 66, 67, 68, 69, 70, 71)
#define A3FTA_TEXT80 A3FTA_TEXT72 ", " A3FTA_ROW(72, 73, 74, 75, 76, 77, 78, 79)
#define A3FTA_TEXT88 A3FTA_TEXT80 ", " A3FTA_ROW(80, 81, 82, 83, 84, 85, 86, 87)
#define A3FTA_TEXT96 A3FTA_TEXT88 ", " A3FTA_ROW(88, 89, 90, 91, 92, 93, 94, 95)
#define A3FTA_TEXT104 A3FTA_TEXT96 ", " A3FTA_ROW(96, 97, 98, 99, 100, 101, 102, 103)
#define A3FTA_TEXT112 A3FTA_TEXT104 ", " A3FTA_ROW(104, 105, 106, 107, 108, 109, 110, 111)
#define A3FTA_TEXT120 A3FTA_TEXT112 ", " A3FTA_ROW(112, 113, 114, 115, 116, 117, 118, 119)
#define A3FTA_TEXT128 A3FTA_TEXT120 ", " A3FTA_ROW(120, 121, 122, 123, 124, 125, 126, 127)

#define A3FTA_SUMS8(i)                                                                  \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]),          \
      "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define A3FTA_SUMS64                                                                    \
  A3FTA_SUMS8(0), A3FTA_SUMS8(8), A3FTA_SUMS8(16), A3FTA_SUMS8(24), A3FTA_SUMS8(32),   \
      A3FTA_SUMS8(40), A3FTA_SUMS8(48), A3FTA_SUMS8(56)
#define A3FTA_SUMS72 A3FTA_SUMS64, A3FTA_SUMS8(64)
#define A3FTA_SUMS80 A3FTA_SUMS72, A3FTA_SUMS8(72)
#define A3FTA_SUMS88 A3FTA_SUMS80, A3FTA_SUMS8(80)
#define A3FTA_SUMS96 A3FTA_SUMS88, A3FTA_SUMS8(88)
#define A3FTA_SUMS104 A3FTA_SUMS96, A3FTA_SUMS8(96)
#define A3FTA_SUMS112 A3FTA_SUMS104, A3FTA_SUMS8(104)
#define A3FTA_SUMS120 A3FTA_SUMS112, A3FTA_SUMS8(112)
#define A3FTA_SUMS128 A3FTA_SUMS120, A3FTA_SUMS8(120)

// operands after the sums: a, b, scale-d, trans-b
#define A3FTA_FROM_SHARED(TYPE, N, S, A, B, C, D)                                        \
  asm volatile(                                                                          \
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" #C ", 0;\n"                 \
      "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE                    \
      " {" A3FTA_TEXT##S "}, %" #A ", %" #B ", accumulate, 1, 1, 0, %" #D ";\n}"         \
      : A3FTA_SUMS##S                                                                    \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(TRANSPOSE_B))

// operands after the sums: four registers of a, b
#define A3FTA_FROM_REGISTERS(TYPE, N, S, A, B, C, D, E)                                  \
  asm volatile(                                                                          \
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, 1, 0;\n"                       \
      "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE                    \
      " {" A3FTA_TEXT##S "}, {%" #A ", %" #B ", %" #C ", %" #D "}, %" #E                 \
      ", accumulate, 1, 1, 0;\n}"                                                        \
      : A3FTA_SUMS##S                                                                    \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

// S sums per thread; A to E are the numbers of the operands after them
#define A3FTA_WGMMA(N, S, A, B, C, D, E)                                                 \
  template <>                                                                            \
  struct Wgmma<N> {                                                                      \
    template <typename T, int TRANSPOSE_B>                                               \
    __device__ static __forceinline__ void from_shared(float* d, uint64_t a, uint64_t b, \
                                                       bool accumulate) {                \
      if constexpr (std::is_same_v<T, __half>) {                                         \
        A3FTA_FROM_SHARED("f16", N, S, A, B, C, D);                                      \
      } else {                                                                           \
        A3FTA_FROM_SHARED("bf16", N, S, A, B, C, D);                                     \
      }                                                                                  \
    }                                                                                    \
    template <typename T>                                                                \
    __device__ static __forceinline__ void from_registers(float* d, const uint32_t* a,   \
                                                          uint64_t b) {                  \
      if constexpr (std::is_same_v<T, __half>) {                                         \
        A3FTA_FROM_REGISTERS("f16", N, S, A, B, C, D, E);                                \
      } else {                                                                           \
        A3FTA_FROM_REGISTERS("bf16", N, S, A, B, C, D, E);                               \
      }                                                                                  \
    }                                                                                    \
  };

A3FTA_WGMMA(128, 64, 64, 65, 66, 67, 68)
A3FTA_WGMMA(144, 72, 72, 73, 74, 75, 76)
A3FTA_WGMMA(160, 80, 80, 81, 82, 83, 84)
A3FTA_WGMMA(176, 88, 88, 89, 90, 91, 92)
A3FTA_WGMMA(192, 96, 96, 97, 98, 99, 100)
A3FTA_WGMMA(208, 104, 104, 105, 106, 107, 108)
A3FTA_WGMMA(224, 112, 112, 113, 114, 115, 116)
A3FTA_WGMMA(256, 128, 128, 129, 130, 131, 132)

#undef A3FTA_WGMMA
#undef A3FTA_FROM_REGISTERS
#undef A3FTA_FROM_SHARED

}  // namespace a3fta::cuda
