// 8-bit copies with a range for each block of 128 elements.
//
//     mid = bf16((lo + hi) / 2);  half = bf16(max(hi - mid, mid - lo)), rounded up
//     code = round((x - mid) / half * 127);  x~ = mid + half * code / 127
//
// Sixteen threads hold a block, eight neighbours each: a warp two blocks, of which it finds the
// ends by exchanging values between its lanes. A block that is not finite gets NaN for mid and
// half.

#include "quantize.h"

#include <cmath>

#include "packs.cuh"

namespace a3fta::cuda {
namespace {

constexpr int kBlock = 128;
constexpr int kPerThread = 8;
constexpr int kGroup = kBlock / kPerThread;  // threads of a block
constexpr float kLargestBf16 = 3.38953139e38f;
constexpr float kSmallestHalf = 7.52316385e-37f;  // 2^-120: 127 / half stays finite

using Range = Pack<__nv_bfloat16, 2>;

template <typename T>
__device__ __forceinline__ constexpr float largest() {
  if (std::is_same_v<T, __half>) return 65504.0f;
  return std::is_same_v<T, __nv_bfloat16> ? kLargestBf16 : 3.40282347e38f;
}

__device__ __forceinline__ float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

__device__ __forceinline__ uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// the least bf16 number not below a finite x >= 0, at least kSmallestHalf unless x is 0
__device__ __forceinline__ float rounded_up(float x) {
  const uint32_t bits = as_bits(x) & 0xffff0000u;
  const float up = fminf(as_float(bits) < x ? as_float(bits + 0x10000u) : as_float(bits),
                         kLargestBf16);
  return x > 0.0f ? fmaxf(up, kSmallestHalf) : up;
}

// Eight elements from `i` on, of which `count` are there; `vectors`: from a multiple of 16 bytes.
template <typename T>
__device__ __forceinline__ void load8(float (&v)[kPerThread], const T* x, int count,
                                      bool vectors) {
  if (vectors && count == kPerThread) {
#pragma unroll
    for (int part = 0; part < kPerThread; part += kVector<T>) {
      float some[kVector<T>];
      load_pack(some, x + part);
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) v[part + e] = some[e];
    }
  } else {
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) v[e] = e < count ? to_float(x[e]) : 0.0f;
  }
}

__device__ __forceinline__ int count_from(int64_t i, int64_t n) {
  return n - i >= kPerThread ? kPerThread : n > i ? static_cast<int>(n - i) : 0;
}

template <typename T>
__global__ void __launch_bounds__(kPackThreads) quantize_kernel(
    const T* x, int8_t* codes, Range* ranges, int64_t n, bool vectors) {
  const int64_t blocks = ceil_div(n, kBlock);
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kPackThreads / kGroup);
  const int in_warp = threadIdx.x % 32;
  // the lanes of a warp go around together: they speak to each other
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x - in_warp) /
                        kGroup;
  for (int64_t pair = first; pair < blocks; pair += step) {
    const int64_t block = pair + in_warp / kGroup;
    const int64_t i = block * kBlock + in_warp % kGroup * kPerThread;
    const int count = count_from(i, n);
    float v[kPerThread];
    load8(v, x + i, count, vectors);
    float lo = INFINITY, hi = -INFINITY, spoiled = 0.0f;
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      if (e < count) {
        lo = fminf(lo, v[e]);
        hi = fmaxf(hi, v[e]);
        spoiled += v[e] * 0.0f;  // NaN of NaN and infinity
      }
    }
