// quantize and dequantize on one instruction set. Included by kernels.cpp alone.
//
//     mid = bf16((lo + hi) / 2);  half = bf16(max(hi - mid, mid - lo)), rounded up
//     code = round((x - mid) / half * 127);  x~ = mid + half * code / 127
//
// over blocks of kQuantizeBlock elements; NaN for mid and half where a block is not finite.
#pragma once

#include "blocks.h"

namespace {

using a3fta::cpu::DequantizeArgs;
using a3fta::cpu::kQuantizeBlock;
using a3fta::cpu::QuantizeArgs;

template <typename T>
constexpr double kLargest = 3.4028234663852886e38;
template <>
constexpr double kLargest<double> = 1.7976931348623157e308;
template <>
constexpr double kLargest<BFloat16> = 3.3895313892515355e38;
template <>
constexpr double kLargest<Float16> = 65504.0;

template <typename T>
struct Quantize {
  using Acc = typename Accumulator<T>::type;
  using E = Plain<Acc>;
  using Vec = typename E::Vec;
  static constexpr int kLanes = E::kLanes;
  static constexpr int64_t kBlocks = 64;  // of a task
  static constexpr Acc kReach = Acc(kLargest<BFloat16>);
  static constexpr Acc kSmallest = Acc(7.52316384526264e-37);  // 2^-120: 127 / half stays finite

  static void quantize(const Host& host, const QuantizeArgs& args) {
    over_blocks(host, args.count, [&](int64_t first, int64_t n) {
      const T* x = static_cast<const T*>(args.x) + first;
      BFloat16* range = static_cast<BFloat16*>(args.ranges) + 2 * (first / kQuantizeBlock);
      alignas(64) Acc v[kQuantizeBlock];
      if (n == kQuantizeBlock) {
        for (int j = 0; j < kQuantizeBlock; ++j) v[j] = widen(x[j]);
      } else {
        // the last element again and again, which moves neither end
        for (int j = 0; j < kQuantizeBlock; ++j) v[j] = widen(x[min_of(int64_t(j), n - 1)]);
      }
      alignas(64) int8_t codes[kQuantizeBlock];
      encode(v, range, codes);
      memcpy(args.codes + first, codes, size_t(n));
    });
  }

  static void dequantize(const Host& host, const DequantizeArgs& args) {
    over_blocks(host, args.count, [&](int64_t first, int64_t n) {
      const int8_t* codes = args.codes + first;
      const BFloat16* range =
          static_cast<const BFloat16*>(args.ranges) + 2 * (first / kQuantizeBlock);
      T* x = static_cast<T*>(args.x) + first;
      const Acc mid = widen(range[0]), step = Acc(widen(range[1])) / Acc(127);
      if (n == kQuantizeBlock)
        decode(codes, mid, step, x, kQuantizeBlock);
      else
        decode(codes, mid, step, x, n);
    });
  }

 private:
  template <class F>
  static void over_blocks(const Host& host, int64_t count, const F& body) {
    constexpr int64_t kElements = kBlocks * kQuantizeBlock;
    run(host, ceil_div(count, kElements), [&](Tasks& tasks) {
      for (int64_t task = tasks.next(); task >= 0; task = tasks.next()) {
        const int64_t last = min_of((task + 1) * kElements, count);
        for (int64_t i = task * kElements; i < last; i += kQuantizeBlock)
          body(i, min_of(int64_t(kQuantizeBlock), last - i));
      }
    });
  }

  static A3FTA_INLINE void encode(const Acc* v, BFloat16* range, int8_t* codes) {
    Vec low = E::load(v), high = low, spoiled = low * Acc(0);
    for (int i = kLanes; i < kQuantizeBlock; i += kLanes) {
      const Vec x = E::load(v + i);
      low = x < low ? x : low;
      high = x > high ? x : high;
      spoiled += x * Acc(0);  // NaN of NaN and infinity
    }
    Acc lo = low[0], hi = high[0], lost = spoiled[0];
    for (int j = 1; j < kLanes; ++j) {
      lo = low[j] < lo ? low[j] : lo;
      hi = high[j] > hi ? high[j] : hi;
      lost += spoiled[j];
    }
    // halves first: lo + hi may be more than Acc holds
    narrow(float(Acc(0.5) * lo + Acc(0.5) * hi), range[0]);
    // bf16's rounding carries the largest numbers to infinity: its largest number instead
    if ((range[0].bits & 0x7fffu) == 0x7f80u) range[0].bits -= 1;
    const Acc mid = widen(range[0]);
    const Acc above = hi - mid, below = mid - lo;
    range[1] = rounded_up(above > below ? above : below);
    const Acc half = widen(range[1]);
    if (!(lost == 0 && half <= kReach)) {
      range[0].bits = range[1].bits = 0x7fc0u;
      memset(codes, 0, kQuantizeBlock);
      return;
    }
    const Acc scale = half > 0 ? Acc(127) / half : Acc(0);
    for (int j = 0; j < kQuantizeBlock; ++j) codes[j] = rounded((v[j] - mid) * scale);
  }

  static A3FTA_INLINE void decode(const int8_t* codes, Acc mid, Acc step, T* x, int64_t n) {
    constexpr Acc largest = Acc(kLargest<T>);
    for (int64_t j = 0; j < n; ++j) {
      // rounding may not make infinity of a finite block; NaN passes the comparisons
      Acc value = mid + step * Acc(codes[j]);
      value = value > largest ? largest : value;
      value = value < -largest ? -largest : value;
      narrow(value, x[j]);
    }
  }

  // the least bf16 number not below x >= 0, at least kSmallest unless x is 0; infinity past fp32
  static A3FTA_INLINE BFloat16 rounded_up(Acc x) {
    const float narrowed = float(x);
    BFloat16 up{uint16_t(to_bits(narrowed) >> 16)};
    if (Acc(widen(up)) < x) up.bits += 1;
    if (narrowed <= float(kLargest<float>) && up.bits == 0x7f80u) up.bits -= 1;
    if (x > 0 && Acc(widen(up)) < kSmallest) up.bits = 0x0380u;
    return up;
  }

  // 1.5 * 2^23 or 2^52 more leaves the nearest integer in the lowest bits
  static A3FTA_INLINE int8_t rounded(float x) { return int8_t(to_bits(x + 12582912.0f)); }
  static A3FTA_INLINE int8_t rounded(double x) {
    const double shifted = x + 6755399441055744.0;
    int64_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    return int8_t(bits);
  }
};

}  // namespace
