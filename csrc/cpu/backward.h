// adapter_backward, adapter_dz and adapter_dw_down. Included by kernels.cpp alone.
//
// Rows are cut into slabs, a number of them that depends on the shape alone. Each slab keeps its
// own sums, and the slabs are added in order: results do not depend on the number of threads.
#pragma once

#include "blocks.h"

namespace {

struct Slabs {
  Slabs(int64_t rows, int64_t block)
      : rows(rows),
        size(max_of(ceil_div(ceil_div(rows, rows < 16384 ? 16 : 32), 12) * 12, min_of(block, 48))),
        count(ceil_div(rows, size)) {}
  int64_t begin(int64_t slab) const { return slab * size; }
  int64_t end(int64_t slab) const { return min_of(rows, (slab + 1) * size); }
  const int64_t rows, size, count;
};

template <typename T>
struct Backward : Block<T> {
  using B = Block<T>;
  using typename B::Acc;
  using typename B::G;
  using typename B::Left;
  using typename B::Modulated;
  using typename B::Operand;
  using typename B::Unit;

  struct Row {
    const Acc *dz, *a, *factor, *shift;
    Acc *da, *z, *da_sum, *dgamma, *dbeta;
  };

  template <int kAct>
  static void activate_row(const Row& row, int64_t width) {
    const Acc *dz = row.dz, *a = row.a, *factor = row.factor, *shift = row.shift;
    Acc *da = row.da, *z = row.z, *da_sum = row.da_sum;
    Acc *dgamma = row.dgamma, *dbeta = row.dbeta;
#pragma GCC ivdep
    for (int64_t j = 0; j < width; ++j) {
      const Acc act = a3fta::scalar::activate(a[j], kAct);
      const Acc grad = a3fta::scalar::activate_backward(dz[j] * factor[j], a[j], kAct);
      z[j] = act * factor[j] + shift[j];
      dgamma[j] += dz[j] * act;
      dbeta[j] += dz[j];
      da_sum[j] += grad;
      da[j] = grad;
    }
  }
  using ActivateRow = void (*)(const Row&, int64_t);

  // Sums of one sample that lie in one slab: final where the sample ends inside it. A sample that
  // crosses a slab's end leaves a part in the slab's first or last slot, which `merge` adds.
  struct Parts {
    Parts(const Host& host, const Slabs& slabs, int64_t width, const Modulated& modulated)
        : slabs_(slabs), modulated_(modulated), width_(width),
          sums_(host, modulated.on ? slabs.count * 4 * width : 0) {
      if (modulated.on) memset(sums_, 0, size_t(slabs.count) * 4 * width * sizeof(Acc));
    }
    // where the sums of the row's sample go: dgamma, then dbeta
    Acc* slot(int64_t slab, int64_t row) const {
      const bool first = modulated_.sample(row) == modulated_.sample(slabs_.begin(slab));
      return sums_ + (slab * 2 + (first ? 0 : 1)) * 2 * width_;
    }
    bool crosses(int64_t slab, int64_t sample) const {
      return sample * modulated_.per_sample < slabs_.begin(slab) ||
             (sample + 1) * modulated_.per_sample > slabs_.end(slab);
    }
    void merge(int64_t rank, Acc* dgamma, Acc* dbeta) const {
      for (int64_t slab = 0; slab < slabs_.count; ++slab) {
        const int64_t first = modulated_.sample(slabs_.begin(slab));
        const int64_t last = modulated_.sample(slabs_.end(slab) - 1);
        for (int64_t sample = first; sample <= last; sample += max_of(last - first, 1)) {
          if (!crosses(slab, sample)) continue;
          const Acc* sum = slot(slab, max_of(slabs_.begin(slab), sample * modulated_.per_sample));
          for (int64_t j = 0; j < rank; ++j) {
            dgamma[sample * rank + j] += sum[j];
            dbeta[sample * rank + j] += sum[width_ + j];
          }
        }
      }
    }

   private:
    const Slabs& slabs_;
    const Modulated& modulated_;
    const int64_t width_;
    Buffer<Acc> sums_;
  };

