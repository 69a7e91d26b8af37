// Compiled without sanitizers in every build, since its own state is no part of the emulated
// program; EMULATOR_THREAD_SANITIZER and EMULATOR_ADDRESS_SANITIZER say what the rest has. memcpy
// is intercepted here, too, so asynchronous copies are checked.
#include "emulator.h"

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <vector>

#if defined(EMULATOR_THREAD_SANITIZER)
#include <sanitizer/tsan_interface.h>
#endif
#if defined(EMULATOR_ADDRESS_SANITIZER)
#include <sanitizer/asan_interface.h>
#endif

namespace a3fta::cuda {
constexpr size_t kShared = 256 * 1024;
extern __attribute__((aligned(128))) unsigned char dynamic_shared[];
__attribute__((aligned(128))) unsigned char dynamic_shared[kShared];
}  // namespace a3fta::cuda

dim3 gridDim, blockDim;

namespace emulator {
namespace {

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

constexpr size_t kStack = 128 * 1024;
constexpr int kRunning = 0;
constexpr int kFinished = -1;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Thread {
  ucontext_t context{};
  std::unique_ptr<char[]> stack{new char[kStack]};
  void* fiber = make_fiber();
  int waits_at = kRunning;  // line of the barrier, or kFinished
  std::vector<std::vector<Copy>> groups{1};  // the last one is still open
};

std::vector<std::unique_ptr<Thread>> threads;
std::map<const void*, int> allowed_shared;
ucontext_t scheduler;
void* scheduler_fiber = nullptr;
const std::function<void()>* kernel_body = nullptr;
dim3 block_at;
unsigned thread_at = 0;
long barriers = 0;       // passed by the block that runs
char barrier_points[2];  // by parity: a thread past barrier k + 1 must not order those at barrier k
char launch_point, finish_point;
constexpr int kYielded = -2;
long progress = 0;  // of threads that wait for each other without a barrier
std::vector<Chip> chips{kHopper};

void to_scheduler() {
  Thread& self = *threads[thread_at];
  enter_fiber(scheduler_fiber);
  swapcontext(&self.context, &scheduler);
}

void start() {
  acquire(&launch_point);
  (*kernel_body)();
  Thread& self = *threads[thread_at];
  require(self.groups.size() == 1 && self.groups[0].empty(), "copies that nobody waited for");
  release(&finish_point);
  self.waits_at = kFinished;
  to_scheduler();
  std::abort();
}

void run_block(unsigned count, size_t shared_bytes) {
  unsigned char* shared = a3fta::cuda::dynamic_shared;
#if defined(EMULATOR_ADDRESS_SANITIZER)
  __asan_unpoison_memory_region(shared, a3fta::cuda::kShared);
#endif
  std::memset(shared, 0xff, a3fta::cuda::kShared);
#if defined(EMULATOR_ADDRESS_SANITIZER)
  __asan_poison_memory_region(shared + shared_bytes, a3fta::cuda::kShared - shared_bytes);
#endif
  barriers = 0;
  begin_block(count);
  release(&launch_point);
  for (unsigned i = 0; i < count; ++i) {
    Thread& t = *threads[i];
    t.waits_at = kRunning;
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.get();
    t.context.uc_stack.ss_size = kStack;
    makecontext(&t.context, start, 0);
  }
  for (bool yielded = false;;) {
    const long before = progress;
    const bool held = yielded;  // others are on their way to the barrier
    yielded = false;
    for (unsigned i = 0; i < count; ++i) {
      const int at = threads[i]->waits_at;
      if (held && at != kYielded && at != kRunning) continue;
      thread_at = i;
      enter_fiber(threads[i]->fiber);
      swapcontext(&scheduler, &threads[i]->context);
      yielded |= threads[i]->waits_at == kYielded;
    }
    require(!yielded || progress != before, "threads wait for each other for ever");
    if (yielded) continue;
    const int line = threads[0]->waits_at;
    for (unsigned i = 1; i < count; ++i) {
      require(threads[i]->waits_at == line, "threads of a block part at the barrier of line",
              line == kFinished ? threads[i]->waits_at : line);
    }
    if (line == kFinished) break;
    ++barriers;
  }
  end_block();
  acquire(&finish_point);
}

}  // namespace

void acquire_at(void* at) { acquire(at); }
void release_at(void* at) { release(at); }
void progressed() { ++progress; }
void yield() {
  threads[thread_at]->waits_at = kYielded;
  to_scheduler();
}

const Chip& chip() { return chips.back(); }
void use_chip(const Chip& chip) { chips.push_back(chip); }
int device() { return static_cast<int>(chips.size()) - 1; }

dim3 thread_index() { return {thread_at, 0, 0}; }
dim3 block_index() { return block_at; }
unsigned char* shared_memory() { return a3fta::cuda::dynamic_shared; }

void barrier(int line) {
  char* point = &barrier_points[barriers & 1];
  release(point);
  threads[thread_at]->waits_at = line;
  to_scheduler();
  acquire(point);
}

void copy_async(void* to, const void* from, size_t bytes) {
  threads[thread_at]->groups.back().push_back({to, from, bytes});
}

void commit() { threads[thread_at]->groups.emplace_back(); }

void wait_prior(size_t count) {
  auto& groups = threads[thread_at]->groups;
  while (groups.size() > count + 1) {
    const std::vector<Copy> first = std::move(groups.front());
    groups.erase(groups.begin());
    for (const Copy& c : first) std::memcpy(c.to, c.from, c.bytes);
  }
}

void fail(const char* what, long value) {
  std::fprintf(stderr, "emulator: %s (%ld) in block (%u, %u), thread %u\n", what, value,
               block_at.x, block_at.y, thread_at);
  std::abort();
}

void allow_shared(const void* kernel, int bytes) { allowed_shared[kernel] = bytes; }

void run(const void* kernel, dim3 new_grid, dim3 new_block, size_t shared_bytes,
         const std::function<void()>& body) {
  require(shared_bytes <= 48 * 1024 || allowed_shared[kernel] >= static_cast<int>(shared_bytes),
          "shared memory was not allowed", static_cast<long>(shared_bytes));
  require(shared_bytes <= static_cast<size_t>(chip().shared_block), "shared memory",
          static_cast<long>(shared_bytes));
  require(new_grid.x > 0 && new_grid.y > 0 && new_grid.z == 1, "empty grid");
  require(new_block.y == 1 && new_block.z == 1 && new_block.x <= 1024, "block", new_block.x);
  begin_launch(kernel, new_block.x);
  gridDim = new_grid;
  blockDim = new_block;
  kernel_body = &body;
  scheduler_fiber = current_fiber();
  while (threads.size() < blockDim.x) threads.push_back(std::make_unique<Thread>());
  for (unsigned y = 0; y < gridDim.y; ++y) {
    for (unsigned x = 0; x < gridDim.x; ++x) {
      block_at = {x, y, 0};
      run_block(blockDim.x, shared_bytes);
    }
  }
}

}  // namespace emulator

// for Python
extern "C" void emulator_use_chip(int capability, int processors, int shared_block,
                                  int shared_processor) {
  emulator::use_chip({capability, processors, shared_block, shared_processor});
}
