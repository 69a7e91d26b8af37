// Threads, memory and the choice of instruction set for the CPU kernels.

#include "runtime.h"

#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <new>
#include <string>

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

void* allocate(size_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, 64, bytes) != 0) throw std::bad_alloc();
  return p;
}

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
  static const Host host{parallel, threads, allocate, std::free};
  return host;
}

}  // namespace a3fta::cpu

STABLE_TORCH_LIBRARY_IMPL(a3fta_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_capabilities", TORCH_BOX(&a3fta::cpu::cpu_capabilities));
  m.impl("cpu_capability", TORCH_BOX(&a3fta::cpu::cpu_capability));
  m.impl("set_cpu_capability", TORCH_BOX(&a3fta::cpu::set_cpu_capability));
}
