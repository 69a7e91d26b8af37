// group_norm and layer_norm on one instruction set. Included by kernels.cpp alone.
//
//     xhat = (x - mean) * rstd,  y = act(weight * xhat + bias)
//     g  = dy * act'(weight * xhat + bias) * weight
//     dx = rstd * (g - mean(g) - xhat * mean(g * xhat))
//
// A variance is a sum of squared differences from a mean, of parts that stay in the first cache,
// and the parts are merged in float64: an offset common to x costs no precision. Parts do not
// depend on the number of threads, so that results do not either.
#pragma once

#include "blocks.h"

namespace {

using a3fta::cpu::Affine;
using a3fta::cpu::GroupNormArgs;
using a3fta::cpu::LayerNormArgs;

// a value for each element, or the same for all
template <typename Acc>
struct Each {
  const Acc* values;
  A3FTA_INLINE Acc operator[](int64_t j) const { return values[j]; }
};
template <typename Acc>
struct Same {
  Acc value;
  A3FTA_INLINE Acc operator[](int64_t) const { return value; }
};
template <typename Acc>
struct Scaled {
  const Acc* values;
  Acc factor;
  A3FTA_INLINE Acc operator[](int64_t j) const { return values[j] * factor; }
};

// count, mean, and the sum of squared differences from it
struct Moments {
  double count, mean, squares;
};

struct Sums {
  double g, gx;
};

static A3FTA_INLINE double rstd_of(const Moments& m, double eps) {
  return 1.0 / __builtin_sqrt(m.squares / m.count + eps);
}

static A3FTA_INLINE Moments merged(const Moments& a, const Moments& b) {
  const double count = a.count + b.count, difference = b.mean - a.mean;
  return {count, a.mean + difference * (b.count / count),
          a.squares + b.squares + difference * difference * (a.count * b.count / count)};
}

template <typename T>
struct Norm {
  using Acc = typename Accumulator<T>::type;
  using V = Plain<Acc>;
  using Vec = typename V::Vec;
  static constexpr int64_t kPart = 4096, kTile = 1024;  // elements
  static constexpr int kSums = 4;  // vectors that add up side by side
  static constexpr bool kCopied = sizeof(T) != sizeof(Acc);

  // f(j) of every multiple of lanes, four chains of sums, and of the rest one by one
  template <int N, class Whole, class One>
  static A3FTA_INLINE void reduce(int64_t n, Acc (&out)[N], const Whole& whole, const One& one) {
    Vec sums[kSums][N] = {};
    int64_t j = 0;
    for (; j + kSums * V::kLanes <= n; j += kSums * V::kLanes)
      for (int k = 0; k < kSums; ++k) whole(j + k * V::kLanes, sums[k]);
    for (; j + V::kLanes <= n; j += V::kLanes) whole(j, sums[0]);
    for (int i = 0; i < N; ++i) {
      alignas(64) Acc lanes[V::kLanes];
      V::store(lanes, (sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]));
      for (int half = V::kLanes / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
      out[i] = lanes[0];
    }
    for (; j < n; ++j) one(j, out);
  }

  // sums of x - center and of its square
  static void differences(const Acc* x, int64_t n, Acc center, Acc (&d)[2]) {
    reduce(
        n, d,
        [&](int64_t j, Vec* s) {
          const Vec v = V::load(x + j) - center;
          s[0] += v;
          s[1] += v * v;
        },
        [&](int64_t j, Acc* s) {
          const Acc v = x[j] - center;
          s[0] += v;
          s[1] += v * v;
        });
  }

  // from a guess of the mean, and where that was no good from a better one
  static Moments moments_of_part(const Acc* x, int64_t n) {
    const int64_t few = min_of(n, kSums * V::kLanes);
    Acc sum[1], d[2];
    reduce(
        few, sum, [&](int64_t j, Vec* s) { s[0] += V::load(x + j); },
        [&](int64_t j, Acc* s) { s[0] += x[j]; });
    Acc center = sum[0] / Acc(few);
    differences(x, n, center, d);
    if (is_off(d[0], d[1], Acc(n))) {
      center += d[0] / Acc(n);
      differences(x, n, center, d);
    }
    return around(center, d[0], d[1], n);
  }

