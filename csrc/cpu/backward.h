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

  // a holds a on entry, dz * act(a) on return; the rows begin with row m of the tensors
  template <int kAct>
  static void activate_rows(const Modulated& modulated, int64_t m, int64_t rows, const Acc* dz,
                            Acc* a, const Operand& da_rows, const Operand& z_rows) {
    const int64_t width = da_rows.width;
    for (int64_t i = 0; i < rows; ++i, a += width, dz += width) {
      const Acc *factor = modulated.factor(m + i), *shift = modulated.shift(m + i);
      Acc *da = da_rows.row(i), *z = z_rows.row(i);
#pragma GCC ivdep
      for (int64_t j = 0; j < width; ++j) {
        const Acc act = a3fta::scalar::activate(a[j], kAct);
        da[j] = a3fta::scalar::activate_backward(dz[j] * factor[j], a[j], kAct);
        z[j] = act * factor[j] + shift[j];
        a[j] = dz[j] * act;
      }
    }
  }
  using ActivateRows = void (*)(const Modulated&, int64_t, int64_t, const Acc*, Acc*,
                                const Operand&, const Operand&);

  // dgamma and dbeta: sums over the rows of a sample. A slab has a slot for the sample that it
  // begins with and one for the sample that it ends with; the samples between are its own.
  class SampleSums {
   public:
    SampleSums(const Host& host, const Slabs& slabs, const Modulated& modulated, int64_t rank,
               Acc* dgamma, Acc* dbeta)
        : slabs_(slabs), modulated_(modulated), rank_(rank), width_(modulated.width),
          dgamma_(dgamma), dbeta_(dbeta), slots_(host, on() ? slabs.count * 4 * width_ : 0) {}

    bool on() const { return dgamma_ != nullptr; }

    void open(int64_t slab) const {
      if (on()) memset(slots_ + slab * 4 * width_, 0, size_t(4 * width_) * sizeof(double));
    }

    // rows m to m + rows of the slab: dz, and dz * act(a)
    void add(int64_t slab, int64_t m, int64_t rows, const Acc* dz, const Acc* product) const {
      for (int64_t i = 0; on() && i < rows;) {
        const int64_t sample = modulated_.sample(m + i);
        const int64_t end = (sample + 1) * modulated_.per_sample;
        const int64_t n = min_of(rows - i, end - (m + i));
        const bool opens = (m + i) == sample * modulated_.per_sample;
        double* sums = slot(slab, sample);
        if (opens) memset(sums, 0, size_t(2 * width_) * sizeof(double));
        B::add_columns(product + i * width_, width_, n, rank_, sums);
        B::add_columns(dz + i * width_, width_, n, rank_, sums + width_);
        i += n;
        if (m + i == end && !crosses(slab, sample)) add_to_sample(sample, sums);
      }
    }

    void merge() const {
      for (int64_t slab = 0; on() && slab < slabs_.count; ++slab) {
        const int64_t first = modulated_.sample(slabs_.begin(slab));
        const int64_t last = modulated_.sample(slabs_.end(slab) - 1);
        if (crosses(slab, first)) add_to_sample(first, slot(slab, first));
        if (last != first && crosses(slab, last)) add_to_sample(last, slot(slab, last));
      }
    }

   private:
    double* slot(int64_t slab, int64_t sample) const {
      const bool first = sample == modulated_.sample(slabs_.begin(slab));
      return slots_ + (slab * 2 + (first ? 0 : 1)) * 2 * width_;
    }
    bool crosses(int64_t slab, int64_t sample) const {
      return sample * modulated_.per_sample < slabs_.begin(slab) ||
             (sample + 1) * modulated_.per_sample > slabs_.end(slab);
    }
    void add_to_sample(int64_t sample, const double* sums) const {
      for (int64_t j = 0; j < rank_; ++j) {
        dgamma_[sample * rank_ + j] += Acc(sums[j]);
        dbeta_[sample * rank_ + j] += Acc(sums[width_ + j]);
      }
    }

    const Slabs& slabs_;
    const Modulated& modulated_;
    const int64_t rank_, width_;
    Acc *dgamma_, *dbeta_;
    Buffer<double> slots_;
  };

  // what the slabs' panels add up to
  struct Reduction {
    const Acc* parts;
    bool transposed;  // out is (columns, rank), else (rank, columns)
    Acc* out;
  };

  static void add_slabs(const Host& host, const Reduction* reductions, int64_t n, int64_t slabs,
                        int64_t rank, int64_t columns) {
    const int64_t panels = G::panels(columns);
    run(host, n * panels, [&](Tasks& tasks) {
      Buffer<Acc> sums(host, rank * G::kWidth);
      for (int64_t task; (task = tasks.next()) >= 0;)
        add_panel(reductions[task / panels], slabs, rank, columns, task % panels * G::kWidth,
                  sums);
    });
  }

  static void add_panel(const Reduction& x, int64_t slabs, int64_t rank, int64_t columns,
                        int64_t c, Acc* sums) {
    const int64_t n = min_of(G::kWidth, columns - c), width = G::padded(n);
    memset(sums, 0, size_t(rank * width) * sizeof(Acc));
    for (int64_t s = 0; s < slabs; ++s)
      add_to(x.parts + s * rank * G::padded(columns) + c * rank, rank * width, sums);
    if (x.transposed) {
      for (int64_t j = 0; j < n; ++j)
        for (int64_t r = 0; r < rank; ++r) x.out[(c + j) * rank + r] = sums[r * width + j];
      return;
    }
    for (int64_t r = 0; r < rank; ++r)
      memcpy(x.out + r * columns + c, sums + r * width, size_t(n) * sizeof(Acc));
  }

  static void add_to(const Acc* x, int64_t n, Acc* sum) {
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) sum[j] += x[j];
  }

  static void add_rows(const double* parts, int64_t count, int64_t stride, int64_t n, Acc* out) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (int64_t s = 0; s < count; ++s) sum += parts[s * stride + j];
      out[j] = Acc(sum);
    }
  }

  static void backward(const Host& host, const a3fta::cpu::BackwardArgs& x) {
    static const ActivateRows table[a3fta::kActivations] = {
        activate_rows<0>, activate_rows<1>, activate_rows<2>, activate_rows<3>, activate_rows<4>};
    const ActivateRows activate = table[x.activation];
    const int64_t width = G::padded(x.rank), columns = G::padded(x.channels);
    const int64_t step = B::rows_per_block(x.channels);
    const Slabs slabs(x.rows, step);
    const bool weights = x.g_up != nullptr, down = x.dw_down != nullptr;
    Buffer<Unit> packed(host, B::packed_size(x.rank, x.channels));
    Buffer<Unit> down_packed(host, x.dh.data != nullptr ? B::packed_size(x.channels, x.rank) : 0);
    B::pack_columns(x.w_up, x.rank, x.channels, packed);
    if (x.dh.data != nullptr) B::pack_columns(x.w_down, x.channels, x.rank, down_packed);
    const Modulated modulated(host, x.modulation, x.rank, x.rows);
    const SampleSums samples(host, slabs, modulated, x.rank, static_cast<Acc*>(x.dgamma),
                             static_cast<Acc*>(x.dbeta));
    const int64_t size = x.rank * columns;
    Buffer<Acc> g_parts(host, weights ? slabs.count * size : 0);
    Buffer<Acc> dw_parts(host, down ? slabs.count * size : 0);
    Buffer<double> dy_sums(host, slabs.count * columns), da_sums(host, slabs.count * width);

    run(host, slabs.count, [&](Tasks& tasks) {
      Buffer<Unit> scratch(host, B::left_size(x.dy.stride, step, x.channels));
      Buffer<Unit> panel(host, G::kWidth * G::units(step));
      Buffer<Acc> dz(host, step * width), a(host, step * width);
      const Operand da(host, step, x.rank), z(host, step, x.rank);
      for (int64_t slab; (slab = tasks.next()) >= 0;) {
        double* da_sum = da_sums + slab * width;
        double* dy_sum = dy_sums + slab * columns;
        memset(da_sum, 0, size_t(width) * sizeof(double));
        memset(dy_sum, 0, size_t(columns) * sizeof(double));
        samples.open(slab);
        for (int64_t m = slabs.begin(slab); m < slabs.end(slab); m += step) {
          const int64_t rows = min_of(step, slabs.end(slab) - m);
          const bool more = m > slabs.begin(slab);
          const Left dy = B::left(B::at(x.dy, m), x.dy.stride, rows, x.channels, scratch);
          B::down(rows, x.channels, x.rank, dy, packed, dz);
          for (int64_t i = 0; i < rows; ++i) {
            B::widen_row(B::at(x.a, m + i), x.rank, width, a + i * width);
            if (down) B::fetch(x.h, m + i, x.channels);
            if (m + step + i < x.rows) B::fetch(x.dy, m + step + i, x.channels);
          }
          activate(modulated, m, rows, dz, a, da, z);
          for (int64_t i = 0; x.da.data != nullptr && i < rows; ++i) {
            T* out = B::at(x.da, m + i);
            for (int64_t j = 0; j < x.rank; ++j) narrow(da.row(i)[j], out[j]);
          }
          samples.add(slab, m, rows, dz, a);
          if (x.da_sum != nullptr)
            B::add_columns(da.values(), width, rows, x.rank, da_sum);
          if (x.dh.data != nullptr || down) da.seal(rows, x.rank);
          if (down) da.seal_over_rows(rows);
          if (weights) {
            z.seal(rows, x.rank);
            z.seal_over_rows(rows);
          }
          for (int64_t p = 0; p < G::panels(x.channels); ++p) {
            const int64_t c = p * G::kWidth, n = min_of(G::kWidth, x.channels - c);
            const T* dy_panel = B::at(x.dy, m, c);
            if (weights)
              B::outer_panel(rows, x.rank, z, dy_panel, x.dy.stride, n, panel,
                             g_parts + slab * size + c * x.rank, more, dy_sum + c);
            if (down)
              B::outer_panel(rows, x.rank, da, B::at(x.h, m, c), x.h.stride, n, panel,
                             dw_parts + slab * size + c * x.rank, more, nullptr);
            if (x.dh.data != nullptr)
              B::up_panel(rows, x.rank, da.over_rank(), down_packed + c * G::units(x.rank),
                          G::vectors(x.channels, p), n, nullptr, dy_panel, x.dy.stride,
                          B::at(x.dh, m, c), x.dh.stride);
          }
        }
      }
    });

    Reduction reductions[2];
    int64_t n = 0;
    if (weights) reductions[n++] = {g_parts, true, static_cast<Acc*>(x.g_up)};
    if (down) reductions[n++] = {dw_parts, false, static_cast<Acc*>(x.dw_down)};
    add_slabs(host, reductions, n, slabs.count, x.rank, x.channels);
    if (weights)
      add_rows(dy_sums, slabs.count, columns, x.channels, static_cast<Acc*>(x.dy_sum));
    if (x.da_sum != nullptr)
      add_rows(da_sums, slabs.count, width, x.rank, static_cast<Acc*>(x.da_sum));
    samples.merge();
  }

  static void outer(const Host& host, const a3fta::cpu::OuterArgs& x) {
    const int64_t width = G::padded(x.rank), columns = G::padded(x.channels);
    const int64_t step = B::rows_per_block(x.channels);
    const Slabs slabs(x.rows, step);
    const int64_t size = x.rank * columns;
    Buffer<Acc> dw_parts(host, slabs.count * size);
    Buffer<double> da_sums(host, slabs.count * width);
    run(host, slabs.count, [&](Tasks& tasks) {
      Buffer<Unit> panel(host, G::kWidth * G::units(step));
      const Operand da(host, step, x.rank);
      for (int64_t slab; (slab = tasks.next()) >= 0;) {
        double* da_sum = da_sums + slab * width;
        memset(da_sum, 0, size_t(width) * sizeof(double));
        for (int64_t m = slabs.begin(slab); m < slabs.end(slab); m += step) {
          const int64_t rows = min_of(step, slabs.end(slab) - m);
          for (int64_t i = 0; i < rows; ++i)
            B::widen_row(B::at(x.da, m + i), x.rank, width, da.row(i));
          B::add_columns(da.values(), width, rows, x.rank, da_sum);
          da.seal(rows, x.rank);
          da.seal_over_rows(rows);
          for (int64_t p = 0; p < G::panels(x.channels); ++p) {
            const int64_t c = p * G::kWidth;
            B::outer_panel(rows, x.rank, da, B::at(x.h, m, c), x.h.stride,
                           min_of(G::kWidth, x.channels - c), panel,
                           dw_parts + slab * size + c * x.rank, m > slabs.begin(slab), nullptr);
          }
        }
      }
    });
    const Reduction reduction{dw_parts, false, static_cast<Acc*>(x.dw_down)};
    add_slabs(host, &reduction, 1, slabs.count, x.rank, x.channels);
    add_rows(da_sums, slabs.count, width, x.rank, static_cast<Acc*>(x.da_sum));
  }
};

}  // namespace
