// group_norm on one instruction set. Included by kernels.cpp alone.
//
// Contiguous: a group is one run of memory, and one task. Channels last: a task is a block of
// positions with all their channels; the tasks' sums are merged, then a second round applies them.
#pragma once

#include "norm.h"

namespace {

template <typename T>
struct GroupNorm : Norm<T> {
  using N = Norm<T>;
  using typename N::Acc;
  using Parameters = typename N::Parameters;
  static constexpr int64_t kElements = 32768;  // of a task with channels last

  static void forward(const Host& host, const GroupNormArgs& x) {
    const Parameters p(host, x.affine, x.channels);
    x.activation == a3fta::kSilu ? forward_as<a3fta::kSilu>(host, x, p)
                                 : forward_as<a3fta::kIdentity>(host, x, p);
  }
  static void backward(const Host& host, const GroupNormArgs& x) {
    const Parameters p(host, x.affine, x.channels);
    x.activation == a3fta::kSilu ? backward_as<a3fta::kSilu>(host, x, p)
                                 : backward_as<a3fta::kIdentity>(host, x, p);
  }

 private:
  template <int ACT>
  static void forward_as(const Host& host, const GroupNormArgs& x, const Parameters& p) {
    x.last ? forward_last<ACT>(host, x, p) : forward_groups<ACT>(host, x, p);
  }
  template <int ACT>
  static void backward_as(const Host& host, const GroupNormArgs& x, const Parameters& p) {
    x.last ? backward_last<ACT>(host, x, p) : backward_groups<ACT>(host, x, p);
  }

  static int64_t width(const GroupNormArgs& x) { return x.channels / x.groups; }
  static const T* in(const void* data, int64_t i) { return static_cast<const T*>(data) + i; }
  static T* out(const GroupNormArgs& x, int64_t i) { return static_cast<T*>(x.out) + i; }
  static Acc& mean(const GroupNormArgs& x, int64_t i) { return static_cast<Acc*>(x.mean)[i]; }
  static Acc& rstd(const GroupNormArgs& x, int64_t i) { return static_cast<Acc*>(x.rstd)[i]; }

  template <int ACT>
  static void forward_groups(const Host& host, const GroupNormArgs& x, const Parameters& p) {
    const int64_t size = width(x) * x.positions;
    run(host, x.samples * x.groups, [&](Tasks& tasks) {
      for (int64_t task; (task = tasks.next()) >= 0;) {
        const Moments m = N::moments(in(x.x, task * size), size);
        mean(x, task) = Acc(m.mean);
        rstd(x, task) = Acc(rstd_of(m, x.eps));
        for (int64_t d = 0; d < width(x); ++d) {
          const int64_t c = task % x.groups * width(x) + d, at = task * size + d * x.positions;
          N::template apply<ACT>(
              in(x.x, at), x.positions, Same<Acc>{mean(x, task)},
              Same<Acc>{rstd(x, task) * p.weight[c]}, Same<Acc>{p.bias[c]}, out(x, at));
        }
      }
    });
  }

  template <int ACT>
  static void backward_groups(const Host& host, const GroupNormArgs& x, const Parameters& p) {
    const int64_t size = width(x) * x.positions;
    run(host, x.samples * x.groups, [&](Tasks& tasks) {
      alignas(64) Acc xhat[N::kTile], tile[N::kTile];
      for (int64_t task; (task = tasks.next()) >= 0;) {
        const Same<Acc> center{mean(x, task)}, scale{rstd(x, task)};
        // body(first element, elements, their slopes)
        const auto each_tile = [&](bool computed, const auto& body) {
          for (int64_t d = 0; d < width(x); ++d) {
            const int64_t c = task % x.groups * width(x) + d;
            for (int64_t i = 0; i < x.positions; i += N::kTile) {
              const int64_t at = task * size + d * x.positions + i;
              const int64_t n = min_of(N::kTile, x.positions - i);
              Acc* g = slopes_at<ACT>(x, at, tile);
              if (!computed)
                N::template slopes<ACT>(
                    in(x.dy, at), in(x.x, at), n, center, scale, Same<Acc>{p.weight[c]},
                    Same<Acc>{p.bias[c]}, xhat, g);
              body(at, n, g);
            }
          }
        };
        Sums sums{0.0, 0.0};
        each_tile(false, [&](int64_t, int64_t n, const Acc* g) {
          const Sums s = N::sums_of(xhat, g, n);
          sums = {sums.g + s.g, sums.gx + s.gx};
        });
        const Same<Acc> mean_g{Acc(sums.g / double(size))}, mean_gx{Acc(sums.gx / double(size))};
        each_tile(N::template kHeld<ACT>, [&](int64_t at, int64_t n, const Acc* g) {
          N::finish(in(x.x, at), g, n, center, scale, mean_g, mean_gx, out(x, at));
        });
      }
    });
  }

  // where the slopes of the elements from `at` on are: in dx, or in the task's scratch
  template <int ACT>
  static Acc* slopes_at(const GroupNormArgs& x, int64_t at, Acc* scratch) {
    if constexpr (N::template kHeld<ACT>)
      return out(x, at);
    else
      return scratch;
  }

