// Prints the plan of the problem on its command line, after it has walked the tile map.
//
// hopper_plan USE M N DEPTH RANK START LENGTH MULTIPROCESSORS [last]
//
// "last" looks at the last tile alone; otherwise every tile is visited, and it is an error if an
// element of the output is left out or has two owners.
#include "../../csrc/cuda/hopper_plan.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

using namespace a3fta::cuda;

int main(int argc, char** argv) {
  if (argc < 9) return 2;
  const HopperUse use = std::strcmp(argv[1], "fused") == 0    ? HopperUse::fused
                        : std::strcmp(argv[1], "concat") == 0 ? HopperUse::concat
                                                              : HopperUse::dgrad;
  int64_t x[7];
  for (int i = 0; i < 7; ++i) x[i] = std::atoll(argv[2 + i]);
  const int64_t m = x[0], n = x[1];
  const HopperPlan p = hopper_plan(use, m, n, x[2], x[3], x[4], x[5], x[6]);

  const bool last = argc > 9;
  std::vector<char> owned(last ? 0 : p.tiles());  // row tiles x column tiles
  HopperTile tile{};
  for (int64_t i = last ? p.tiles() - 1 : 0; i < p.tiles(); ++i) {
    tile = hopper_tile(p, i);
    const HopperRun run = hopper_run(p, tile.run);
    const int64_t row = tile.row0 / kHopperBlockM, column = run.first_tile + tile.n0 / p.block_n;
    const bool inside = tile.row0 >= 0 && tile.row0 < m && tile.n0 >= 0 &&
                        tile.n0 < run.length && tile.row0 % kHopperBlockM == 0 &&
                        tile.n0 % p.block_n == 0 && tile.first == (column == 0);
    if (!inside || (!last && owned[row * p.tiles_n + column]++ != 0)) {
      std::fprintf(stderr, "tile %lld: row %lld, run %d, column %lld\n",
                   static_cast<long long>(i), static_cast<long long>(tile.row0), tile.run,
                   static_cast<long long>(tile.n0));
      return 1;
    }
  }
  std::printf("{\"block_n\": %d, \"rank_padded\": %d, \"tiles_m\": %lld, \"tiles_n\": %lld, "
              "\"band\": %lld, \"blocks\": %lld, \"row0\": %lld}\n",
              p.block_n, p.rank_padded, static_cast<long long>(p.tiles_m),
              static_cast<long long>(p.tiles_n), static_cast<long long>(p.band),
              static_cast<long long>(p.blocks), static_cast<long long>(tile.row0));
  return 0;
}
