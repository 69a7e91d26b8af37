// Register-blocked products over packed panels. Included by kernels.cpp alone.
//
// The right operand is packed: panel p holds columns p * kWidth and on, one row of lanes per unit
// of K, padded with zeros to whole vectors. The left operand is read in place.
#pragma once

#include "simd.h"

namespace {

static A3FTA_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static A3FTA_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
static A3FTA_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// acc = A @ B, with A(i, k) = a[i * stride_i + k * stride_k] and B one packed panel
template <class E, int MR, int NV>
static A3FTA_INLINE void multiply(
    int64_t depth, const typename E::Unit* a, int64_t stride_i, int64_t stride_k,
    const typename E::Unit* b, typename E::Vec (&acc)[MR][NV]) {
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) acc[i][j] = typename E::Vec{};
  for (int64_t k = 0; k < depth; ++k) {
    typename E::Vec right[NV];
    for (int j = 0; j < NV; ++j) right[j] = E::load(b + j * E::kLanes);
    for (int i = 0; i < MR; ++i) {
      const typename E::Unit left = a[i * stride_i];
      for (int j = 0; j < NV; ++j) acc[i][j] = E::fma(acc[i][j], left, right[j]);
    }
    a += stride_k;
    b += NV * E::kLanes;
  }
}

// C (rows, NV vectors) = A @ B, or += where `add`
template <class E, int MR, int NV>
__attribute__((noinline)) void tile(
    int64_t depth, const typename E::Unit* a, int64_t stride_i, int64_t stride_k,
    const typename E::Unit* b, typename E::Acc* c, int64_t stride_c, bool add) {
  typename E::Vec acc[MR][NV];
  multiply<E, MR, NV>(depth, a, stride_i, stride_k, b, acc);
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) {
      typename E::Acc* to = c + i * stride_c + j * E::kLanes;
      E::store(to, add ? E::load(to) + acc[i][j] : acc[i][j]);
    }
}

// out = A @ B + bias + residual, a tile of full width in the tensors' dtype
template <class E, typename T, int MR>
__attribute__((noinline)) void finished_tile(
    int64_t depth, const typename E::Unit* a, int64_t stride_i, const typename E::Unit* b,
    const typename E::Acc* bias, const T* residual, int64_t residual_stride, T* out,
    int64_t out_stride) {
  using C = Converts<T, typename E::Vec>;
  typename E::Vec acc[MR][kMaxVectors];
  multiply<E, MR, kMaxVectors>(depth, a, stride_i, 1, b, acc);
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < kMaxVectors; ++j) {
      const int at = j * E::kLanes;
      typename E::Vec x = acc[i][j];
      if (bias != nullptr) x += E::load(bias + at);
      if (residual != nullptr) x += C::widen(residual + i * residual_stride + at);
      C::narrow(x, out + i * out_stride + at);
    }
}

template <class E>
struct Gemm {
  using Unit = typename E::Unit;
  using Acc = typename E::Acc;
  static constexpr int kLanes = E::kLanes;
  static constexpr int kWidth = kMaxVectors * E::kLanes;

  using Tile = void (*)(
      int64_t, const Unit*, int64_t, int64_t, const Unit*, Acc*, int64_t, bool);

  template <int NV>
  static Tile pick(int rows) {
    static const Tile tiles[kMaxRows] = {tile<E, 1, NV>, tile<E, 2, NV>, tile<E, 3, NV>,
                                         tile<E, 4, NV>, tile<E, 5, NV>, tile<E, 6, NV>};
    return tiles[rows - 1];
  }

  static Tile pick(int rows, int vectors) {
    static_assert(kMaxRows == 6 && (kMaxVectors == 4 || kMaxVectors == 2));
    if constexpr (kMaxVectors == 4) {
      if (vectors == 4) return pick<4>(rows);
      if (vectors == 3) return pick<3>(rows);
    }
    return vectors == 2 ? pick<2>(rows) : pick<1>(rows);
  }

  static int64_t panels(int64_t columns) { return ceil_div(columns, kWidth); }
  static int vectors(int64_t columns, int64_t panel) {
    return int(min_of(kMaxVectors, ceil_div(columns - panel * kWidth, kLanes)));
  }
  static int64_t padded(int64_t columns) { return ceil_div(columns, kLanes) * kLanes; }
  static int64_t units(int64_t k) { return ceil_div(k, E::kPerUnit); }

  // C (rows, one panel); K in steps whose piece of the panel stays in the first cache
  static void panel(
      int64_t rows, int64_t depth, const Unit* a, int64_t stride_i, int64_t stride_k,
      const Unit* b, int vectors, Acc* c, int64_t stride_c, bool add) {
    const int64_t steps = ceil_div(depth, 24576 / (kWidth * int64_t(sizeof(Acc))));
    const int64_t step = ceil_div(depth, max_of(steps, 1));
    if (depth == 0 && !add) {
      for (int64_t i = 0; i < rows; ++i)
        memset(c + i * stride_c, 0, size_t(vectors) * kLanes * sizeof(Acc));
    }
    for (int64_t k = 0; k < depth; k += step) {
      const int64_t n = min_of(step, depth - k);
      for (int64_t i = 0; i < rows; i += kMaxRows) {
        const int r = int(min_of(kMaxRows, rows - i));
        pick(r, vectors)(
            n, a + i * stride_i + k * stride_k, stride_i, stride_k, b + k * vectors * kLanes,
            c + i * stride_c, stride_c, add || k > 0);
      }
    }
  }
};

