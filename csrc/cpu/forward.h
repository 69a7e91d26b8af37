// adapter_forward, adapter_down, adapter_up and adapter_dh_. Included by kernels.cpp alone.
#pragma once

#include "blocks.h"

namespace {

template <typename T>
struct Forward : Block<T> {
  using B = Block<T>;
  using typename B::Acc;
  using typename B::G;
  using typename B::Left;
  using typename B::Modulated;
  using typename B::Operand;
  using typename B::Unit;

  // blocks small enough to give every thread some
  static int64_t block_rows(const Host& host, int64_t rows, int64_t columns) {
    const int64_t share = ceil_div(ceil_div(rows, 2 * host.threads()), 12) * 12;
    return max_of(min_of(B::rows_per_block(columns), share), 12);
  }

  // a holds h @ w_down.T on entry, a on return; the rows begin with row m of the tensors
  template <int kAct>
  static void activate_rows(const Acc* bias, const Modulated& modulated, int64_t m, int64_t rows,
                            Acc* a, const Operand& operand) {
    const int64_t width = operand.width;
    for (int64_t i = 0; i < rows; ++i, a += width) {
      const Acc *factor = modulated.factor(m + i), *shift = modulated.shift(m + i);
      Acc* z = operand.row(i);
#pragma GCC ivdep
      for (int64_t j = 0; j < width; ++j) {
        a[j] += bias[j];
        z[j] = a3fta::scalar::activate(a[j], kAct) * factor[j] + shift[j];
      }
    }
  }
  using ActivateRows = void (*)(const Acc*, const Modulated&, int64_t, int64_t, Acc*,
                                const Operand&);

  static void forward(const Host& host, const a3fta::cpu::ForwardArgs& x) {
    static const ActivateRows table[a3fta::kActivations] = {
        activate_rows<0>, activate_rows<1>, activate_rows<2>, activate_rows<3>, activate_rows<4>};
    const ActivateRows activate = table[x.activation];
    const int64_t width = G::padded(x.rank);
    const bool up = x.y.data != nullptr;
    Buffer<Unit> down_packed(host, B::packed_size(x.rank, x.channels));
    Buffer<Unit> up_packed(host, up ? B::packed_size(x.channels, x.rank) : 0);
    Buffer<Acc> b_down(host, width), b_up(host, up ? G::padded(x.channels) : 0);
    B::pack_rows(x.w_down, x.rank, x.channels, down_packed);
    B::widen_row(x.b_down, x.b_down != nullptr ? x.rank : 0, width, b_down);
    if (up) {
      B::pack_rows(x.w_up, x.channels, x.rank, up_packed);
      B::widen_row(x.b_up, x.b_up != nullptr ? x.channels : 0, G::padded(x.channels), b_up);
    }
    const Modulated modulated(host, x.modulation, x.rank, x.rows);

    const int64_t step = block_rows(host, x.rows, x.channels);
    run(host, ceil_div(x.rows, step), [&](Tasks& tasks) {
      Buffer<Unit> scratch(host, B::left_size(x.h.stride, step, x.channels));
      Buffer<Acc> a(host, step * width);
      const Operand z(host, step, x.rank);
      for (int64_t task; (task = tasks.next()) >= 0;) {
        const int64_t m = task * step, rows = min_of(step, x.rows - m);
        const Left h = B::left(B::at(x.h, m), x.h.stride, rows, x.channels, scratch);
        B::down(rows, x.channels, x.rank, h, down_packed, a);
        activate(b_down, modulated, m, rows, a, z);
        for (int64_t i = 0; i < rows; ++i) {
          if (m + step + i < x.rows) B::fetch(x.h, m + step + i, x.channels);
          store(a + i * width, x.rank, B::at(x.a, m + i));
          if (x.z.data != nullptr) store(z.row(i), x.rank, B::at(x.z, m + i));
        }
        if (!up) continue;
        z.seal(rows, x.rank);
        for (int64_t p = 0; p < G::panels(x.channels); ++p) {
          const int64_t c = p * G::kWidth;
          B::up_panel(
              rows, x.rank, z.over_rank(), up_packed + c * G::units(x.rank),
              G::vectors(x.channels, p), min_of(G::kWidth, x.channels - c), b_up + c,
              B::at(x.h, m, c), x.h.stride, B::at(x.y, m, c), x.y.stride);
        }
      }
    });
  }

  static void store(const Acc* from, int64_t n, T* to) {
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) narrow(from[j], to[j]);
  }

  static void up(const Host& host, const a3fta::cpu::UpArgs& x) {
    Buffer<Unit> packed(host, B::packed_size(x.columns, x.rank));
    if (x.transposed)
      B::pack_rows(x.w, x.columns, x.rank, packed);
    else
      B::pack_columns(x.w, x.columns, x.rank, packed);
    const int64_t width = G::padded(x.columns);
    Buffer<Acc> bias(host, x.bias != nullptr ? width : 0);
    if (x.bias != nullptr && x.bias_wide)
      memcpy(bias, x.bias, size_t(x.columns) * sizeof(Acc));
    else if (x.bias != nullptr)
      B::widen_row(x.bias, x.columns, width, bias);

    const int64_t step = block_rows(host, x.rows, x.columns);
    run(host, ceil_div(x.rows, step), [&](Tasks& tasks) {
      Buffer<Unit> scratch(host, B::left_size(x.x.stride, step, x.rank));
      for (int64_t task; (task = tasks.next()) >= 0;) {
        const int64_t m = task * step, rows = min_of(step, x.rows - m);
        const Left left = B::left(B::at(x.x, m), x.x.stride, rows, x.rank, scratch);
        for (int64_t p = 0; p < G::panels(x.columns); ++p) {
          const int64_t c = p * G::kWidth;
          B::up_panel(
              rows, x.rank, left, packed + c * G::units(x.rank), G::vectors(x.columns, p),
              min_of(G::kWidth, x.columns - c), x.bias != nullptr ? bias + c : nullptr,
              x.residual.data != nullptr ? B::at(x.residual, m, c) : nullptr, x.residual.stride,
              B::at(x.out, m, c), x.out.stride);
        }
      }
    });
  }
};

}  // namespace
