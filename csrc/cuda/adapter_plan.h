// How the one-pass kernels of `adapter` cut their work, and where they do not run: host functions
// of sizes alone, so that every choice can be read, and tested where there is no GPU.
#pragma once

#include <cstdint>

#include "launch.h"

namespace a3fta::cuda {

// The rank as these kernels hold it: 16, 32 or 64 columns, zeros beyond the rank; 0: too large.
constexpr int padded_rank(int64_t rank) {
  return rank <= 16 ? 16 : rank <= 32 ? 32 : rank <= 64 ? 64 : 0;
}

// 16-bit elements between the rows of a tile: whole steps of 16, and an odd number of 16-byte
// vectors, so that eight rows lie in eight different groups of banks.
__host__ __device__ constexpr int64_t padded_stride(int64_t cols) {
  return ceil_div(cols, 16) * 16 + 8;
}

// adapter_rows.cu: a block keeps `block_m` rows of h in shared memory.
struct RowsPlan {
  int block_m;  // 64, 32 or 16; 0: does not fit
  int64_t shared_bytes;
};

// columns of h, rows of w_up that one step of a product takes
__host__ __device__ constexpr int rows_chunk(int padded) { return padded == 64 ? 64 : 128; }

// elements of one of the three buffers of weights: (R, chunk) of w_down or (chunk, R) of w_up
__host__ __device__ constexpr int rows_buffer(int padded) {
  const int chunk = rows_chunk(padded);
  const int down = padded * (chunk + 8);
  const int up = chunk * (padded + 8);
  return down > up ? down : up;
}

inline RowsPlan plan_rows(const Chip& chip, int64_t rows, int64_t channels, int64_t rank) {
  const int padded = padded_rank(rank);
  if (padded == 0) return {0, 0};
  const auto bytes = [&](int block_m) {
    return 2 * (block_m * padded_stride(channels) + 3 * rows_buffer(padded));
  };
  // the weights are read once per block: many rows a block; but two blocks on a processor, so
  // that one stores while the other loads
  int block_m = 64;
  while (block_m > 16 &&
         2 * (bytes(block_m) + kSharedReserve) > chip.shared_processor) {
    block_m /= 2;
  }
  // few rows: no more than half of the processors left without work
  while (block_m > 16 && 2 * ceil_div(rows, block_m) <= chip.processors) block_m /= 2;
  if (bytes(block_m) > chip.shared_block) return {0, 0};
  return {block_m, bytes(block_m)};
}

// adapter_cluster.cu: each block of a cluster owns a slice of the columns.
constexpr int kClusterRows = 64;
constexpr int kMailboxBytes = 16;

// columns of a slice: whole steps of 16
inline int slice_width(int64_t cols, int blocks) {
  return static_cast<int>(ceil_div(ceil_div(cols, blocks), 16) * 16);
}

// The widest slice that a warp copies a row of at once.
constexpr int kSliceLimit = 256;

// The widest slice whose sums over rows, (width, R) twice, stay in the registers of 256 threads.
__host__ __device__ constexpr int cluster_width(int padded) {
  return padded == 64 ? 192 : kSliceLimit;
}

struct ClusterLayout {
  int blocks;            // of a cluster; 0: does not fit
  int n_width, c_width;  // columns of a slice, multiples of 16: of dy and w_up, of h
  bool through;          // with w_down, for dh
  int dy_buffers;        // 3, or 2 where that is too much
  int64_t shared_bytes;
};

// two mailboxes; partial dz (64, R) in fp32; w_up (n_width, R + 8); w_down (R, n_width + 8); da and
// z (64, R + 8) of two steps; dy (64, n_width + 8) dy_buffers times; h (64, c_width + 8) twice
constexpr int64_t cluster_bytes(const ClusterLayout& s, int padded) {
  const int64_t n = s.n_width + 8;
  const int64_t c = s.c_width > 0 ? s.c_width + 8 : 0;
  const int64_t halves = s.n_width * (padded + 8) + (s.through ? padded * n : 0) +
                         4 * kClusterRows * (padded + 8) + s.dy_buffers * kClusterRows * n +
                         2 * kClusterRows * c;
  return kMailboxBytes + 4 * kClusterRows * padded + 2 * halves;
}

// The smallest cluster whose blocks hold their slices, since fewer blocks exchange less, but two,
// as a block alone is no cluster that st.async may send in; three buffers of dy before two. Powers
// of two, which fill the 16 or 18 processors that a cluster can be placed on; 16 blocks only where
// 8 do not do, since not every device can place them.
inline ClusterLayout plan_cluster(const Chip& chip, int64_t n, int64_t c, int64_t rank,
                                  bool through) {
  const int padded = padded_rank(rank);
  if (padded == 0 || chip.capability < 90) return {};
  constexpr int kChoices[][2] = {{2, 3}, {4, 3}, {8, 3},  {2, 2},
                                 {4, 2}, {8, 2}, {16, 3}, {16, 2}};
  for (const auto& [blocks, dy_buffers] : kChoices) {
    ClusterLayout s{blocks,  slice_width(n, blocks), slice_width(c, blocks),
                    through, dy_buffers,             0};
    s.shared_bytes = cluster_bytes(s, padded);
    const int widest = s.n_width > s.c_width ? s.n_width : s.c_width;
    if (widest <= cluster_width(padded) && s.shared_bytes <= chip.shared_block) return s;
  }
  return {};
}

// adapter_cluster_forward.cu: the same for h and y.
struct ForwardLayout {
  int blocks;     // of a cluster; 0: does not fit
  int width;      // columns of a slice
  int h_buffers;  // 3, or 2 where that is too much
  int64_t shared_bytes;
};

// two mailboxes; partial a (64, R) in fp32; w_down (R, width + 8); w_up (width, R + 8); z (64,
// R + 8) of two steps; h (64, width + 8) h_buffers times; b_up (width,) in fp32
constexpr int64_t forward_bytes(const ForwardLayout& s, int padded) {
  const int64_t halves = padded * (s.width + 8) + s.width * (padded + 8) +
                         2 * kClusterRows * (padded + 8) +
                         s.h_buffers * kClusterRows * (s.width + 8);
  return kMailboxBytes + 4 * (kClusterRows * padded + s.width) + 2 * halves;
}

inline ForwardLayout plan_cluster_forward(const Chip& chip, int64_t channels, int64_t rank) {
  const int padded = padded_rank(rank);
  if (padded == 0 || chip.capability < 90) return {};
  constexpr int kChoices[][2] = {{2, 3}, {4, 3}, {8, 3}, {8, 2}, {16, 3}, {16, 2}};
  for (const auto& [blocks, h_buffers] : kChoices) {
    ForwardLayout s{blocks, slice_width(channels, blocks), h_buffers, 0};
    s.shared_bytes = forward_bytes(s, padded);
    if (s.width <= kSliceLimit && s.shared_bytes <= chip.shared_block) return s;
  }
  return {};
}

// Whether blocks of rows would read more of the weights (2 R C each) than of h (block_m C).
inline bool prefer_cluster(const Chip& chip, int64_t rows, int64_t channels, int64_t rank) {
  const int block_m = plan_rows(chip, rows, channels, rank).block_m;
  return 2 * rank > block_m;
}

}  // namespace a3fta::cuda
