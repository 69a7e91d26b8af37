// group_norm. Contiguous: a group is one run of memory; a short run is one block's, forward or
// backward in one launch. A long run, and any tensor with channels last, is cut into parts: their
// sums go to a workspace, one block per group adds them in their order, and the parts apply what it
// found. A block reads its part from memory once, and again from a cache.

#include <algorithm>

#include "norm_run.cuh"

namespace a3fta::cuda {
namespace {

constexpr int64_t kPart = 32768;       // elements of a part
constexpr int kMaxColumns = 128;       // packs of a row that one block takes, with channels last

// One group, whole.
template <typename T, int N, bool BACKWARD>
__global__ void __launch_bounds__(kNormThreads) norm_group_kernel(const GroupParams<T> p) {
  float* const shared = reinterpret_cast<float*>(shared_memory());
  const int64_t size = p.width * p.positions;
  const Run<T, N> run{p, static_cast<int64_t>(blockIdx.x), 0, size};
  if constexpr (BACKWARD) {
    const Pair s = run.sums(shared);
    run.finish(s.first / static_cast<float>(size), s.second / static_cast<float>(size));
  } else {
    const Pair m = run.moments(shared);
    const float rstd = rstd_of(m.second, static_cast<float>(size), p.eps);
    if (threadIdx.x == 0) {
      p.mean[run.group] = m.first;
      p.rstd[run.group] = rstd;
    }
    run.apply(m.first, rstd);
  }
}

// One part of one group: what it adds, or what becomes of it.
template <typename T, int N, bool BACKWARD, bool APPLY>
__global__ void __launch_bounds__(kNormThreads) norm_run_kernel(const GroupParams<T> p) {
  float* const shared = reinterpret_cast<float*>(shared_memory());
  const int64_t group = blockIdx.x / p.count, part = blockIdx.x % p.count;
  const int64_t begin = part * p.length, size = p.width * p.positions;
  const Run<T, N> run{p, group, begin, begin + p.length < size ? begin + p.length : size};
  if constexpr (APPLY) {
    if constexpr (BACKWARD) {
      run.finish(p.mean_g[group], p.mean_gx[group]);
    } else {
      run.apply(p.mean[group], p.rstd[group]);
    }
  } else {
    Pair found;
    if constexpr (BACKWARD) {
      found = run.sums(shared);
    } else {
      found = run.moments(shared);
    }
    if (threadIdx.x == 0) {
      const int64_t at = (group / p.groups * p.count + part) * p.groups + group % p.groups;
      p.parts[at] = found.first;
      p.parts[at + p.second()] = found.second;
    }
  }
}

// Channels last: a block takes `length` positions of up to kMaxColumns packs of channels; a thread
// keeps to its N channels, and the threads of a column share the positions.
template <typename T, int N, bool BACKWARD, bool APPLY>
__global__ void __launch_bounds__(kNormThreads) norm_last_kernel(const GroupParams<T> p) {
  const int64_t block = blockIdx.x / p.blocks_c;
  const int64_t sample = block / p.count, part = block % p.count;
  const int lanes = kNormThreads / p.columns, lane = threadIdx.x / p.columns;
  const int64_t c = (blockIdx.x % p.blocks_c * p.columns + threadIdx.x % p.columns) *
                    static_cast<int64_t>(N);
  const int64_t begin = part * p.length;
  const int64_t end = begin + p.length < p.positions ? begin + p.length : p.positions;
  const bool mine = lane < lanes && c < p.channels;
  const auto each = [&](const auto& body) {
    for (int64_t s = begin + lane; mine && s < end; s += lanes) {
      const int64_t at = (sample * p.positions + s) * p.channels + c;
      float x[N];
      load_pack(x, p.x + at);
      body(at, x);
    }
  };
  const auto of_group = [&](float(&to)[N], const float* from) {
#pragma unroll
    for (int e = 0; e < N; ++e) {
      to[e] = mine ? from[sample * p.groups + static_cast<uint32_t>(c + e) /
                                                  static_cast<uint32_t>(p.width)]
                   : 0.0f;
    }
  };

  float mean[N], rstd[N], weight[N], bias[N];
  if constexpr (BACKWARD || APPLY) {
    of_group(mean, p.mean);
    of_group(rstd, p.rstd);
    load_parameter<T>(weight, p.weight, mine ? c : 0, 1.0f);
    load_parameter<T>(bias, p.bias, mine ? c : 0, 0.0f);
  }
  if constexpr (APPLY && !BACKWARD) {
#pragma unroll
    for (int e = 0; e < N; ++e) rstd[e] *= weight[e];
    each([&](int64_t at, float(&x)[N]) {
#pragma unroll
      for (int e = 0; e < N; ++e) {
        x[e] = scalar::activate((x[e] - mean[e]) * rstd[e] + bias[e], p.activation);
      }
      store_pack(p.out + at, x);
    });
  } else if constexpr (APPLY) {
    float mean_g[N], mean_gx[N];
    of_group(mean_g, p.mean_g);
    of_group(mean_gx, p.mean_gx);
    each([&](int64_t at, float(&x)[N]) {
      float dy[N];
      load_pack(dy, p.dy + at);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const Slope s = slope(dy[e], x[e], mean[e], rstd[e], weight[e], bias[e], p.activation);
        x[e] = rstd[e] * (s.g - mean_g[e] - s.xhat * mean_gx[e]);
      }
      store_pack(p.out + at, x);
    });
  } else {
    float first[N] = {}, second[N] = {};
    const auto rows_of = [&](int of) {
      return static_cast<float>((end - begin - of + lanes - 1) / lanes);
    };
    if constexpr (BACKWARD) {
      each([&](int64_t at, float(&x)[N]) {
        float dy[N];
        load_pack(dy, p.dy + at);
#pragma unroll
        for (int e = 0; e < N; ++e) {
          const Slope s = slope(dy[e], x[e], mean[e], rstd[e], weight[e], bias[e], p.activation);
          first[e] += s.g;
          second[e] += s.g * s.xhat;
        }
      });
    } else {
      each([&](int64_t, float(&x)[N]) {
#pragma unroll
        for (int e = 0; e < N; ++e) first[e] += x[e];
      });
      const float rows = rows_of(lane);
#pragma unroll
      for (int e = 0; e < N; ++e) first[e] = rows > 0.0f ? first[e] / rows : 0.0f;
      float lack[N] = {};
      each([&](int64_t, float(&x)[N]) {
#pragma unroll
        for (int e = 0; e < N; ++e) {
          lack[e] += x[e] - first[e];
          second[e] += (x[e] - first[e]) * (x[e] - first[e]);
        }
      });
#pragma unroll
      for (int e = 0; e < N; ++e) first[e] += rows > 0.0f ? lack[e] / rows : 0.0f;
    }
    // element e of every thread side by side: no two threads of a warp in one bank
    float* const firsts = reinterpret_cast<float*>(shared_memory());
    float* const seconds = firsts + N * kNormThreads;
#pragma unroll
    for (int e = 0; e < N; ++e) {
      firsts[e * kNormThreads + threadIdx.x] = first[e];
      seconds[e * kNormThreads + threadIdx.x] = second[e];
    }
    __syncthreads();
    if (!mine || lane > 0) return;
    float* const out = p.parts + block * p.channels + c;
    for (int e = 0; e < N; ++e) {
      const float* const a = firsts + e * kNormThreads + threadIdx.x;
      const float* const b = seconds + e * kNormThreads + threadIdx.x;
      float x = 0.0f, y = 0.0f;
      if constexpr (BACKWARD) {
        for (int l = 0; l < lanes; ++l) {
          x += a[l * p.columns];
          y += b[l * p.columns];
        }
      } else {
        for (int l = 0; l < lanes && begin + l < end; ++l) {
          x += rows_of(l) * (a[l * p.columns] - a[0]);
        }
        x = a[0] + x / static_cast<float>(end - begin);
        for (int l = 0; l < lanes && begin + l < end; ++l) {
          const float apart = a[l * p.columns] - x;
          y += b[l * p.columns] + rows_of(l) * apart * apart;
        }
      }
      out[e] = x;
      out[e + p.second()] = y;
    }
  }
}

// One group of one sample: its parts' entries, in their order.
template <typename T, bool BACKWARD>
__global__ void __launch_bounds__(kNormThreads) norm_merge_kernel(const GroupParams<T> p) {
  float* const shared = reinterpret_cast<float*>(shared_memory());
  const int64_t sample = blockIdx.x / p.groups, group = blockIdx.x % p.groups;
  const int64_t own = p.entries / p.groups;  // entries of this group in a part
  const float size = static_cast<float>(p.width * p.positions);
  const int64_t total = p.entries == p.groups ? p.width * p.positions : p.positions;
  // body(values of an entry, elements behind it)
  const auto each = [&](const auto& body) {
    // divided in 32 bits: in 64 it is a call, with a stack
    const uint32_t width = static_cast<uint32_t>(own);
    const uint32_t all = static_cast<uint32_t>(p.count) * width;
    for (uint32_t i = threadIdx.x; i < all; i += kNormThreads) {
      const int64_t part = i / width;
      const int64_t at = (sample * p.count + part) * p.entries + group * own + i % width;
      const int64_t left = total - part * p.length;
      body(Pair{p.parts[at], p.parts[at + p.second()]},
           static_cast<float>(left < p.length ? left : p.length));
    }
  };
  float first = 0.0f, second = 0.0f;
  if constexpr (BACKWARD) {
    each([&](Pair v, float) {
      first += v.first;
      second += v.second;
    });
    first = block_sum(first, shared) / size;
    second = block_sum(second, shared) / size;
    if (threadIdx.x == 0) {
      p.mean_g[blockIdx.x] = first;
      p.mean_gx[blockIdx.x] = second;
    }
  } else {
    // sums of differences from the first entry's mean stay small
    const float center = p.parts[sample * p.count * p.entries + group * own];
    each([&](Pair v, float count) { first += count * (v.first - center); });
    const float mean = center + block_sum(first, shared) / size;
    each([&](Pair v, float count) {
      second += v.second + count * (v.first - mean) * (v.first - mean);
    });
    second = block_sum(second, shared);
    if (threadIdx.x == 0) {
      p.mean[blockIdx.x] = mean;
      p.rstd[blockIdx.x] = rstd_of(second, size, p.eps);
    }
  }
}

template <typename T>
GroupParams<T> params(const GroupNorm& a, int pack) {
  GroupParams<T> p{};
  p.x = static_cast<const T*>(a.x);
  p.dy = static_cast<const T*>(a.dy);
  p.out = static_cast<T*>(a.out);
  p.weight = a.weight;
  p.bias = a.bias;
  p.mean = a.mean;
  p.rstd = a.rstd;
  p.samples = a.samples;
  p.channels = a.channels;
  p.positions = a.positions;
  p.groups = a.groups;
  p.width = a.channels / a.groups;
  p.activation = a.activation;
  p.eps = a.eps;
  if (a.last) {
    const int64_t packs = a.channels / pack;
    p.blocks_c = static_cast<int>(ceil_div(packs, kMaxColumns));
    p.columns = static_cast<int>(ceil_div(packs, p.blocks_c));
    p.length = std::max<int64_t>(kPart / (int64_t{p.columns} * pack), 1);
    p.count = ceil_div(a.positions, p.length);
    p.entries = a.channels;
  } else {
    p.length = kPart;
    p.count = ceil_div(p.width * a.positions, kPart);
    p.entries = a.groups;
  }
  p.parts = a.workspace;
  p.mean_g = a.workspace + 2 * p.samples * p.count * p.entries;
  p.mean_gx = p.mean_g + p.samples * p.groups;
  return p;
}

template <typename T>
int pack_of(const GroupNorm& a) {
  const int64_t run = a.last ? a.channels : a.positions;
  const bool packs = run % kVector<T> == 0 && aligned(a.x, 16) && aligned(a.dy, 16) &&
                     aligned(a.out, 16) && whole(a.weight) && whole(a.bias);
  return packs ? kVector<T> : 1;
}

template <typename T, int N, bool BACKWARD>
void run(const GroupNorm& a, cudaStream_t stream) {
  const GroupParams<T> p = params<T>(a, N);
  const int64_t groups = p.samples * p.groups;
  const char* name = BACKWARD ? "group_norm_backward" : "group_norm_forward";
  const auto start = [&](auto* kernel, int64_t blocks, int64_t shared_bytes) {
    launch(name, kernel, blocks, 1, kNormThreads, shared_bytes, stream, p);
  };
  if (a.last) {
    const int64_t blocks = p.samples * p.count * p.blocks_c;
    start(norm_last_kernel<T, N, BACKWARD, false>, blocks, 2 * N * kNormThreads * 4);
    start(norm_merge_kernel<T, BACKWARD>, groups, kSumBytes);
    start(norm_last_kernel<T, N, BACKWARD, true>, blocks, 0);
  } else if (p.count <= 1) {
    start(norm_group_kernel<T, N, BACKWARD>, groups, kSumBytes);
  } else {
    start(norm_run_kernel<T, N, BACKWARD, false>, groups * p.count, kSumBytes);
    start(norm_merge_kernel<T, BACKWARD>, groups, kSumBytes);
    start(norm_run_kernel<T, N, BACKWARD, true>, groups * p.count, kSumBytes);
  }
}

}  // namespace

int64_t group_norm_workspace(DType dtype, const GroupNorm& args) {
  int64_t size = 0;
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const GroupParams<T> p = params<T>(args, pack_of<T>(args));
    if (args.last || p.count > 1) {
      size = 2 * p.samples * (p.count * p.entries + p.groups);
    }
  });
  return size;
}

void group_norm(DType dtype, const GroupNorm& args, cudaStream_t stream) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool backward = args.dy != nullptr;
    if (pack_of<T>(args) > 1) {
      backward ? run<T, kVector<T>, true>(args, stream) : run<T, kVector<T>, false>(args, stream);
    } else {
      backward ? run<T, 1, true>(args, stream) : run<T, 1, false>(args, stream);
    }
  });
}

}  // namespace a3fta::cuda
