// adapter_bank_forward: each sample's rows with the weights of its own adapter. Included by
// kernels.cpp alone.
#pragma once

#include "forward.h"

namespace {

template <typename T>
struct Bank : Block<T> {
  using B = Block<T>;
  using typename B::Acc;
  using typename B::G;
  using typename B::Left;
  using typename B::Operand;
  using typename B::Unit;

  // a holds h @ w_down.T on entry; z = scale * act(a + bias)
  template <int kAct>
  static void activate_rows(const Acc* bias, Acc scale, int64_t rows, const Acc* a,
                            const Operand& operand) {
    const int64_t width = operand.width;
    for (int64_t i = 0; i < rows; ++i, a += width) {
      Acc* z = operand.row(i);
#pragma GCC ivdep
      for (int64_t j = 0; j < width; ++j)
        z[j] = scale * a3fta::scalar::activate(a[j] + bias[j], kAct);
    }
  }
  using ActivateRows = void (*)(const Acc*, Acc, int64_t, const Acc*, const Operand&);

  // the adapters that some sample has, packed side by side; biases padded, b_up with the scale
  struct Packed {
    Packed(const Host& host, const a3fta::cpu::BankArgs& x)
        : down_size(B::packed_size(x.rank, x.channels)),
          up_size(B::packed_size(x.channels, x.rank)),
          rank(G::padded(x.rank)),
          channels(G::padded(x.channels)),
          slots(host, x.adapters),
          down(host, x.adapters * down_size),
          up(host, x.adapters * up_size),
          b_down(host, x.adapters * rank),
          b_up(host, x.adapters * channels) {
      for (int64_t k = 0; k < x.adapters; ++k) slots[k] = 0;
      for (int64_t b = 0; b < x.samples; ++b)
        if (x.index[b] >= 0) slots[x.index[b]] = 1;
      run(host, x.adapters, [&](Tasks& tasks) {
        for (int64_t k; (k = tasks.next()) >= 0;)
          if (slots[k]) pack(x, k);
      });
    }

    void pack(const a3fta::cpu::BankArgs& x, int64_t k) const {
      const int64_t size = x.rank * x.channels;
      const Acc scale = static_cast<const Acc*>(x.scale)[k];
      B::pack_rows(part(x.w_down, k * size, x.channels), x.rank, x.channels, down + k * down_size);
      B::pack_rows(part(x.w_up, k * size, x.rank), x.channels, x.rank, up + k * up_size);
      B::widen_row(part(x.b_down, k * x.rank, 0).data, x.b_down != nullptr ? x.rank : 0, rank,
                   b_down + k * rank);
      Acc* bias = b_up + k * channels;
      B::widen_row(part(x.b_up, k * x.channels, 0).data, x.b_up != nullptr ? x.channels : 0,
                   channels, bias);
      for (int64_t j = 0; j < x.channels; ++j) bias[j] *= scale;
    }

    static Matrix part(const void* data, int64_t offset, int64_t stride) {
      return {const_cast<T*>(static_cast<const T*>(data)) + (data != nullptr ? offset : 0), stride};
    }

    const int64_t down_size, up_size, rank, channels;
    const Buffer<int8_t> slots;
    const Buffer<Unit> down, up;
    const Buffer<Acc> b_down, b_up;
  };

  static void forward(const Host& host, const a3fta::cpu::BankArgs& x) {
    static const ActivateRows table[a3fta::kActivations] = {
        activate_rows<0>, activate_rows<1>, activate_rows<2>, activate_rows<3>, activate_rows<4>};
    if (x.rows == 0) return;
    const ActivateRows activate = table[x.activation];
    const Packed packed(host, x);
    const int64_t length = x.rows / x.samples;
    const int64_t step = min_of(Forward<T>::block_rows(host, x.rows, x.channels), length);
    const int64_t blocks = ceil_div(length, step);
    run(host, x.samples * blocks, [&](Tasks& tasks) {
      Buffer<Unit> scratch(host, B::left_size(x.h.stride, step, x.channels));
      Buffer<Acc> a(host, step * packed.rank);
      const Operand z(host, step, x.rank);
      for (int64_t task; (task = tasks.next()) >= 0;) {
        const int64_t b = task / blocks, first = task % blocks * step;
        const int64_t m = b * length + first, rows = min_of(step, length - first);
        const int64_t k = x.index[b];
        if (k < 0) {
          for (int64_t i = 0; i < rows; ++i)
            memcpy(B::at(x.y, m + i), B::at(x.residual, m + i), size_t(x.channels) * sizeof(T));
          continue;
        }
        const Left h = B::left(B::at(x.h, m), x.h.stride, rows, x.channels, scratch);
        B::down(rows, x.channels, x.rank, h, packed.down + k * packed.down_size, a);
        activate(packed.b_down + k * packed.rank, static_cast<const Acc*>(x.scale)[k], rows, a, z);
        z.seal(rows, x.rank);
        const Unit* up = packed.up + k * packed.up_size;
        const Acc* bias = packed.b_up + k * packed.channels;
        for (int64_t p = 0; p < G::panels(x.channels); ++p) {
          const int64_t c = p * G::kWidth;
          B::up_panel(
              rows, x.rank, z.over_rank(), up + c * G::units(x.rank), G::vectors(x.channels, p),
              min_of(G::kWidth, x.channels - c), bias + c, B::at(x.residual, m, c),
              x.residual.stride, B::at(x.y, m, c), x.y.stride);
        }
      }
    });
  }
};

}  // namespace
