// geglu on one instruction set: blocks of rows and columns that one task reads and writes once.
// Included by kernels.cpp alone.
//
//     forward    y  = hidden * act(gate)                               p = [hidden | gate]
//     backward   dp = [dy * act(gate) | dy * hidden * act'(gate)]
#pragma once

#include "blocks.h"

namespace {

using a3fta::cpu::GegluArgs;

template <typename T>
struct Geglu {
  using Acc = typename Accumulator<T>::type;
  static constexpr int64_t kColumns = 4096, kElements = 16384;  // of a task

  static void forward(const Host& host, const GegluArgs& args) { by_activation<false>(host, args); }
  static void backward(const Host& host, const GegluArgs& args) { by_activation<true>(host, args); }

 private:
  template <bool BACKWARD>
  static void by_activation(const Host& host, const GegluArgs& args) {
    switch (args.activation) {
      case a3fta::kRelu:
        return over_tasks<BACKWARD, a3fta::kRelu>(host, args);
      case a3fta::kGelu:
        return over_tasks<BACKWARD, a3fta::kGelu>(host, args);
      case a3fta::kGeluTanh:
        return over_tasks<BACKWARD, a3fta::kGeluTanh>(host, args);
      case a3fta::kSilu:
        return over_tasks<BACKWARD, a3fta::kSilu>(host, args);
      default:
        return over_tasks<BACKWARD, a3fta::kIdentity>(host, args);
    }
  }

  template <bool BACKWARD, int ACT>
  static void over_tasks(const Host& host, const GegluArgs& args) {
    const int64_t columns = min_of(args.width, kColumns);
    const int64_t rows = max_of(kElements / max_of(columns, 1), 1);
    const int64_t across = ceil_div(args.width, kColumns);
    run(host, ceil_div(args.rows, rows) * across, [&](Tasks& tasks) {
      for (int64_t task = tasks.next(); task >= 0; task = tasks.next()) {
        const int64_t first = task / across * rows, column = task % across * kColumns;
        const int64_t last = min_of(first + rows, args.rows);
        const int64_t n = min_of(kColumns, args.width - column);
        for (int64_t i = first; i < last; ++i) {
          const T* hidden = at(args.p, i, column);
          const T* gate = hidden + args.width;
          T* out = at(args.out, i, column);
          if constexpr (BACKWARD)
            backward_row<ACT>(at(args.dy, i, column), hidden, gate, out, out + args.width, n);
          else
            forward_row<ACT>(hidden, gate, out, n);
        }
      }
    });
  }

  static T* at(const Matrix& m, int64_t row, int64_t column) {
    return static_cast<T*>(m.data) + row * m.stride + column;
  }

  template <int ACT>
  static A3FTA_INLINE void forward_row(const T* hidden, const T* gate, T* y, int64_t n) {
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j)
      narrow(widen(hidden[j]) * a3fta::scalar::activate<Acc>(widen(gate[j]), ACT), y[j]);
  }

  template <int ACT>
  static A3FTA_INLINE void backward_row(
      const T* dy, const T* hidden, const T* gate, T* dhidden, T* dgate, int64_t n) {
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) {
      const Acc d = widen(dy[j]), g = widen(gate[j]);
      narrow(d * a3fta::scalar::activate<Acc>(g, ACT), dhidden[j]);
      narrow(
          a3fta::scalar::activate_backward<Acc>(d * widen(hidden[j]), g, ACT), dgate[j]);
    }
  }
};

}  // namespace