#pragma unroll
    for (int lanes = kGroup / 2; lanes > 0; lanes /= 2) {
      lo = fminf(lo, __shfl_xor_sync(0xffffffffu, lo, lanes));
      hi = fmaxf(hi, __shfl_xor_sync(0xffffffffu, hi, lanes));
      spoiled += __shfl_xor_sync(0xffffffffu, spoiled, lanes);
    }
    // halves first: lo + hi may be more than fp32 holds; and bf16's rounding may reach infinity
    const float middle = to_float(from_float<__nv_bfloat16>(0.5f * lo + 0.5f * hi));
    const float mid = fminf(fmaxf(middle, -kLargestBf16), kLargestBf16);
    const float half = rounded_up(fmaxf(hi - mid, mid - lo));
    const bool lost = !(spoiled == 0.0f);
    const float scale = half > 0.0f && !lost ? 127.0f / half : 0.0f;
    Pack<int8_t, kPerThread> found;
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      // 1.5 * 2^23 more leaves the nearest integer in the lowest bits
      const float code = lost ? 0.0f : (v[e] - mid) * scale;
      found.values[e] = static_cast<int8_t>(as_bits(code + 12582912.0f));
    }
    if (count == kPerThread) {
      write_pack(reinterpret_cast<Pack<int8_t, kPerThread>*>(codes + i), found);
    } else {
#pragma unroll
      for (int e = 0; e < kPerThread; ++e) {
        if (e < count) codes[i + e] = found.values[e];
      }
    }
    if (in_warp % kGroup == 0 && block < blocks) {
      const float none = NAN;
      ranges[block] = {from_float<__nv_bfloat16>(lost ? none : mid),
                       from_float<__nv_bfloat16>(lost ? none : half)};
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kPackThreads) dequantize_kernel(
    const int8_t* codes, const Range* ranges, T* x, int64_t n, bool vectors) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kPackThreads * kPerThread;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x) * kPerThread;
       i < n; i += step) {
    const int count = count_from(i, n);
    const bool whole = vectors && count == kPerThread;
    Pack<int8_t, kPerThread> found;
    if (whole) {
      found = read_pack(reinterpret_cast<const Pack<int8_t, kPerThread>*>(codes + i));
    } else {
#pragma unroll
      for (int e = 0; e < kPerThread; ++e) found.values[e] = e < count ? codes[i + e] : int8_t{0};
    }
    const Range range = ranges[i / kBlock];
    const float mid = to_float(range.values[0]);
    const float unit = to_float(range.values[1]) / 127.0f;
    float v[kPerThread];
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      // rounding may not make infinity of a finite block; NaN passes the comparisons
      const float value = mid + unit * static_cast<float>(found.values[e]);
      const float below = value > largest<T>() ? largest<T>() : value;
      v[e] = below < -largest<T>() ? -largest<T>() : below;
    }
    if (count == kPerThread) {
#pragma unroll
      for (int part = 0; part < kPerThread; part += kVector<T>) {
        float some[kVector<T>];
#pragma unroll
        for (int e = 0; e < kVector<T>; ++e) some[e] = v[part + e];
        store_pack(x + i + part, some);
      }
    } else {
#pragma unroll
      for (int e = 0; e < kPerThread; ++e) {
        if (e < count) x[i + e] = from_float<T>(v[e]);
      }
    }
  }
}

}  // namespace

void quantize(DType dtype, const void* x, const Quantized& to, cudaStream_t stream) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    // whole warps, each of which holds two blocks
    const int64_t threads = ceil_div(to.count, 2 * kBlock) * 32;
    launch("quantize", quantize_kernel<T>, blocks_for(threads), 1, kPackThreads, 0, stream,
           static_cast<const T*>(x), to.codes, static_cast<Range*>(to.ranges), to.count,
           aligned(x, 16));
  });
}

void dequantize(DType dtype, const Quantized& from, void* x, cudaStream_t stream) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch("dequantize", dequantize_kernel<T>, blocks_for(ceil_div(from.count, kPerThread)), 1,
           kPackThreads, 0, stream, static_cast<const int8_t*>(from.codes),
           static_cast<const Range*>(from.ranges), static_cast<T*>(x), from.count,
           aligned(from.codes, kPerThread));
  });
}

}  // namespace a3fta::cuda
