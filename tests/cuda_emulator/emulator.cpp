// Compiled without sanitizers in every build, since its own state is no part of the emulated
// program; EMULATOR_THREAD_SANITIZER and EMULATOR_ADDRESS_SANITIZER say what the rest has. memcpy
// is intercepted here, too, so asynchronous copies are checked.
#include "emulator.h"

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#if defined(EMULATOR_THREAD_SANITIZER)
#include <sanitizer/tsan_interface.h>
#endif
#if defined(EMULATOR_ADDRESS_SANITIZER)
#include <sanitizer/asan_interface.h>
#endif

dim3 gridDim, blockDim;

namespace emulator {

namespace {

std::vector<Chip> chips{kHopper};

#if defined(EMULATOR_THREAD_SANITIZER)
void* make_fiber() { return __tsan_create_fiber(0); }
void enter_fiber(void* fiber) { __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync); }
void* current_fiber() { return __tsan_get_current_fiber(); }
void acquire(void* at) { __tsan_acquire(at); }
void release(void* at) { __tsan_release(at); }
#else
void* make_fiber() { return nullptr; }
void enter_fiber(void*) {}
void* current_fiber() { return nullptr; }
void acquire(void*) {}
void release(void*) {}
#endif
#if defined(EMULATOR_ADDRESS_SANITIZER)
void poison(void* at, size_t bytes) { __asan_poison_memory_region(at, bytes); }
void unpoison(void* at, size_t bytes) { __asan_unpoison_memory_region(at, bytes); }
#else
void poison(void*, size_t) {}
void unpoison(void*, size_t) {}
#endif

constexpr size_t kStack = 128 * 1024;
constexpr size_t kShared = 256 * 1024;  // more than any chip has

enum class State { running, yielded, at_warp, at_barrier, at_cluster, at_mailbox, finished };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  bool real;
};

struct Mailbox {
  bool expecting = false;
  long bytes = 0;  // sent, less those expected
  long phase = 0;
  std::vector<std::pair<void*, uint2>> late;
};

struct Block {
  dim3 index;
  std::unique_ptr<unsigned char, void (*)(void*)> memory{
      static_cast<unsigned char*>(std::aligned_alloc(1024, kShared)), std::free};
  unsigned char* shared = memory.get();
  long barriers = 0;       // passed
  char barrier_points[2];  // by parity: a thread past barrier k + 1 must not order those at k
};

struct Thread {
  ucontext_t context{};
  std::unique_ptr<char[]> stack{new char[kStack]};
  void* fiber = make_fiber();
  State state = State::running;
  Block* block = nullptr;
  unsigned index = 0;  // in its block
  int line = 0;        // of the barrier or the warp's instruction
  WarpWork work = nullptr;
  void* lane = nullptr;
  uint64_t* box = nullptr;
  int parity = 0;  // of the phase it waits for
  long arrived = 0, waited = 0;              // at barriers of the cluster
  std::vector<std::vector<Copy>> groups{1};  // the last one is still open
};

std::vector<std::unique_ptr<Thread>> threads;  // of all blocks of the cluster
std::vector<std::unique_ptr<Block>> blocks;
size_t block_count = 0;
unsigned block_threads = 0;
std::map<const void*, int> allowed_shared;
std::set<const void*> large_clusters;
std::map<uint64_t*, Mailbox> mailboxes;
bool late_delivery = true;
bool last_only = false;
ucontext_t scheduler;
void* scheduler_fiber = nullptr;
const std::function<void()>* kernel_body = nullptr;
Thread* self = nullptr;
long progress = 0;  // of threads, where others wait for them without a barrier
char cluster_points[2], launch_point, finish_point;

void to_scheduler() {
  Thread* const me = self;
  enter_fiber(scheduler_fiber);
  swapcontext(&me->context, &scheduler);
}

void start() {
  acquire(&launch_point);
  (*kernel_body)();
  require(self->groups.size() == 1 && self->groups[0].empty(), "copies that nobody waited for");
  require(self->arrived == self->waited, "a cluster barrier that nobody waited for");
  release(&finish_point);
  self->state = State::finished;
  progressed();
  to_scheduler();
  std::abort();
}

bool all_arrived(long count) {
  for (size_t i = 0; i < block_count * block_threads; ++i) {
    if (threads[i]->arrived < count) return false;
  }
  return true;
}

bool ready(const Thread& t) {
  if (t.state == State::at_mailbox) return mailboxes.at(t.box).phase % 2 != t.parity;
  return t.state == State::running || (t.state == State::at_cluster && all_arrived(t.waited));
}

Mailbox& mailbox(uint64_t* box) {
  const auto found = mailboxes.find(box);
  require(found != mailboxes.end(), "a mailbox that nobody has set up");
  return found->second;
}

void close_phase(Mailbox& m) {
  if (!m.expecting || m.bytes != 0) return;
  m.expecting = false;
  ++m.phase;
}