  // whether the center is so far from the mean, over 2.6 deviations, that the squares of
  // differences tell of little else
  static A3FTA_INLINE bool is_off(Acc lacks, Acc squares, Acc n) {
    return lacks * lacks > Acc(0.875) * squares * n;
  }

  static A3FTA_INLINE Moments around(Acc center, Acc lacks, Acc squares, int64_t n) {
    const double lack = double(lacks) / double(n), sum = double(squares) - lack * double(lacks);
    return {double(n), double(center) + lack, sum < 0.0 ? 0.0 : sum};
  }

  static Moments moments(const T* x, int64_t n) {
    alignas(64) Acc copy[kCopied ? kPart : 1];
    Moments found{0.0, 0.0, 0.0};
    for (int64_t i = 0; i < n; i += kPart) {
      const int64_t count = min_of(kPart, n - i);
      const Moments part = moments_of_part(wide(x + i, count, copy), count);
      found = i == 0 ? part : merged(found, part);
    }
    return found;
  }

  // x itself, or where its elements are narrower a copy
  static const Acc* wide(const T* x, int64_t n, Acc* copy) {
    if constexpr (kCopied) {
#pragma GCC ivdep
      for (int64_t j = 0; j < n; ++j) copy[j] = widen(x[j]);
      return copy;
    } else {
      return x;
    }
  }

  // y = act((x - mean) * scale + shift)
  template <int ACT, class Mean, class Scale, class Shift>
  static A3FTA_INLINE void apply(
      const T* x, int64_t n, Mean mean, Scale scale, Shift shift, T* y) {
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j)
      narrow(
          a3fta::scalar::activate<Acc>((widen(x[j]) - mean[j]) * scale[j] + shift[j], ACT), y[j]);
  }

  // in the type of the sums, what is dear to compute twice waits in dx
  template <int ACT>
  static constexpr bool kHeld = !kCopied && ACT != a3fta::kIdentity;

  // xhat and g
  template <int ACT, class Mean, class Parameter>
  static A3FTA_INLINE void slopes(
      const T* dy, const T* x, int64_t n, Mean mean, Mean rstd, Parameter weight, Parameter bias,
      Acc* xhat, Acc* g) {
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) {
      const Acc h = (widen(x[j]) - mean[j]) * rstd[j];
      xhat[j] = h;
      g[j] = a3fta::scalar::activate_backward<Acc>(widen(dy[j]), h * weight[j] + bias[j], ACT) *
             weight[j];
    }
  }

  static A3FTA_INLINE Sums sums_of(const Acc* xhat, const Acc* g, int64_t n) {
    Acc s[2];
    reduce(
        n, s,
        [&](int64_t j, Vec* to) {
          const Vec v = V::load(g + j);
          to[0] += v;
          to[1] += v * V::load(xhat + j);
        },
        [&](int64_t j, Acc* to) {
          to[0] += g[j];
          to[1] += g[j] * xhat[j];
        });
    return {double(s[0]), double(s[1])};
  }

  // dx = rstd * (g - mean_g - xhat * mean_gx); g may lie in dx
  template <class Mean>
  static A3FTA_INLINE void finish(
      const T* x, const Acc* g, int64_t n, Mean mean, Mean rstd, Mean mean_g, Mean mean_gx,
      T* dx) {
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) {
      const Acc h = (widen(x[j]) - mean[j]) * rstd[j];
      narrow(rstd[j] * (g[j] - mean_g[j] - h * mean_gx[j]), dx[j]);
    }
  }

  // weight and bias of every channel, 1 and 0 where there are none
  struct Parameters {
    Parameters(const Host& host, const Affine& a, int64_t channels)
        : weight(host, channels), bias(host, channels) {
      fill(a.weight, a.weight_wide, channels, Acc(1), weight);
      fill(a.bias, a.bias_wide, channels, Acc(0), bias);
    }
    const Buffer<Acc> weight, bias;

   private:
    static void fill(const void* from, bool is_wide, int64_t n, Acc absent, Acc* to) {
      for (int64_t j = 0; j < n; ++j) {
        if (from == nullptr)
          to[j] = absent;
        else
          to[j] = is_wide ? static_cast<const Acc*>(from)[j]
                          : widen(static_cast<const T*>(from)[j]);
      }
    }
  };
};

}  // namespace