  // out (rank, columns), or transposed, from the slabs' panels
  static void add_slabs(const Host& host, const Acc* parts, int64_t count, int64_t rank,
                        int64_t columns, bool transposed, Acc* out) {
    const int64_t size = rank * G::padded(columns);
    run(host, G::panels(columns), [&](Tasks& tasks) {
      Buffer<Acc> sum(host, G::kWidth);
      for (int64_t p; (p = tasks.next()) >= 0;) {
        const int64_t c = p * G::kWidth, n = min_of(G::kWidth, columns - c);
        const int64_t width = G::padded(n);
        for (int64_t r = 0; r < rank; ++r) {
          const Acc* from = parts + c * rank + r * width;
          for (int64_t j = 0; j < n; ++j) sum[j] = 0;
          for (int64_t s = 0; s < count; ++s)
            for (int64_t j = 0; j < n; ++j) sum[j] += from[s * size + j];
          if (transposed)
            for (int64_t j = 0; j < n; ++j) out[(c + j) * rank + r] = sum[j];
          else
            for (int64_t j = 0; j < n; ++j) out[r * columns + c + j] = sum[j];
        }
      }
    });
  }

  static void add_rows(const Acc* parts, int64_t count, int64_t stride, int64_t n, Acc* out) {
    for (int64_t j = 0; j < n; ++j) out[j] = 0;
    for (int64_t s = 0; s < count; ++s)
      for (int64_t j = 0; j < n; ++j) out[j] += parts[s * stride + j];
  }

  static void backward(const Host& host, const a3fta::cpu::BackwardArgs& x) {
    static const ActivateRow table[a3fta::kActivations] = {
        activate_row<0>, activate_row<1>, activate_row<2>, activate_row<3>, activate_row<4>};
    const ActivateRow activate = table[x.activation];
    const int64_t width = G::padded(x.rank), columns = G::padded(x.channels);
    const int64_t step = B::rows_per_block(x.channels);
    const Slabs slabs(x.rows, step);
    const bool weights = x.g_up != nullptr, down = x.dw_down != nullptr;
    Buffer<Unit> packed(host, B::packed_size(x.rank, x.channels));
    Buffer<Unit> down_packed(host, x.dh.data != nullptr ? B::packed_size(x.channels, x.rank) : 0);
    B::pack_columns(x.w_up, x.rank, x.channels, packed);
    if (x.dh.data != nullptr) B::pack_columns(x.w_down, x.channels, x.rank, down_packed);
    const Modulated modulated(host, x.modulation, x.rank, x.rows);
    const Parts parts(host, slabs, width, modulated);
    const int64_t size = x.rank * columns;
    Buffer<Acc> g_parts(host, weights ? slabs.count * size : 0);
    Buffer<Acc> dw_parts(host, down ? slabs.count * size : 0);
    Buffer<Acc> dy_sums(host, slabs.count * columns), da_sums(host, slabs.count * width);

    run(host, slabs.count, [&](Tasks& tasks) {
      Buffer<Unit> scratch(host, B::left_size(x.dy.stride, step, x.channels));
      Buffer<Unit> panel(host, G::kWidth * G::units(step));
      Buffer<Acc> dz(host, step * width), a(host, width), unused(host, 2 * width);
      const Operand da(host, step, x.rank), z(host, step, x.rank);
      for (int64_t slab; (slab = tasks.next()) >= 0;) {
        Acc* da_sum = da_sums + slab * width;
        Acc* dy_sum = dy_sums + slab * columns;
        memset(da_sum, 0, size_t(width) * sizeof(Acc));
        memset(dy_sum, 0, size_t(columns) * sizeof(Acc));
        for (int64_t m = slabs.begin(slab); m < slabs.end(slab); m += step) {
          const int64_t rows = min_of(step, slabs.end(slab) - m);
          const bool more = m > slabs.begin(slab);
          const Left dy = B::left(B::at(x.dy, m), x.dy.stride, rows, x.channels, scratch);
          B::down(rows, x.channels, x.rank, dy, packed, dz);
          for (int64_t i = 0; i < rows; ++i) {
            const int64_t sample = modulated.sample(m + i);
            Acc* sums = modulated.on ? parts.slot(slab, m + i) : unused;
            const bool whole = modulated.on && !parts.crosses(slab, sample);
            const bool opens = (m + i) % modulated.per_sample == 0;
            if (opens || !modulated.on) memset(sums, 0, size_t(2 * width) * sizeof(Acc));
            B::widen_row(B::at(x.a, m + i), x.rank, width, a);
            activate({dz + i * width, a, modulated.factor(m + i), modulated.shift(m + i),
                      da.row(i), z.row(i), da_sum, sums, sums + width},
                     width);
            if (whole && (m + i + 1) % modulated.per_sample == 0 && x.dgamma != nullptr) {
              memcpy(static_cast<Acc*>(x.dgamma) + sample * x.rank, sums,
                     size_t(x.rank) * sizeof(Acc));
              memcpy(static_cast<Acc*>(x.dbeta) + sample * x.rank, sums + width,
                     size_t(x.rank) * sizeof(Acc));
            }
            if (x.da.data != nullptr) {
              T* out = B::at(x.da, m + i);
              for (int64_t j = 0; j < x.rank; ++j) narrow(da.row(i)[j], out[j]);
            }
          }
          if (x.dh.data != nullptr || down) da.seal(rows, x.rank);
          if (down) da.seal_over_rows(rows);
          if (weights) {
            z.seal(rows, x.rank);
            z.seal_over_rows(rows);
          }
          for (int64_t p = 0; p < G::panels(x.channels); ++p) {
            const int64_t c = p * G::kWidth, n = min_of(G::kWidth, x.channels - c);
            const T* dy_panel = B::at(x.dy, m, c);
            if (weights) {
              B::outer_panel(rows, x.rank, z, dy_panel, x.dy.stride, n, panel,
                             g_parts + slab * size + c * x.rank, more);
              B::add_columns(dy_panel, x.dy.stride, rows, n, dy_sum + c);
            }
            if (down)
              B::outer_panel(rows, x.rank, da, B::at(x.h, m, c), x.h.stride, n, panel,
                             dw_parts + slab * size + c * x.rank, more);
            if (x.dh.data != nullptr)
              B::up_panel(rows, x.rank, da.over_rank(), down_packed + c * G::units(x.rank),
                          G::vectors(x.channels, p), n, nullptr, dy_panel, x.dy.stride,
                          B::at(x.dh, m, c), x.dh.stride);
          }
        }
      }
    });

    if (weights) {
      add_slabs(host, g_parts, slabs.count, x.rank, x.channels, true, static_cast<Acc*>(x.g_up));
      add_rows(dy_sums, slabs.count, columns, x.channels, static_cast<Acc*>(x.dy_sum));
    }
    if (down)
      add_slabs(host, dw_parts, slabs.count, x.rank, x.channels, false,
                static_cast<Acc*>(x.dw_down));
    if (x.da_sum != nullptr)
      add_rows(da_sums, slabs.count, width, x.rank, static_cast<Acc*>(x.da_sum));
    if (modulated.on && x.dgamma != nullptr)
      parts.merge(x.rank, static_cast<Acc*>(x.dgamma), static_cast<Acc*>(x.dbeta));
  }