// Runs the lanes of a warp until each waits for threads of other warps; whether any moved.
bool run_warp(size_t first, size_t count) {
  for (bool moved = false;; moved = true) {
    bool ran = false;
    for (size_t i = first; i < first + count; ++i) {
      if (!ready(*threads[i])) continue;
      self = threads[i].get();
      self->state = State::running;
      enter_fiber(self->fiber);
      swapcontext(&scheduler, &self->context);
      ran = true;
    }
    if (!ran) return moved;
    size_t at_warp = 0;
    for (size_t i = first; i < first + count; ++i) at_warp += threads[i]->state == State::at_warp;
    if (at_warp == 0) continue;
    void* lanes[kWarp];
    for (size_t i = 0; i < count; ++i) {
      self = threads[first + i].get();
      require(at_warp == kWarp && self->work == threads[first]->work &&
                  self->line == threads[first]->line,
              "lanes of a warp part at the instruction of line", self->line);
      lanes[i] = self->lane;
    }
    threads[first]->work(lanes);
    for (size_t i = first; i < first + count; ++i) threads[i]->state = State::running;
  }
}

// Lets the threads of a block pass a barrier that all of them have reached.
bool open_barrier(Block& block, size_t first) {
  bool waits = false;
  for (size_t i = first; i < first + block_threads; ++i) {
    const State state = threads[i]->state;
    if (state == State::at_cluster || state == State::at_mailbox || state == State::yielded) {
      return false;
    }
    waits |= threads[i]->state == State::at_barrier;
  }
  if (!waits) return false;
  for (size_t i = first; i < first + block_threads; ++i) {
    self = threads[i].get();
    require(self->state == State::at_barrier && self->line == threads[first]->line,
            "threads of a block part at the barrier of line", threads[first]->line);
  }
  for (size_t i = first; i < first + block_threads; ++i) threads[i]->state = State::running;
  ++block.barriers;
  progressed();
  return true;
}

void run_cluster(size_t shared_bytes) {
  for (size_t b = 0; b < block_count; ++b) {
    unsigned char* shared = blocks[b]->shared;
    unpoison(shared, kShared);
    std::memset(shared, 0xff, kShared);
    poison(shared + shared_bytes, kShared - shared_bytes);
    blocks[b]->barriers = 0;
  }
  mailboxes.clear();
  const size_t count = block_count * block_threads;
  begin_block(static_cast<unsigned>(count));
  release(&launch_point);
  for (size_t i = 0; i < count; ++i) {
    Thread& t = *threads[i];
    t.state = State::running;
    t.block = blocks[i / block_threads].get();
    t.index = static_cast<unsigned>(i % block_threads);
    t.arrived = t.waited = 0;
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.get();
    t.context.uc_stack.ss_size = kStack;
    makecontext(&t.context, start, 0);
  }
  for (;;) {
    bool moved = false, yielded = false;
    size_t finished = 0;
    const long before = progress;
    for (size_t i = 0; i < count; ++i) {
      if (threads[i]->state == State::yielded) threads[i]->state = State::running;
    }
    for (size_t b = 0; b < block_count; ++b) {
      const size_t first = b * block_threads;
      for (size_t i = 0; i < block_threads; i += kWarp) {
        const size_t left = block_threads - i;
        moved |= run_warp(first + i, left < kWarp ? left : kWarp);
      }
      moved |= open_barrier(*blocks[b], first);
    }
    for (size_t i = 0; i < count; ++i) {
      finished += threads[i]->state == State::finished;
      yielded |= threads[i]->state == State::yielded;
    }
    if (finished == count) break;
    require(!yielded || progress != before, "threads wait for each other for ever");
    require(moved, "a barrier of the cluster that not all threads reach, or bytes not sent");
  }
  end_block();
  acquire(&finish_point);
}

}  // namespace

void acquire_at(void* at) { acquire(at); }
void release_at(void* at) { release(at); }
void progressed() { ++progress; }
void yield() {
  self->state = State::yielded;
  to_scheduler();
}

const Chip& chip() { return chips.back(); }
void use_chip(const Chip& chip) { chips.push_back(chip); }
int device() { return static_cast<int>(chips.size()) - 1; }

dim3 thread_index() { return {self->index, 0, 0}; }
dim3 block_index() { return self->block->index; }
unsigned char* shared_memory() { return self->block->shared; }

void barrier(int line) {
  Block& block = *self->block;
  char* point = &block.barrier_points[block.barriers & 1];
  release(point);
  self->line = line;
  self->state = State::at_barrier;
  progressed();
  to_scheduler();
  acquire(point);
}

void collective(WarpWork work, void* lane, int line) {
  self->work = work;
  self->lane = lane;
  self->line = line;
  self->state = State::at_warp;
  to_scheduler();
}

