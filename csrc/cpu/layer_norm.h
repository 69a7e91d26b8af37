// layer_norm on one instruction set: a row is read once, and once more out of the first cache.
// Included by kernels.cpp alone.
#pragma once

#include "norm.h"

namespace {

template <typename T>
struct LayerNorm : Norm<T> {
  using N = Norm<T>;
  using typename N::Acc;
  static constexpr int64_t kElements = 16384;  // of a task

  static int64_t rows_of_task(int64_t channels) { return max_of(kElements / channels, 1); }
  static const T* row(const Matrix& m, int64_t i) {
    return static_cast<const T*>(m.data) + i * m.stride;
  }

  static void forward(const Host& host, const LayerNormArgs& x) {
    const typename N::Parameters p(host, x.affine, x.channels);
    const int64_t step = rows_of_task(x.channels);
    run(host, ceil_div(x.rows, step), [&](Tasks& tasks) {
      for (int64_t task; (task = tasks.next()) >= 0;) {
        for (int64_t i = task * step; i < min_of(task * step + step, x.rows); ++i) {
          const Moments m = N::moments(row(x.x, i), x.channels);
          const Acc mean = Acc(m.mean), rstd = Acc(rstd_of(m, x.eps));
          static_cast<Acc*>(x.mean)[i] = mean;
          static_cast<Acc*>(x.rstd)[i] = rstd;
          N::template apply<a3fta::kIdentity>(
              row(x.x, i), x.channels, Same<Acc>{mean}, Scaled<Acc>{p.weight, rstd},
              Each<Acc>{p.bias}, static_cast<T*>(x.out) + i * x.channels);
        }
      }
    });
  }

  static void backward(const Host& host, const LayerNormArgs& x) {
    const typename N::Parameters p(host, x.affine, x.channels);
    const int64_t step = rows_of_task(x.channels);
    run(host, ceil_div(x.rows, step), [&](Tasks& tasks) {
      Buffer<Acc> xhat(host, x.channels), g(host, x.channels);
      for (int64_t task; (task = tasks.next()) >= 0;) {
        for (int64_t i = task * step; i < min_of(task * step + step, x.rows); ++i) {
          const Same<Acc> mean{static_cast<const Acc*>(x.mean)[i]};
          const Same<Acc> rstd{static_cast<const Acc*>(x.rstd)[i]};
          N::template slopes<a3fta::kIdentity>(
              row(x.dy, i), row(x.x, i), x.channels, mean, rstd, Each<Acc>{p.weight},
              Each<Acc>{p.bias}, xhat, g);
          const Sums s = N::sums_of(xhat, g, x.channels);
          const double n = double(x.channels);
          N::finish(
              row(x.x, i), g, x.channels, mean, rstd, Same<Acc>{Acc(s.g / n)},
              Same<Acc>{Acc(s.gx / n)}, static_cast<T*>(x.out) + i * x.channels);
        }
      }
    });
  }
};

}  // namespace
