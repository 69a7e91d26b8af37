// How the Hopper product cuts its output into tiles, and in which order blocks take them. Plain
// arithmetic, the same on the host, on the device, and in the tests.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define A3FTA_PLAN_HD __host__ __device__ inline
#else
#define A3FTA_PLAN_HD inline
#endif

namespace a3fta::cuda {

// What one product is for. fused: y = [h] @ [weight, w_down].T, then z @ v.T on top; concat:
// y = [h, z] @ [weight, v].T; dgrad: dh = [dy, da] @ [weight; w_down].
enum class HopperUse { fused, concat, dgrad };

constexpr int kHopperBlockM = 128;
constexpr int kHopperBlockK = 64;  // 128 bytes, the width of the swizzle
constexpr int kHopperRuns = 3;

// Columns of a transposed operand that a tensor copy brings at once: they divide the tile.
A3FTA_PLAN_HD constexpr int hopper_box(int block_n) { return block_n % 64 == 0 ? 64 : 32; }

// Columns before, inside and after the adapter's; a tile lies in one of these runs.
struct HopperRun {
  int64_t begin, length, first_tile;
};

struct HopperPlan {
  int block_n;
  int rank_padded;  // columns of w_down beside each tile of the weight; 0 unless fused
  int64_t tiles_m, tiles_n;
  int64_t band;    // columns of tiles that are walked together, row by row
  int64_t blocks;  // of the persistent grid
  int64_t cost;    // predicted cycles of the busiest block
  HopperRun runs[kHopperRuns];

  A3FTA_PLAN_HD int64_t tiles() const { return tiles_m * tiles_n; }
};

// without an index at run time, which would put the plan into local memory
A3FTA_PLAN_HD HopperRun hopper_run(const HopperPlan& plan, int run) {
  return run == 2 ? plan.runs[2] : run == 1 ? plan.runs[1] : plan.runs[0];
}

struct HopperTile {
  int64_t row0;
  int run;
  int64_t n0;  // within the run
  bool first;  // the leftmost tile of its rows
};

A3FTA_PLAN_HD HopperTile hopper_tile(const HopperPlan& plan, int64_t index) {
  const int64_t whole_band = plan.tiles_m * plan.band;
  const int64_t begin = index / whole_band * plan.band;
  const int64_t left = plan.tiles_n - begin;
  const int64_t width = left < plan.band ? left : plan.band;
  const int64_t inside = index % whole_band;
  const int64_t column = begin + inside % width;
  const int run = column >= plan.runs[2].first_tile ? 2 : column >= plan.runs[1].first_tile ? 1 : 0;
  const int64_t n0 = (column - hopper_run(plan, run).first_tile) * plan.block_n;
  return {inside / width * kHopperBlockM, run, n0, column == 0};
}

inline int hopper_rank_padded(int64_t rank) { return rank <= 16 ? 16 : rank <= 32 ? 32 : 64; }

namespace plan_detail {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Cycles of a tile. A step of the reduction takes as long as its matrix instructions, 4 cycles per
// column, or as its bytes from L2. Their rate is what a public kernel of 128 x 128 tiles was seen
// to reach; it, the start of the ring and the store are estimates that no GPU has confirmed.
inline int64_t tile_cost(int64_t steps, int64_t columns, int64_t stored_columns) {
  constexpr int64_t kBytesPerCycle = 40, kStart = 1000;
  const int64_t multiply = 4 * columns;
  const int64_t feed = (kHopperBlockM + columns) * kHopperBlockK * 2 / kBytesPerCycle;
  return steps * (multiply > feed ? multiply : feed) + kStart + 4 * stored_columns;
}

}  // namespace plan_detail

// The plan for an (m, n) output and a reduction of `depth` and, beside it, `rank`. dgrad: columns
// `start` .. `start + length` of n are the adapter's; the other uses have start 0 and length n.
// Of the tile widths the cheapest is taken, the widest among equals. Neither m nor n may be 0.
inline HopperPlan hopper_plan(HopperUse use, int64_t m, int64_t n, int64_t depth, int64_t rank,
                              int64_t start, int64_t length, int64_t multiprocessors) {
  using plan_detail::ceil_div;
  // a fused tile and its share of w_down fit one matrix instruction, of 256 columns at most
  constexpr int kWidths[] = {256, 192, 160, 128};
  HopperPlan best{};
  for (const int block_n : kWidths) {
    const bool fused = use == HopperUse::fused;
    if (fused && block_n == 256) continue;
    HopperPlan plan{};
    plan.block_n = block_n;
    plan.rank_padded = fused ? hopper_rank_padded(rank) : 0;
    plan.tiles_m = ceil_div(m, kHopperBlockM);
    const int64_t begins[kHopperRuns + 1] = {0, start, start + length, n};
    for (int i = 0; i < kHopperRuns; ++i) {
      plan.runs[i] = {begins[i], begins[i + 1] - begins[i], plan.tiles_n};
      plan.tiles_n += ceil_div(plan.runs[i].length, block_n);
    }
    plan.blocks = plan.tiles() < multiprocessors ? plan.tiles() : multiprocessors;
    // tiles that run at the same time form about a square, which reads the least from L2
    int64_t side = 1;
    while (side * side * block_n < multiprocessors * kHopperBlockM) ++side;
    plan.band = ceil_div(plan.tiles_n, ceil_div(plan.tiles_n, side));
    const int64_t steps = ceil_div(depth, kHopperBlockK) + ceil_div(rank, kHopperBlockK);
    plan.cost = ceil_div(plan.tiles(), multiprocessors) *
                plan_detail::tile_cost(steps, block_n + plan.rank_padded, block_n);
    if (best.block_n == 0 || plan.cost < best.cost) best = plan;
  }
  return best;
}

}  // namespace a3fta::cuda
