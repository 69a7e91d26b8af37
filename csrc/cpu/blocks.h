// What the ops share: scratch memory, tasks, and the steps on one block of rows. Included by
// kernels.cpp alone.
#pragma once

#include "../math.h"
#include "gemm.h"
#include "kernels.h"

namespace {

using a3fta::cpu::Host;
using a3fta::cpu::Matrix;
using a3fta::cpu::Modulation;

template <typename T>
class Buffer {
 public:
  Buffer(const Host& host, int64_t count)
      : host_(host),
        data_(count > 0 ? static_cast<T*>(host.allocate(size_t(count) * sizeof(T))) : nullptr) {}
  ~Buffer() {
    if (data_ != nullptr) host_.release(data_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return data_; }

 private:
  const Host& host_;
  T* data_;
};

// tasks are handed out one by one; results never depend on who takes which
struct Tasks {
  int64_t count;
  int64_t cursor = 0;
  int64_t next() {
    const int64_t task = __atomic_fetch_add(&cursor, 1, __ATOMIC_RELAXED);
    return task < count ? task : -1;
  }
};

template <class F>
void run(const Host& host, int64_t count, const F& body) {
  struct Context {
    const F& body;
    Tasks tasks;
  } context{body, {count}};
  if (count == 0) return;
  host.parallel(
      min_of(host.threads(), count),
      [](void* p, int64_t) {
        Context& c = *static_cast<Context*>(p);
        c.body(c.tasks);
      },
      &context);
}

template <typename T>
struct PackOf {
  using type = Pack<T, typename Accumulator<T>::type>;
};
#if defined(__AVX512BF16__)
template <>
struct PackOf<BFloat16> {
  using type = Pack<BFloat16, Pairs>;
};
#endif

template <typename T>
struct Block {
  using E = typename EngineOf<T>::type;
  using P = typename PackOf<T>::type;
  using G = Gemm<E>;
  using Acc = typename E::Acc;
  using Unit = typename E::Unit;
  static constexpr bool kPaired = E::kPerUnit == 2;

  static T* at(const Matrix& m, int64_t row, int64_t column = 0) {
    return static_cast<T*>(m.data) + row * m.stride + column;
  }

  // rows of a block that keep a few operands of `columns` in the second cache; a multiple of 12
  static int64_t rows_per_block(int64_t columns) {
    const int64_t fit = 196608 / (max_of(columns, 1) * int64_t(sizeof(T)));
    return min_of(max_of(fit / 12 * 12, 24), 132);
  }

  static int64_t packed_size(int64_t columns, int64_t depth) {
    return G::padded(columns) * G::units(depth);
  }

  // (columns, depth) or, by columns, (depth, columns)
  static void pack_rows(const Matrix& w, int64_t columns, int64_t depth, Unit* out) {
    P::by_rows(at(w, 0), w.stride, columns, depth, out);
  }
  static void pack_columns(const Matrix& w, int64_t columns, int64_t depth, Unit* out) {
    for (int64_t p = 0; p < G::panels(columns); ++p)
      P::by_columns(
          at(w, 0, p * G::kWidth), w.stride, min_of(G::kWidth, columns - p * G::kWidth), depth,
          out + p * G::kWidth * G::units(depth));
  }

  static void widen_row(const void* source, int64_t n, int64_t size, Acc* out) {
    const T* from = static_cast<const T*>(source);
    for (int64_t j = 0; j < n; ++j) out[j] = widen(from[j]);
    for (int64_t j = n; j < size; ++j) out[j] = 0;
  }

