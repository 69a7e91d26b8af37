// What the one-pass kernels of `adapter` share: their block, and tiles of 16-bit elements.
#pragma once

#include <type_traits>

#include "tile.cuh"

namespace a3fta::cuda {

constexpr int kRowThreads = 256;
constexpr int kRowWarps = kRowThreads / 32;

template <typename T, int N>
struct alignas(N * sizeof(T)) Pack {
  T values[N];
};

template <typename T>
__device__ __forceinline__ uint2 words(const Pack<T, 4>& pack) {
  uint2 found;
  memcpy(&found, &pack, sizeof(found));
  return found;
}

// Eight elements of `src` from (row, col) on into a tile; zeros beyond the edges.
template <typename T>
__device__ __forceinline__ void load_vector(T* to, const View<T>& src, int64_t row, int64_t col) {
  const int64_t left = row < src.rows ? src.cols - col : 0;
  const T* from = src.data + row * src.stride + col;
  if (src.vectors && (left >= 8 || left <= 0)) {
    copy16(to, left > 0 ? from : src.data, left > 0);
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e) to[e] = e < left ? from[e] : from_float<T>(0.0f);
  }
}

// two ones in 16 bits each: times a tile of ones, mma sums the rows of its left operand
template <typename T>
__device__ __forceinline__ uint32_t two_ones() {
  return std::is_same_v<T, __half> ? 0x3c003c00u : 0x3f803f80u;
}

// tile[row, col] and the next column += x, y
template <typename T>
__device__ __forceinline__ void add_pair(T* at, float x, float y) {
  auto* const pair = reinterpret_cast<Pack<T, 2>*>(at);
  const Pack<T, 2> old = *pair;
  *pair = {from_float<T>(to_float(old.values[0]) + x), from_float<T>(to_float(old.values[1]) + y)};
}

}  // namespace a3fta::cuda