  // blocks of positions of one sample
  struct Blocks {
    explicit Blocks(const GroupNormArgs& x)
        : rows(max_of(kElements / x.channels, 1)), per_sample(ceil_div(x.positions, rows)) {}
    int64_t rows, per_sample;
    int64_t count(const GroupNormArgs& x) const { return x.samples * per_sample; }
    int64_t sample(int64_t block) const { return block / per_sample; }
    int64_t first(int64_t block) const { return block % per_sample * rows; }
    int64_t length(const GroupNormArgs& x, int64_t block) const {
      return min_of(rows, x.positions - first(block));
    }
    // of the block's first row
    int64_t at(const GroupNormArgs& x, int64_t block) const {
      return (sample(block) * x.positions + first(block)) * x.channels;
    }
  };

  // a group's values for each of its channels
  static void spread(const GroupNormArgs& x, const Acc* of_group, Acc* of_channel) {
    for (int64_t group = 0; group < x.groups; ++group)
      for (int64_t d = 0; d < width(x); ++d) of_channel[group * width(x) + d] = of_group[group];
  }

  template <int ACT>
  static void forward_last(const Host& host, const GroupNormArgs& x, const Parameters& p) {
    const Blocks blocks(x);
    const int64_t channels = x.channels;
    const Buffer<Moments> parts(host, blocks.count(x) * x.groups);
    run(host, blocks.count(x), [&](Tasks& tasks) {
      const Buffer<Acc> center(host, channels), lacks(host, channels), squares(host, channels);
      for (int64_t task; (task = tasks.next()) >= 0;) {
        const T* from = in(x.x, blocks.at(x, task));
        const int64_t rows = blocks.length(x, task);
        moments_of_channels(from, rows, channels, center, lacks, squares);
        for (int64_t group = 0; group < x.groups; ++group) {
          const int64_t c = group * width(x);
          parts[task * x.groups + group] =
              moments_of_group(width(x), rows, center + c, lacks + c, squares + c);
        }
      }
    });
    for (int64_t i = 0; i < x.samples * x.groups; ++i) {
      const int64_t first = i / x.groups * blocks.per_sample, group = i % x.groups;
      Moments m{};
      for (int64_t block = first; block < first + blocks.per_sample; ++block) {
        const Moments& part = parts[block * x.groups + group];
        m = block == first ? part : merged(m, part);
      }
      mean(x, i) = Acc(m.mean);
      rstd(x, i) = Acc(rstd_of(m, x.eps));
    }
    run(host, blocks.count(x), [&](Tasks& tasks) {
      const Buffer<Acc> center(host, channels), scale(host, channels);
      int64_t sample = -1;
      for (int64_t task; (task = tasks.next()) >= 0;) {
        if (blocks.sample(task) != sample) {
          sample = blocks.sample(task);
          spread(x, &mean(x, sample * x.groups), center);
          spread(x, &rstd(x, sample * x.groups), scale);
          for (int64_t c = 0; c < channels; ++c) scale[c] *= p.weight[c];
        }
        const int64_t at = blocks.at(x, task);
        for (int64_t i = 0; i < blocks.length(x, task); ++i)
          N::template apply<ACT>(
              in(x.x, at + i * channels), channels, Each<Acc>{center}, Each<Acc>{scale},
              Each<Acc>{p.bias}, out(x, at + i * channels));
      }
    });
  }

  // of each channel over the rows: a center near its mean, the sums of differences and of squares
  static void moments_of_channels(
      const T* x, int64_t rows, int64_t channels, Acc* center, Acc* lacks, Acc* squares) {
    const int64_t few = min_of(rows, 4);
    for (int64_t c = 0; c < channels; ++c) center[c] = 0;
    for (int64_t i = 0; i < few; ++i)
      for (int64_t c = 0; c < channels; ++c) center[c] += widen(x[i * channels + c]) / Acc(few);
    differences(x, rows, channels, center, lacks, squares);
    bool off = false;
    for (int64_t c = 0; c < channels; ++c) off |= N::is_off(lacks[c], squares[c], Acc(rows));
    if (!off) return;
    for (int64_t c = 0; c < channels; ++c) center[c] += lacks[c] / Acc(rows);
    differences(x, rows, channels, center, lacks, squares);
  }

  // of the channels of a group together
  static Moments moments_of_group(
      int64_t channels, int64_t rows, const Acc* center, const Acc* lacks, const Acc* squares) {
    const double each = 1.0 / double(rows);
    double mean = 0.0, sum = 0.0;
    for (int64_t c = 0; c < channels; ++c) mean += double(center[c]) + double(lacks[c]) * each;
    mean /= double(channels);
    for (int64_t c = 0; c < channels; ++c) {
      const double lack = double(lacks[c]) * each, apart = double(center[c]) + lack - mean;
      sum += double(squares[c]) - lack * double(lacks[c]) + double(rows) * apart * apart;
    }
    return {double(rows * channels), mean, sum < 0.0 ? 0.0 : sum};
  }