  static void outer(const Host& host, const a3fta::cpu::OuterArgs& x) {
    const int64_t width = G::padded(x.rank), columns = G::padded(x.channels);
    const int64_t step = B::rows_per_block(x.channels);
    const Slabs slabs(x.rows, step);
    const int64_t size = x.rank * columns;
    Buffer<Acc> dw_parts(host, slabs.count * size), da_sums(host, slabs.count * width);
    run(host, slabs.count, [&](Tasks& tasks) {
      Buffer<Unit> panel(host, G::kWidth * G::units(step));
      const Operand da(host, step, x.rank);
      for (int64_t slab; (slab = tasks.next()) >= 0;) {
        Acc* da_sum = da_sums + slab * width;
        memset(da_sum, 0, size_t(width) * sizeof(Acc));
        for (int64_t m = slabs.begin(slab); m < slabs.end(slab); m += step) {
          const int64_t rows = min_of(step, slabs.end(slab) - m);
          for (int64_t i = 0; i < rows; ++i) {
            B::widen_row(B::at(x.da, m + i), x.rank, width, da.row(i));
            for (int64_t j = 0; j < width; ++j) da_sum[j] += da.row(i)[j];
          }
          da.seal(rows, x.rank);
          da.seal_over_rows(rows);
          for (int64_t p = 0; p < G::panels(x.channels); ++p) {
            const int64_t c = p * G::kWidth;
            B::outer_panel(rows, x.rank, da, B::at(x.h, m, c), x.h.stride,
                           min_of(G::kWidth, x.channels - c), panel,
                           dw_parts + slab * size + c * x.rank, m > slabs.begin(slab));
          }
        }
      }
    });
    add_slabs(host, dw_parts, slabs.count, x.rank, x.channels, false,
              static_cast<Acc*>(x.dw_down));
    add_rows(da_sums, slabs.count, width, x.rank, static_cast<Acc*>(x.da_sum));
  }
};

}  // namespace
