// Vectors, element types and the arithmetic of one instruction set. Included by kernels.cpp alone.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#define A3FTA_INLINE inline __attribute__((always_inline))

namespace {

// NV vectors by MR rows of accumulators fill the register file
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kMaxRows = 6, kMaxVectors = 4;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kMaxRows = 6, kMaxVectors = 2;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kMaxRows = 6, kMaxVectors = 4;
#else
constexpr int kVectorBytes = 16;
constexpr int kMaxRows = 6, kMaxVectors = 2;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

static A3FTA_INLINE uint32_t to_bits(float x) {
  union {
    float value;
    uint32_t bits;
  } u{x};
  return u.bits;
}

static A3FTA_INLINE float from_bits(uint32_t x) {
  union {
    uint32_t bits;
    float value;
  } u{x};
  return u.value;
}

// a or b by masks: where compilers see a branch they do not vectorise the loop around it
static A3FTA_INLINE uint32_t select(bool which, uint32_t a, uint32_t b) {
  return b ^ ((a ^ b) & (0u - uint32_t(which)));
}

static A3FTA_INLINE double widen(double x) { return x; }
static A3FTA_INLINE float widen(float x) { return x; }
static A3FTA_INLINE float widen(BFloat16 x) { return from_bits(uint32_t(x.bits) << 16); }
static A3FTA_INLINE float widen(Float16 x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  // 2^112 moves the exponent's bias, and makes denormals normal
  const uint32_t finite = to_bits(from_bits(magnitude) * from_bits(0x77800000u));
  const uint32_t special = magnitude | 0x7f800000u;
  return from_bits(sign | select(magnitude >= 0x0f800000u, special, finite));
}

// to nearest, ties to even
static A3FTA_INLINE void narrow(double x, double& out) { out = x; }
static A3FTA_INLINE void narrow(float x, float& out) { out = x; }
static A3FTA_INLINE void narrow(float x, BFloat16& out) {
  const uint32_t bits = to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
static A3FTA_INLINE void narrow(float x, Float16& out) {
  const uint32_t bits = to_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // below 2^-14 the half is denormal: adding 0.5 lines the mantissa up and rounds it
  const uint32_t denormal = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t half = select(magnitude < 0x38800000u, denormal, normal);
  half = select(magnitude >= 0x477ff000u, 0x7c00u, half);
  half = select(magnitude > 0x7f800000u, 0x7e00u, half);
  out.bits = uint16_t(sign | half);
}

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};

// A unit is what one lane multiplies in one step of K: a number, or a pair of bfloat16.
template <typename Acc_>
struct Plain {
  using Acc = Acc_;
  using Unit = Acc_;
  using Vec = typename VectorOf<Acc>::type;
  static constexpr int kLanes = kVectorBytes / int(sizeof(Acc));
  static constexpr int kPerUnit = 1;
  static A3FTA_INLINE Vec load(const Acc* p) {
    Vec v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static A3FTA_INLINE void store(Acc* p, Vec v) { memcpy(p, &v, sizeof v); }
  static A3FTA_INLINE Vec fma(Vec acc, Unit a, Vec b) { return acc + a * b; }
};

#if defined(__AVX512BF16__)
// two neighbours in memory; rows of bfloat16 need not start on four bytes
struct __attribute__((packed, aligned(2), may_alias)) Pair {
  uint32_t bits;
};

struct Pairs {
  using Acc = float;
  using Unit = Pair;
  using Vec = VectorOf<float>::type;
  static constexpr int kLanes = kVectorBytes / 4;
  static constexpr int kPerUnit = 2;
  static A3FTA_INLINE Vec load(const Acc* p) {
    Vec v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static A3FTA_INLINE Vec load(const Unit* p) {
    Vec v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static A3FTA_INLINE void store(Acc* p, Vec v) { memcpy(p, &v, sizeof v); }
  static A3FTA_INLINE Vec fma(Vec acc, Unit a, Vec b) {
    return (Vec)_mm512_dpbf16_ps(
        (__m512)acc, (__m512bh)_mm512_set1_epi32(int(a.bits)), (__m512bh)b);
  }
};
#endif

// the same conversions on a whole vector; float16 has only the scalar ones
template <typename T, typename Vec>
struct Converts {
  static constexpr bool kWhole = false;
};

template <typename Acc, typename Vec>
struct SameConverts {
  static constexpr bool kWhole = true;
  static A3FTA_INLINE Vec widen(const Acc* p) {
    Vec v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static A3FTA_INLINE void narrow(Vec v, Acc* p) { memcpy(p, &v, sizeof v); }
};
template <typename Vec>
struct Converts<float, Vec> : SameConverts<float, Vec> {};
template <typename Vec>
struct Converts<double, Vec> : SameConverts<double, Vec> {};

template <typename Vec>
struct Converts<BFloat16, Vec> {
  static constexpr bool kWhole = true;
  typedef uint32_t Wide __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
  static A3FTA_INLINE Vec widen(const BFloat16* p) {
    Half half;
    memcpy(&half, p, sizeof half);
    return (Vec)(__builtin_convertvector(half, Wide) << 16);
  }
  static A3FTA_INLINE void narrow(Vec v, BFloat16* p) {
#if defined(__AVX512BF16__)
    // numbers below 2^-126 become zero, as they do in this instruction set's products
    const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
    memcpy(p, &half, sizeof half);
#else
    const Wide bits = (Wide)v;
    const Wide rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Wide nan = (Wide)(v != v);
    const Half half = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0u), Half);
    memcpy(p, &half, sizeof half);
#endif
  }
};

// how a tensor dtype is multiplied here
template <typename T>
struct EngineOf {
  using type = Plain<typename Accumulator<T>::type>;
};
#if defined(__AVX512BF16__)
template <>
struct EngineOf<BFloat16> {
  using type = Pairs;
};
#endif

}  // namespace
