// Scalar activations and their derivatives, shared by the CPU and the CUDA kernels.
//
// On the host, float functions are free of branches and library calls, so that loops over them
// vectorise, and everything has internal linkage and is inlined: the CPU kernels are compiled once
// per instruction set, and a merged inline function would carry the wrong one.
#pragma once

#include <math.h>
#include <stdint.h>

#if defined(__CUDACC__)
#define A3FTA_HD __host__ __device__ __forceinline__
#else
#define A3FTA_HD inline __attribute__((always_inline))
#endif

namespace a3fta {

// the order of ACTIVATIONS in ops/activations.py
enum Activation : int { kIdentity = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kSilu = 4 };
constexpr int kActivations = 5;

namespace scalar {

static A3FTA_HD double exponential(double x) { return ::exp(x); }

static A3FTA_HD float exponential(float x) {
#if defined(__CUDA_ARCH__)
  return expf(x);
#else
  // 2^y, y = n + f, |f| <= 1/2, with a polynomial for 2^f. At the ends 2^n becomes infinity and
  // zero; NaN passes the comparisons and the polynomial. The error grows to 4e-6 of the result at
  // the ends: of no account in what is made of it here
  float y = x * 1.44269504f;
  y = 128.0f < y ? 128.0f : y;
  y = -127.0f > y ? -127.0f : y;
  union {
    float value;
    uint32_t bits;
  } t;
  t.value = y + 12582912.0f;  // 1.5 * 2^23: rounds, and leaves n in the lowest bits
  const float f = y - (t.value - 12582912.0f);
  float p = 0.00132647203f;
  p = p * f + 0.00967151299f;
  p = p * f + 0.0555073358f;
  p = p * f + 0.240222424f;
  p = p * f + 0.693147004f;
  p = p * f + 1.0f;
  t.bits = (t.bits << 23) + 0x3f800000u;
  return p * t.value;
#endif
}

static A3FTA_HD double sigmoid(double x) { return 1.0 / (1.0 + exponential(-x)); }

static A3FTA_HD float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// sigmoid(x) and its derivative, which s (1 - s) would round to nothing where s is close to 1
template <typename T>
struct Logistic {
  T value;
  T slope;
};

template <typename T>
static A3FTA_HD Logistic<T> logistic(T x) {
  const T e = exponential(x < T(0) ? x : -x);
  const T r = T(1) / (T(1) + e);
  return {x < T(0) ? e * r : r, e * r * r};
}

// the normal distribution's cdf and density at a
template <typename T>
struct Normal {
  T cdf;
  T density;
};

static A3FTA_HD Normal<double> normal(double a) {
  return {0.5 * (1.0 + ::erf(a * 0.70710678118654752440)),
          0.39894228040143267794 * exponential(-0.5 * a * a)};
}

static A3FTA_HD Normal<float> normal(float a) {
#if defined(__CUDA_ARCH__)
  return {0.5f * (1.0f + erff(a * 0.707106781f)), 0.398942280f * expf(-0.5f * a * a)};
#else
  // cdf(-t) = exp(-t^2 / 2) g(t) for t >= 0, where g is smooth: a polynomial in 1 / (1 + p t),
  // fitted to erfcx(t / sqrt 2) / 2 on [0, 14]
  const float t = a < 0.0f ? -a : a;
  const float u = 1.0f / (1.0f + 0.210999995f * t);
  float g = -0.0687032342f;
  g = g * u + 0.265528202f;
  g = g * u - 0.297435701f;
  g = g * u + 0.316026837f;
  g = g * u - 0.0734144002f;
  g = g * u + 0.117261522f;
  g = g * u + 0.0713891909f;
  g = g * u + 0.0852231905f;
  g = g * u + 0.0841243789f;
  const float e = exponential(-0.5f * a * a);
  const float tail = e * (g * u);
  return {a < 0.0f ? tail : 1.0f - tail, 0.398942280f * e};
#endif
}

// act(a)
template <typename T>
static A3FTA_HD T activate(T a, int activation) {
  switch (activation) {
    case kRelu:
      return a < T(0) ? T(0) : a;  // NaN stays
    case kGelu:
      return a * normal(a).cdf;
    case kGeluTanh:
      // (1 + tanh u) / 2 = sigmoid(2 u)
      return a * sigmoid(T(1.5957691216057308) * (a + T(0.044715) * a * a * a));
    case kSilu:
      return a * sigmoid(a);
    default:
      return a;
  }
}

// dz * act'(a)
template <typename T>
static A3FTA_HD T activate_backward(T dz, T a, int activation) {
  switch (activation) {
    case kRelu:
      return a <= T(0) ? T(0) : dz;
    case kGelu: {
      const Normal<T> n = normal(a);
      return dz * (n.cdf + a * n.density);
    }
    case kGeluTanh: {
      const Logistic<T> s = logistic(T(1.5957691216057308) * (a + T(0.044715) * a * a * a));
      const T slope = T(1.5957691216057308) * (T(1) + T(3 * 0.044715) * a * a);
      return dz * (s.value + a * s.slope * slope);
    }
    case kSilu: {
      const Logistic<T> s = logistic(a);
      return dz * (s.value + a * s.slope);
    }
    default:
      return dz;
  }
}

}  // namespace scalar
}  // namespace a3fta