  static void differences(
      const T* x, int64_t rows, int64_t channels, const Acc* center, Acc* lacks, Acc* squares) {
    for (int64_t c = 0; c < channels; ++c) lacks[c] = squares[c] = 0;
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) {
      const T *a = x + i * channels, *b = a + channels, *d = b + channels, *e = d + channels;
#pragma GCC ivdep
      for (int64_t c = 0; c < channels; ++c) {
        const Acc p = widen(a[c]) - center[c], q = widen(b[c]) - center[c];
        const Acc r = widen(d[c]) - center[c], s = widen(e[c]) - center[c];
        lacks[c] += (p + q) + (r + s);
        squares[c] += (p * p + q * q) + (r * r + s * s);
      }
    }
    for (; i < rows; ++i) {
      const T* a = x + i * channels;
#pragma GCC ivdep
      for (int64_t c = 0; c < channels; ++c) {
        const Acc p = widen(a[c]) - center[c];
        lacks[c] += p;
        squares[c] += p * p;
      }
    }
  }

  template <int ACT>
  static void backward_last(const Host& host, const GroupNormArgs& x, const Parameters& p) {
    const Blocks blocks(x);
    const int64_t channels = x.channels;
    const Buffer<Sums> parts(host, blocks.count(x) * x.groups);
    const Buffer<Acc> means(host, 2 * x.samples * x.groups);
    Acc *mean_g = means, *mean_gx = means + x.samples * x.groups;

    // slopes of every row of every block, and what the block's begin, body and end make of them
    const auto each_row = [&](bool computed, const auto& begin, const auto& body, const auto& end) {
      run(host, blocks.count(x), [&](Tasks& tasks) {
        const Buffer<Acc> center(host, channels), scale(host, channels), xhat(host, channels),
            scratch(host, channels), one(host, channels), two(host, channels);
        int64_t sample = -1;
        for (int64_t task; (task = tasks.next()) >= 0;) {
          if (blocks.sample(task) != sample) {
            sample = blocks.sample(task);
            spread(x, &mean(x, sample * x.groups), center);
            spread(x, &rstd(x, sample * x.groups), scale);
          }
          begin(sample, one, two);
          for (int64_t i = 0; i < blocks.length(x, task); ++i) {
            const int64_t at = blocks.at(x, task) + i * channels;
            Acc* g = slopes_at<ACT>(x, at, scratch);
            if (!computed)
              N::template slopes<ACT>(
                  in(x.dy, at), in(x.x, at), channels, Each<Acc>{center}, Each<Acc>{scale},
                  Each<Acc>{p.weight}, Each<Acc>{p.bias}, xhat, g);
            body(at, xhat, g, center, scale, one, two);
          }
          end(task, one, two);
        }
      });
    };

    each_row(
        false,
        [&](int64_t, Acc* sum_g, Acc* sum_gx) {
          for (int64_t c = 0; c < channels; ++c) sum_g[c] = sum_gx[c] = 0;
        },
        [&](int64_t, const Acc* xhat, const Acc* g, const Acc*, const Acc*, Acc* sum_g,
            Acc* sum_gx) {
#pragma GCC ivdep
          for (int64_t c = 0; c < channels; ++c) {
            sum_g[c] += g[c];
            sum_gx[c] += g[c] * xhat[c];
          }
        },
        [&](int64_t task, const Acc* sum_g, const Acc* sum_gx) {
          for (int64_t group = 0; group < x.groups; ++group) {
            Sums s{0.0, 0.0};
            for (int64_t c = group * width(x); c < (group + 1) * width(x); ++c)
              s = {s.g + double(sum_g[c]), s.gx + double(sum_gx[c])};
            parts[task * x.groups + group] = s;
          }
        });
    for (int64_t i = 0; i < x.samples * x.groups; ++i) {
      const int64_t first = i / x.groups * blocks.per_sample, group = i % x.groups;
      Sums s{0.0, 0.0};
      for (int64_t block = first; block < first + blocks.per_sample; ++block) {
        const Sums& part = parts[block * x.groups + group];
        s = {s.g + part.g, s.gx + part.gx};
      }
      const double n = double(width(x) * x.positions);
      mean_g[i] = Acc(s.g / n);
      mean_gx[i] = Acc(s.gx / n);
    }
    each_row(
        N::template kHeld<ACT>,
        [&](int64_t sample, Acc* one, Acc* two) {
          spread(x, mean_g + sample * x.groups, one);
          spread(x, mean_gx + sample * x.groups, two);
        },
        [&](int64_t at, const Acc*, const Acc* g, const Acc* center, const Acc* scale,
            const Acc* one, const Acc* two) {
          N::finish(
              in(x.x, at), g, channels, Each<Acc>{center}, Each<Acc>{scale}, Each<Acc>{one},
              Each<Acc>{two}, out(x, at));
        },
        [](int64_t, const Acc*, const Acc*) {});
  }
};

}  // namespace