  // 1 + gamma and beta, padded rows, one per sample
  struct Modulated {
    Modulated(const Host& host, const Modulation& m, int64_t rank, int64_t rows)
        : width(G::padded(rank)),
          on(m.gamma != nullptr || m.beta != nullptr),
          per_sample(on ? max_of(rows / max_of(m.samples, 1), 1) : max_of(rows, 1)),
          factor_(host, (on ? m.samples : 1) * width),
          shift_(host, (on ? m.samples : 1) * width) {
      for (int64_t s = 0; s < (on ? m.samples : 1); ++s) {
        Acc* factor = factor_ + s * width;
        Acc* shift = shift_ + s * width;
        const int64_t gammas = m.gamma != nullptr ? rank : 0;
        const int64_t betas = m.beta != nullptr ? rank : 0;
        widen_row(static_cast<const T*>(m.gamma) + s * gammas, gammas, width, factor);
        widen_row(static_cast<const T*>(m.beta) + s * betas, betas, width, shift);
        for (int64_t j = 0; j < width; ++j) factor[j] += 1;
      }
    }
    int64_t sample(int64_t row) const { return row / per_sample; }
    const Acc* factor(int64_t row) const { return factor_ + sample(row) * width; }
    const Acc* shift(int64_t row) const { return shift_ + sample(row) * width; }

    const int64_t width;
    const bool on;
    const int64_t per_sample;

   private:
    Buffer<Acc> factor_, shift_;
  };

  // a left operand: in place where its layout allows, else copied to `scratch`
  struct Left {
    const Unit* data;
    int64_t stride;
  };
  static Left left(const T* source, int64_t stride, int64_t rows, int64_t depth, Unit* scratch) {
    if (P::in_place(stride, depth))
      return {reinterpret_cast<const Unit*>(source), stride / E::kPerUnit};
    P::left(source, stride, rows, depth, scratch);
    return {scratch, G::units(depth)};
  }
  static int64_t left_size(int64_t stride, int64_t rows, int64_t depth) {
    return P::in_place(stride, depth) ? 0 : rows * G::units(depth);
  }

  // a row that a later step reads, asked for while this one computes
  static A3FTA_INLINE void fetch(const Matrix& m, int64_t row, int64_t columns) {
    const char* p = reinterpret_cast<const char*>(at(m, row));
    for (int64_t k = 0; k < columns * int64_t(sizeof(T)); k += 64) __builtin_prefetch(p + k, 0, 2);
  }

  // out (rows, padded rank) = x @ packed
  static void down(
      int64_t rows, int64_t depth, int64_t rank, const Left& x, const Unit* packed, Acc* out) {
    const int64_t width = G::padded(rank), units = G::units(depth);
    for (int64_t p = 0; p < G::panels(rank); ++p)
      G::panel(
          rows, units, x.data, x.stride, 1, packed + p * G::kWidth * units, G::vectors(rank, p),
          out + p * G::kWidth, width, false);
  }

  using Finished = void (*)(
      int64_t, const Unit*, int64_t, const Unit*, const Acc*, const T*, int64_t, T*, int64_t);

  // one panel of out = residual + bias + x @ packed
  static void up_panel(
      int64_t rows, int64_t rank, const Left& x, const Unit* packed, int vectors, int64_t n,
      const Acc* bias, const T* residual, int64_t residual_stride, T* out, int64_t out_stride) {
    if constexpr (Converts<T, typename E::Vec>::kWhole) {
      if (n == G::kWidth) {
        static const Finished tiles[kMaxRows] = {
            finished_tile<E, T, 1>, finished_tile<E, T, 2>, finished_tile<E, T, 3>,
            finished_tile<E, T, 4>, finished_tile<E, T, 5>, finished_tile<E, T, 6>};
        for (int64_t i = 0; i < rows; i += kMaxRows)
          tiles[min_of(kMaxRows, rows - i) - 1](
              G::units(rank), x.data + i * x.stride, x.stride, packed, bias,
              residual == nullptr ? nullptr : residual + i * residual_stride, residual_stride,
              out + i * out_stride, out_stride);
        return;
      }
    }
    alignas(64) Acc t[kMaxRows * G::kWidth];
    for (int64_t i = 0; i < rows; i += kMaxRows) {
      const int64_t r = min_of(kMaxRows, rows - i);
      G::panel(
          r, G::units(rank), x.data + i * x.stride, x.stride, 1, packed, vectors, t, G::kWidth,
          false);
      for (int64_t k = 0; k < r; ++k) {
        const T* add = residual == nullptr ? nullptr : residual + (i + k) * residual_stride;
        T* to = out + (i + k) * out_stride;
        finish_row(t + k * G::kWidth, bias, add, to, n);
      }
    }
  }

