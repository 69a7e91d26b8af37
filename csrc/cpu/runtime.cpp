// Threads, memory and the choice of instruction set for the CPU kernels.

#include "runtime.h"

#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <cstddef>
#include <cstdlib>
#include <mutex>
#include <new>
#include <string>
#include <vector>

namespace a3fta::cpu {

extern const Kernels baseline;
#ifdef A3FTA_X86
extern const Kernels avx2;
extern const Kernels avx512;
#ifdef A3FTA_AVX512_BF16
extern const Kernels avx512_bf16;
#endif
#endif

namespace {

struct Loop {
  void (*work)(void*, int64_t);
  void* ctx;
};

void parallel(int64_t workers, void (*work)(void*, int64_t), void* ctx) {
  if (workers == 1) return work(ctx, 0);
  Loop loop{work, ctx};
  const auto body = [](int64_t begin, int64_t end, void* p) {
    const Loop& l = *static_cast<Loop*>(p);
    for (int64_t i = begin; i < end; ++i) l.work(l.ctx, i);
  };
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, workers, 1, body, &loop));
}

int64_t threads() {
  uint32_t n = 1;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&n));
  return n;
}

// Scratch memory that calls hand on to the next: fresh pages from the system cost as much as the
// products that fill them. A block keeps its size in the cache line before it.
class Scratch {
 public:
  void* take(size_t bytes) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (lock.owns_lock()) {
      size_t best = kept_.size();
      for (size_t i = 0; i < kept_.size(); ++i)
        if (size(kept_[i]) >= bytes && size(kept_[i]) <= 2 * bytes + kLine &&
            (best == kept_.size() || size(kept_[i]) < size(kept_[best])))
          best = i;
      if (best < kept_.size()) {
        void* p = kept_[best];
        kept_.erase(kept_.begin() + std::ptrdiff_t(best));
        total_ -= size(p);
        return p;
      }
    }
    void* base = nullptr;
    if (posix_memalign(&base, kLine, bytes + kLine) != 0) throw std::bad_alloc();
    *static_cast<size_t*>(base) = bytes;
    return static_cast<char*>(base) + kLine;
  }

  void give(void* p) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (lock.owns_lock() && kept_.size() < kBlocks && total_ + size(p) <= kBytes) {
      kept_.push_back(p);
      total_ += size(p);
    } else {
      std::free(static_cast<char*>(p) - kLine);
    }
  }

 private:
  static constexpr size_t kLine = 64, kBlocks = 256, kBytes = size_t(32) << 20;
  static size_t size(void* p) {
    return *reinterpret_cast<size_t*>(static_cast<char*>(p) - kLine);
  }

  std::mutex mutex_;
  std::vector<void*> kept_;
  size_t total_ = 0;
};

Scratch& scratch() {
  // never destroyed: a thread may outlive the library's statics
  static Scratch* instance = new Scratch;
  return *instance;
}

void* allocate(size_t bytes) { return scratch().take(bytes); }
void release(void* p) { scratch().give(p); }

// those this processor runs, the best last
std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> found{&baseline};
#ifdef A3FTA_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return found;
  found.push_back(&avx2);
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return found;
  found.push_back(&avx512);
#ifdef A3FTA_AVX512_BF16
  if (__builtin_cpu_supports("avx512bf16")) found.push_back(&avx512_bf16);
#endif
#endif
  return found;
}

const std::vector<const Kernels*>& choices() {
  static const std::vector<const Kernels*> found = supported();
  return found;
}

const Kernels*& chosen() {
  static const Kernels* kernels = choices().back();
  return kernels;
}

std::string cpu_capabilities() {
  std::string names;
  for (const Kernels* k : choices()) {
    if (!names.empty()) names += ',';
    names += k->name;
  }
  return names;
}

std::string cpu_capability() { return chosen()->name; }

void set_cpu_capability(std::string name) {
  for (const Kernels* k : choices()) {
    if (name != k->name) continue;
    chosen() = k;
    return;
  }
  STD_TORCH_CHECK(false, "name: expected one of ", cpu_capabilities(), ", got ", name);
}

}  // namespace

const Kernels& kernels() { return *chosen(); }

const Host& host() {
  static const Host host{parallel, threads, allocate, release};
  return host;
}

}  // namespace a3fta::cpu

STABLE_TORCH_LIBRARY_IMPL(a3fta_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_capabilities", TORCH_BOX(&a3fta::cpu::cpu_capabilities));
  m.impl("cpu_capability", TORCH_BOX(&a3fta::cpu::cpu_capability));
  m.impl("set_cpu_capability", TORCH_BOX(&a3fta::cpu::set_cpu_capability));
}
