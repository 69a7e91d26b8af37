// The 16-byte accesses of device memory, and the emulator's switches, for Python.
#include <algorithm>
#include <climits>
#include <unordered_map>

#include "emulator.h"

namespace emulator {
namespace {

struct Traffic {
  long reads = 0, writes = 0;
};
std::unordered_map<uintptr_t, Traffic> traffic;  // by address / 16
bool counting = false;

}  // namespace

void count_read(const void* from) {
  if (counting) ++traffic[reinterpret_cast<uintptr_t>(from) / 16].reads;
}
void count_written(const void* to) {
  if (counting) ++traffic[reinterpret_cast<uintptr_t>(to) / 16].writes;
}

}  // namespace emulator

extern "C" void emulator_use_chip(int capability, int processors, int shared_block,
                                  int shared_processor) {
  emulator::use_chip({capability, processors, shared_block, shared_processor});
}

extern "C" void emulator_count(bool on) {
  emulator::counting = on;
  emulator::traffic.clear();
}

// The fewest and the most times that a 16-byte vector of the buffer was read and written.
extern "C" void emulator_traffic(const char* data, long bytes, long* found) {
  found[0] = found[2] = LONG_MAX;
  found[1] = found[3] = 0;
  for (long i = 0; i < bytes; i += 16) {
    const auto at = emulator::traffic.find(reinterpret_cast<uintptr_t>(data + i) / 16);
    const emulator::Traffic t = at == emulator::traffic.end() ? emulator::Traffic{} : at->second;
    found[0] = std::min(found[0], t.reads);
    found[1] = std::max(found[1], t.reads);
    found[2] = std::min(found[2], t.writes);
    found[3] = std::max(found[3], t.writes);
  }
}