  static A3FTA_INLINE void finish_row(
      Acc* t, const Acc* bias, const T* add, T* out, int64_t n) {
    if (bias != nullptr)
      for (int64_t j = 0; j < n; ++j) t[j] += bias[j];
    if (add != nullptr)
#pragma GCC ivdep
      for (int64_t j = 0; j < n; ++j) narrow(t[j] + widen(add[j]), out[j]);
    else
#pragma GCC ivdep
      for (int64_t j = 0; j < n; ++j) narrow(t[j], out[j]);
  }

  // A (rows, rank) block that was computed here, as a left operand of both kinds of product: over
  // its columns (rank) and over its rows. Plain numbers serve both; pairs need a copy of each.
  struct Operand {
    Operand(const Host& host, int64_t rows, int64_t rank)
        : width(G::padded(rank)),
          values_(host, rows * width),
          rows_(host, kPaired ? rows * width : 0),
          pairs_(host, kPaired ? ceil_div(rows, 2) * width : 0) {}

    Acc* row(int64_t i) const { return values_ + i * width; }
    const Acc* values() const { return values_; }

    // call once the rows hold their values
    void seal(int64_t rows, int64_t rank) const {
      if constexpr (kPaired) {
        for (int64_t i = 0; i < rows; ++i) {
          BFloat16* to = rows_ + i * width;
          const Acc* from = row(i);
          for (int64_t j = 0; j < width; ++j) narrow(from[j], to[j]);
          for (int64_t j = rank; j < width; ++j) to[j].bits = 0;
        }
      }
    }
    void seal_over_rows(int64_t rows) const {
      if constexpr (kPaired) {
        for (int64_t i = 0; i < rows; i += 2) {
          Unit* to = pairs_ + i / 2 * width;
          const BFloat16* low = rows_ + i * width;
          if (i + 1 < rows)
            P::interleave(low, low + width, width, to);
          else
            for (int64_t j = 0; j < width; ++j) to[j] = P::half_pair(low[j]);
        }
      }
    }

    Left over_rank() const {
      if constexpr (kPaired)
        return {reinterpret_cast<const Unit*>(static_cast<BFloat16*>(rows_)), width / 2};
      else
        return {values_, width};
    }
    const Unit* over_rows() const {
      if constexpr (kPaired)
        return pairs_;
      else
        return values_;
    }

    const int64_t width;

   private:
    Buffer<Acc> values_;
    Buffer<BFloat16> rows_;
    Buffer<Unit> pairs_;
  };

  // one panel of out (rank, n) += x.T @ y, with y (rows, n) packed into `scratch`, and, where
  // `sum` is given, sum += the rows of y
  static void outer_panel(
      int64_t rows, int64_t rank, const Operand& x, const T* y, int64_t stride, int64_t n,
      Unit* scratch, Acc* out, bool add, double* sum) {
    P::by_columns(y, stride, n, rows, scratch);
    const int64_t width = G::padded(n);
    const int vectors = int(width / G::kLanes);
    G::panel(
        rank, G::units(rows), x.over_rows(), 1, x.width, scratch, vectors, out, width, add);
    if (sum == nullptr) return;
    if constexpr (kPaired) {
      static const Unit ones{0x3f803f80u};
      alignas(64) Acc part[G::kWidth];
      G::panel(1, G::units(rows), &ones, 0, 0, scratch, vectors, part, width, false);
      for (int64_t j = 0; j < n; ++j) sum[j] += part[j];
    } else {
      add_columns(y, stride, rows, n, sum);
    }
  }

  // sum += the rows of x (rows, n); few of them at a time in the working precision
  template <typename X>
  static void add_columns(const X* x, int64_t stride, int64_t rows, int64_t n, double* sum) {
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4, x += 4 * stride)
      for (int64_t j = 0; j < n; ++j)
        sum[j] += (widen(x[j]) + widen(x[j + stride])) +
                  (widen(x[j + 2 * stride]) + widen(x[j + 3 * stride]));
    for (; i < rows; ++i, x += stride)
      for (int64_t j = 0; j < n; ++j) sum[j] += widen(x[j]);
  }
};

}  // namespace