// rows of a panel lie far apart, where the hardware does not look ahead
constexpr int64_t kAhead = 8;
template <typename T>
static A3FTA_INLINE void prefetch(const T* row, int64_t n) {
  for (int64_t j = 0; j < n; j += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + j);
}

// Packing, by engine. `by_rows`: the source is (columns, K), so packing transposes it;
// `by_columns`: the source is (K, columns).
template <typename T, typename Acc>
struct Pack {
  using G = Gemm<Plain<Acc>>;

  static void by_rows(const T* source, int64_t stride, int64_t columns, int64_t depth, Acc* out) {
    for (int64_t p = 0; p < G::panels(columns); ++p) {
      const int64_t width = G::vectors(columns, p) * G::kLanes;
      const int64_t n = min_of(width, columns - p * G::kWidth);
      const T* from = source + p * G::kWidth * stride;
      for (int64_t k = 0; k < depth; ++k, out += width) {
        for (int64_t j = 0; j < n; ++j) out[j] = widen(from[j * stride + k]);
        for (int64_t j = n; j < width; ++j) out[j] = 0;
      }
    }
  }

  // one panel
  static void by_columns(const T* source, int64_t stride, int64_t n, int64_t depth, Acc* out) {
    const int64_t width = G::padded(n);
    if (n == G::kWidth) {
      for (int64_t k = 0; k < depth; ++k, out += G::kWidth) {
        prefetch(source + min_of(k + kAhead, depth - 1) * stride, G::kWidth);
#pragma GCC ivdep
        for (int j = 0; j < G::kWidth; ++j) out[j] = widen(source[k * stride + j]);
      }
      return;
    }
    for (int64_t k = 0; k < depth; ++k, out += width) {
      for (int64_t j = 0; j < n; ++j) out[j] = widen(source[k * stride + j]);
      for (int64_t j = n; j < width; ++j) out[j] = 0;
    }
  }

  // a left operand, row by row
  static constexpr bool kInPlace = sizeof(T) == sizeof(Acc);
  static bool in_place(int64_t, int64_t) { return kInPlace; }
  static void left(const T* source, int64_t stride, int64_t rows, int64_t depth, Acc* out) {
    for (int64_t i = 0; i < rows; ++i, out += depth)
      for (int64_t k = 0; k < depth; ++k) out[k] = widen(source[i * stride + k]);
  }
};

#if defined(__AVX512BF16__)
template <>
struct Pack<BFloat16, Pairs> {
  using G = Gemm<Pairs>;
  using Unit = Pairs::Unit;

  static A3FTA_INLINE Unit pair(BFloat16 low, BFloat16 high) {
    return {uint32_t(low.bits) | uint32_t(high.bits) << 16};
  }
  static A3FTA_INLINE Unit half_pair(BFloat16 low) { return {low.bits}; }

  static void by_rows(
      const BFloat16* source, int64_t stride, int64_t columns, int64_t depth, Unit* out) {
    for (int64_t p = 0; p < G::panels(columns); ++p) {
      const int64_t width = G::vectors(columns, p) * G::kLanes;
      const int64_t n = min_of(width, columns - p * G::kWidth);
      const BFloat16* from = source + p * G::kWidth * stride;
      for (int64_t k = 0; k < depth; k += 2, out += width) {
        const bool whole = k + 1 < depth;
        for (int64_t j = 0; j < n; ++j) {
          const BFloat16* x = from + j * stride + k;
          out[j] = whole ? pair(x[0], x[1]) : half_pair(x[0]);
        }
        for (int64_t j = n; j < width; ++j) out[j] = {0};
      }
    }
  }

  static A3FTA_INLINE void interleave(
      const BFloat16* low, const BFloat16* high, int64_t n, Unit* out) {
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) out[j] = pair(low[j], high[j]);
  }

  static void by_columns(
      const BFloat16* source, int64_t stride, int64_t n, int64_t depth, Unit* out) {
    const int64_t width = G::padded(n);
    for (int64_t k = 0; k < depth; k += 2, out += width) {
      const BFloat16* low = source + k * stride;
      prefetch(source + min_of(k + kAhead, depth - 1) * stride, n);
      prefetch(source + min_of(k + kAhead + 1, depth - 1) * stride, n);
      if (k + 1 == depth) {
        for (int64_t j = 0; j < n; ++j) out[j] = half_pair(low[j]);
      } else if (n == G::kWidth) {
        interleave(low, low + stride, G::kWidth, out);
      } else {
        interleave(low, low + stride, n, out);
      }
      for (int64_t j = n; j < width; ++j) out[j] = {0};
    }
  }

  static bool in_place(int64_t stride, int64_t depth) { return stride % 2 == 0 && depth % 2 == 0; }
  static void left(
      const BFloat16* source, int64_t stride, int64_t rows, int64_t depth, Unit* out) {
    for (int64_t i = 0; i < rows; ++i) {
      const BFloat16* x = source + i * stride;
      for (int64_t k = 0; k < depth; k += 2)
        *out++ = k + 1 < depth ? pair(x[k], x[k + 1]) : half_pair(x[k]);
    }
  }
};
#endif

}  // namespace