unsigned cluster_size() { return static_cast<unsigned>(block_count); }
unsigned cluster_rank() { return self->block->index.x % cluster_size(); }

void cluster_arrive() {
  require(self->arrived == self->waited, "a second arrival at a cluster barrier");
  release(&cluster_points[self->arrived & 1]);
  ++self->arrived;
}

void cluster_wait() {
  require(self->arrived == self->waited + 1, "a wait at a cluster barrier without arrival");
  char* point = &cluster_points[self->waited & 1];
  ++self->waited;
  self->state = State::at_cluster;
  to_scheduler();
  acquire(point);
}

void* map_shared(void* address, unsigned rank) {
  const auto offset = static_cast<unsigned char*>(address) - self->block->shared;
  require(offset >= 0 && offset < static_cast<long>(kShared), "not an address of shared memory");
  require(rank < block_count, "a block outside the cluster", rank);
  return blocks[rank]->shared + offset;
}

void mailbox_set_up(uint64_t* box) {
  require_aligned(box, 8);
  *box = 0;
  mailboxes[box] = {};
}

void mailbox_expect(uint64_t* box, int bytes) {
  Mailbox& m = mailbox(box);
  require(!m.expecting, "a second expectation in one phase of a mailbox");
  m.expecting = true;
  m.bytes -= bytes;
  release(box);
  close_phase(m);
}

void mailbox_wait(uint64_t* box, int parity) {
  Mailbox& m = mailbox(box);
  self->box = box;
  self->parity = parity;
  self->state = State::at_mailbox;
  to_scheduler();
  acquire(box);
  for (const auto& [to, value] : m.late) std::memcpy(to, &value, 8);
  m.late.clear();
  release(box);
}

void send(void* to, uint2 value, uint64_t* box) {
  Mailbox& m = mailbox(box);
  if (late_delivery) m.late.emplace_back(to, value);
  m.bytes += 8;
  release(box);
  close_phase(m);
}

void deliver_late(bool on) { late_delivery = on; }
bool delivers_late() { return late_delivery; }

void copy_async(void* to, const void* from, size_t bytes, bool real) {
  self->groups.back().push_back({to, from, bytes, real});
}

void commit() { self->groups.emplace_back(); }

void wait_prior(size_t count) {
  auto& groups = self->groups;
  while (groups.size() > count + 1) {
    const std::vector<Copy> first = std::move(groups.front());
    groups.erase(groups.begin());
    for (const Copy& c : first) {
      c.real ? std::memcpy(c.to, c.from, c.bytes) : std::memset(c.to, 0, c.bytes);
    }
  }
}

void fail(const char* what, long value) {
  const dim3 at = self == nullptr ? dim3() : self->block->index;
  std::fprintf(stderr, "emulator: %s (%ld) in block (%u, %u), thread %u\n", what, value, at.x,
               at.y, self == nullptr ? 0 : self->index);
  std::abort();
}

void allow_shared(const void* kernel, int bytes) {
  require(bytes <= chip().shared_block, "shared memory", bytes);
  allowed_shared[kernel] = bytes;
}

void allow_large_clusters(const void* kernel) { large_clusters.insert(kernel); }

void run_last_only(bool on) { last_only = on; }

void run(const void* kernel, dim3 new_grid, dim3 new_block, unsigned cluster, size_t shared_bytes,
         const std::function<void()>& body) {
  require(shared_bytes <= 48 * 1024 || allowed_shared[kernel] >= static_cast<int>(shared_bytes),
          "shared memory was not allowed", static_cast<long>(shared_bytes));
  require(new_grid.x > 0 && new_grid.y > 0 && new_grid.z == 1, "empty grid");
  require(new_block.y == 1 && new_block.z == 1 && new_block.x <= 1024, "block", new_block.x);
  require(cluster >= 1 && cluster <= (large_clusters.count(kernel) ? 16 : 8) &&
              new_grid.x % cluster == 0,
          "cluster", cluster);
  require(cluster == 1 || chip().capability >= 90, "clusters on a chip without", cluster);
  begin_launch(kernel, new_block.x);
  gridDim = new_grid;
  blockDim = new_block;
  kernel_body = &body;
  scheduler_fiber = current_fiber();
  block_count = cluster;
  block_threads = blockDim.x;
  while (threads.size() < block_count * block_threads) {
    threads.push_back(std::make_unique<Thread>());
  }
  while (blocks.size() < block_count) blocks.push_back(std::make_unique<Block>());
  for (unsigned y = 0; y < gridDim.y; ++y) {
    for (unsigned x = last_only ? gridDim.x - cluster : 0; x < gridDim.x; x += cluster) {
      for (unsigned b = 0; b < cluster; ++b) blocks[b]->index = {x + b, y, 0};
      run_cluster(shared_bytes);
    }
  }
  self = nullptr;
}

}  // namespace emulator
