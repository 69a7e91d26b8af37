// What the element-wise kernels share: elements in packs of up to 16 bytes, and their grid.
#pragma once

#include "rows.cuh"

namespace a3fta::cuda {

constexpr int kPackThreads = 256;

// N neighbours from an address that is a multiple of their bytes
template <typename T, int N>
__device__ __forceinline__ void load_pack(float (&to)[N], const T* from) {
  const Pack<T, N> pack = read_pack(reinterpret_cast<const Pack<T, N>*>(from));
#pragma unroll
  for (int e = 0; e < N; ++e) to[e] = to_float(pack.values[e]);
}

template <typename T, int N>
__device__ __forceinline__ void store_pack(T* to, const float (&from)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int e = 0; e < N; ++e) pack.values[e] = from_float<T>(from[e]);
  write_pack(reinterpret_cast<Pack<T, N>*>(to), pack);
}

inline bool aligned(const void* p, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) == 0;
}

// blocks for so many threads; more than fill the chip take turns, each in a loop over its stride
inline int64_t blocks_for(int64_t threads) {
  const int64_t most = int64_t{16} * chip().processors;
  const int64_t wanted = ceil_div(threads, kPackThreads);
  return wanted < most ? wanted : most;
}

}  // namespace a3fta::cuda
