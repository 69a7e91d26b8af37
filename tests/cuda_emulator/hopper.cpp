// What stands behind hopper.h: barriers, copies, products. Compiled without sanitizers, like
// emulator.cpp; the bytes of copies and products go through code that they do see.
#include "hopper.h"

#include <map>
#include <memory>
#include <set>
#include <vector>

namespace emulator {
namespace {

// "cp.async.bulk.tensor" into 128-byte swizzled shared memory
struct Load {
  unsigned char* to;
  CUtensorMap map;
  int64_t column, row;
  char issued;  // orders the copy after its issue
};

// "mbarrier": the pending arrivals and bytes of the current phase
struct State {
  uint32_t arrivals = 0, pending = 0;
  int64_t bytes = 0;
  unsigned phase = 0;
  bool published = false;
  std::vector<std::unique_ptr<Load>> loads;  // not landed yet
  char ends[2];                              // of even and of odd phases
};

struct Product {
  const void* sums;
  int shape;
  std::function<void()> compute;
};

struct ThreadState {
  std::vector<std::vector<Product>> groups{1};  // the last one is still open
  bool fenced = false;
  uint64_t issued = 0;  // a digest of all products so far
  int registers = 0;
  uint32_t posted[2];
  unsigned exchanges = 0;
  unsigned joins = 0;
};

struct Warp {
  char joined[2];  // of even and of odd joins
};

struct BlockState {
  std::map<const void*, State> barriers;
  std::vector<ThreadState> threads;
  std::vector<Warp> warps;
};
BlockState block;
uint32_t coin = 1;
int launches = 0;  // of blocks of three warpgroups
std::set<const void*> kernels;

constexpr uint32_t kWindow = 1024 + 128;  // where the dynamic shared memory begins
constexpr int kRegisters = 64 * 1024;

ThreadState& self() { return block.threads[thread_index().x]; }

State& find(void* barrier) {
  const auto found = block.barriers.find(barrier);
  require(found != block.barriers.end(), "a barrier that was not made");
  require(found->second.published, "a barrier that was not published");
  return found->second;
}

void end_phase_if_due(State& b) {
  progressed();
  if (b.pending > 0 || b.bytes != 0) return;
  ++b.phase;
  b.pending = b.arrivals;
}

// calls that the compiler cannot replace, so that sanitizers see them
void* (*volatile copy_bytes)(void*, const void*, size_t) = std::memcpy;
void* (*volatile set_bytes)(void*, int, size_t) = std::memset;

// Rows of the box are as wide as the swizzle, whose chunks are 16 bytes; elements beyond the edges
// are zero.
void land(State& b, Load& load) {
  acquire_at(&load.issued);
  const CUtensorMap& map = load.map;
  constexpr int64_t kChunk = 8;
  for (int64_t i = 0; i < map.box[1]; ++i) {
    for (int64_t j = 0; j < map.box[0]; j += kChunk) {
      const uint32_t flat = shared_offset(load.to) + static_cast<uint32_t>(i * map.box[0] + j) * 2;
      unsigned char* to = load.to + (swizzled(flat, map.swizzle) - shared_offset(load.to));
      const int64_t row = load.row + i, column = load.column + j;
      const int64_t left = static_cast<int64_t>(map.sizes[0]) - column;
      const bool inside = row >= 0 && row < static_cast<int64_t>(map.sizes[1]) && left > 0;
      require(column >= 0, "a column before the first", column);
      const int64_t count = !inside ? 0 : left < kChunk ? left : kChunk;
      if (count > 0) copy_bytes(to, map.data + row * map.row_bytes + column * 2, count * 2);
      if (count < kChunk) set_bytes(to + count * 2, 0, (kChunk - count) * 2);
    }
  }
  release_at(&b.ends[b.phase & 1]);
  b.bytes -= static_cast<int64_t>(map.box[0]) * map.box[1] * 2;
  end_phase_if_due(b);
}

// until all threads of the warp have come; each sees what the others did before
void join_warp() {
  const unsigned first = thread_index().x / kWarp * kWarp;
  char* point = &block.warps[first / kWarp].joined[self().joins & 1];
  release_at(point);
  const unsigned number = self().joins++;
  progressed();
  for (unsigned i = first; i < first + kWarp; ++i) {
    while (block.threads[i].joins <= number) yield();
  }
  acquire_at(point);
}

}  // namespace

void begin_launch(const void* kernel, unsigned threads) {
  if (threads != 3 * 128) return;
  ++launches;
  kernels.insert(kernel);
}

void begin_block(unsigned threads) {
  block.barriers.clear();
  block.threads.assign(threads, ThreadState());
  block.warps.resize(threads / kWarp + 1);
}

void end_block() {
  for (auto& [at, barrier] : block.barriers) {
    require(barrier.loads.empty(), "a tensor copy that nobody waited for");
  }
  int registers = 0;
  for (size_t i = 0; i < block.threads.size(); ++i) {
    const ThreadState& t = block.threads[i];
    require(t.groups.size() == 1 && t.groups[0].empty(), "products that nobody waited for", i);
    const ThreadState& first = block.threads[i / 128 * 128];
    require(t.issued == first.issued && t.registers == first.registers,
            "a warpgroup whose threads part", i);
    registers += t.registers;
  }
  require(registers <= kRegisters, "registers of a block", registers);
}

uint32_t shared_offset(const void* p) {
  const auto offset = static_cast<const unsigned char*>(p) - shared_memory();
  return static_cast<uint32_t>(offset) + kWindow;
}

const unsigned char* shared_at(uint32_t offset, size_t bytes) {
  require(offset >= kWindow && offset + bytes <= kWindow + 227 * 1024, "shared address", offset);
  return shared_memory() + (offset - kWindow);
}

void barrier_init(void* barrier, uint32_t arrivals) {
  require_aligned(barrier, 8);
  State& b = block.barriers[barrier];
  require(b.arrivals == 0 && arrivals > 0, "a barrier made twice, or for nobody");
  b.arrivals = b.pending = arrivals;
}

void barrier_publish() {
  for (auto& [at, barrier] : block.barriers) barrier.published = true;
}

void barrier_arrive(void* barrier, uint32_t bytes) {
  State& b = find(barrier);
  require(b.pending > 0, "more arrivals at a barrier than it expects");
  release_at(&b.ends[b.phase & 1]);
  b.bytes += bytes;
  --b.pending;
  end_phase_if_due(b);
  if (bytes == 0) yield();  // whoever waited for this goes first
}

// "mbarrier.try_wait.parity": whether the phase of this parity, the current or the one before, is
// over
void barrier_wait(void* barrier, uint32_t parity) {
  State& b = find(barrier);
  while ((b.phase & 1) == parity) {
    if (b.loads.empty()) {
      yield();
      continue;
    }
    const std::unique_ptr<Load> load = std::move(b.loads.front());
    b.loads.erase(b.loads.begin());
    land(b, *load);
  }
  progressed();
  acquire_at(&b.ends[parity]);
}

void load_box(void* to, const CUtensorMap& map, void* barrier, int32_t column, int32_t row) {
  require(shared_offset(to) % 1024 == 0, "a box off the swizzle's pattern", shared_offset(to));
  require(map.data != nullptr, "a tensor map that was not made");
  auto load = std::make_unique<Load>(
      Load{static_cast<unsigned char*>(to), map, column, row, '\0'});
  release_at(&load->issued);
  State& b = find(barrier);
  coin = coin * 1664525u + 1013904223u;
  if (coin >> 31) {
    land(b, *load);
  } else {
    b.loads.push_back(std::move(load));
  }
}

// "wgmma.fence" before the first product of a run and after other accesses to its registers;
// products of one shape on the same sums follow each other in order, others must be waited for
void issue_product(const void* sums, int shape, uint64_t what, std::function<void()> compute) {
  ThreadState& t = self();
  require(t.fenced, "products without a fence");
  for (const auto& group : t.groups) {
    for (const Product& p : group) {
      require(p.sums != sums || p.shape == shape, "two shapes at work on the same sums", shape);
    }
  }
  t.issued = t.issued * 6364136223846793005u + what + 1442695040888963407u;
  t.groups.back().push_back({sums, shape, std::move(compute)});
}

void fence_products() { self().fenced = true; }

void commit_products() {
  self().fenced = false;
  self().groups.emplace_back();
}

// "wgmma.wait_group.sync.aligned": a warp's instruction, so past it the products of all its threads
// have read their operands
void wait_products(size_t count) {
  ThreadState& t = self();
  while (t.groups.size() > count + 1) {
    const std::vector<Product> first = std::move(t.groups.front());
    t.groups.erase(t.groups.begin());
    for (const Product& p : first) p.compute();
  }
  join_warp();
}

// "setmaxnreg": a multiple of 8 from 24 to 256, by all warps of a warpgroup
void set_registers(int count, bool) {
  require(count % 8 == 0 && count >= 24 && count <= 256, "setmaxnreg", count);
  require(self().registers == 0, "setmaxnreg twice", count);
  self().registers = count;
}

// A thread is at most one exchange ahead of its neighbours, hence two places.
void exchange_quad(uint32_t x, uint32_t (&all)[4]) {
  const unsigned first = thread_index().x / 4 * 4;
  const unsigned number = self().exchanges;
  self().posted[number & 1] = x;
  ++self().exchanges;
  progressed();
  for (unsigned i = 0; i < 4; ++i) {
    while (block.threads[first + i].exchanges <= number) yield();
    all[i] = block.threads[first + i].posted[number & 1];
  }
}

}  // namespace emulator

// The documented conditions of a map of a matrix of 16-bit numbers.
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data,
                                const cuuint64_t* sizes, const cuuint64_t* strides,
                                const cuuint32_t* box, const cuuint32_t* steps,
                                CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  bool fits = rank == 2 && reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
              strides[0] % 16 == 0 && strides[0] < uint64_t{1} << 40 &&
              strides[0] >= sizes[0] * 2 &&
              box[0] * 2 == (swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 128 : 64);
  for (int i = 0; i < 2; ++i) {
    fits = fits && sizes[i] > 0 && sizes[i] <= uint64_t{1} << 32 && box[i] > 0 && box[i] <= 256 &&
           steps[i] == 1;
  }
  if (!fits) return CUDA_ERROR_INVALID_VALUE;
  *map = {static_cast<const unsigned char*>(data), {sizes[0], sizes[1]}, strides[0],
          {box[0], box[1]}, box[0] * 2};
  return CUDA_SUCCESS;
}

// for Python
extern "C" {
int emulator_hopper_launches() { return emulator::launches; }
int emulator_hopper_kernels() { return static_cast<int>(emulator::kernels.size()); }
}
