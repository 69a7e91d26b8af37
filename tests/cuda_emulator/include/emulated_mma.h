// The functions of csrc/cuda/mma.cuh for the emulator.
#pragma once

#include <cstdint>

#include "../emulator.h"

namespace a3fta::cuda {

// Lane i holds, in register j, elements 2 (i % 4) and the next of row i / 4 of the j-th 8 x 8
// matrix (of column i / 4 if transposed); lane 8 j + k brings the address of its row k.
struct MatrixLane {
  uint16_t row[8];
  uint32_t* registers;
};

// The scheduler runs these for the whole warp: registers of lanes are nobody's shared memory.
#define EMULATOR_REGISTERS __attribute__((no_sanitize("thread", "address")))

template <bool TRANSPOSED>
EMULATOR_REGISTERS void exchange_matrices(void* const* lanes) {
  for (int i = 0; i < emulator::kWarp; ++i) {
    for (int j = 0; j < 4; ++j) {
      uint32_t pair = 0;
      for (int half = 0; half < 2; ++half) {
        const int c = i % 4 * 2 + half;
        const int row = TRANSPOSED ? c : i / 4;
        const int col = TRANSPOSED ? i / 4 : c;
        const uint32_t bits = static_cast<MatrixLane*>(lanes[8 * j + row])->row[col];
        pair |= bits << 16 * half;
      }
      static_cast<MatrixLane*>(lanes[i])->registers[j] = pair;
    }
  }
}

template <bool TRANSPOSED>
void load_matrices(uint32_t (&r)[4], const void* row, int line) {
  emulator::require_aligned(row, 16);
  MatrixLane lane;
  std::memcpy(lane.row, row, 16);
  lane.registers = r;
  emulator::collective(exchange_matrices<TRANSPOSED>, &lane, line);
}

inline void ldmatrix(uint32_t (&r)[4], const void* row, int line = __builtin_LINE()) {
  load_matrices<false>(r, row, line);
}
inline void ldmatrix_trans(uint32_t (&r)[4], const void* row, int line = __builtin_LINE()) {
  load_matrices<true>(r, row, line);
}

struct ProductLane {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

template <typename T>
float half_of(uint32_t pair, int which) {
  return emulator::widen(T{static_cast<uint16_t>(pair >> 16 * which)});
}

template <typename T>
EMULATOR_REGISTERS void multiply_lanes(void* const* lanes) {
  float a[16][16], b[16][8];
  for (int i = 0; i < emulator::kWarp; ++i) {
    const ProductLane& lane = *static_cast<ProductLane*>(lanes[i]);
    for (int j = 0; j < 4; ++j) {
      for (int half = 0; half < 2; ++half) {
        const int col = i % 4 * 2 + half + 8 * (j / 2);
        a[i / 4 + 8 * (j % 2)][col] = half_of<T>(lane.a[j], half);
        if (j < 2) b[i % 4 * 2 + half + 8 * j][i / 4] = half_of<T>(lane.b[j], half);
      }
    }
  }
  for (int i = 0; i < emulator::kWarp; ++i) {
    float* d = static_cast<ProductLane*>(lanes[i])->d;
    for (int j = 0; j < 4; ++j) {
      float sum = d[j];
      for (int k = 0; k < 16; ++k) sum += a[i / 4 + 8 * (j / 2)][k] * b[k][i % 4 * 2 + j % 2];
      d[j] = sum;
    }
  }
}

template <typename T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
         int line = __builtin_LINE()) {
  ProductLane lane{d, a, {b0, b1}};
  emulator::collective(multiply_lanes<T>, &lane, line);
}

inline void copy16(void* to, const void* from, bool real) {
  emulator::require_aligned(to, 16);
  if (real) {
    emulator::require_aligned(from, 16);
    emulator::count_read(from);
  }
  emulator::copy_async(to, from, 16, real);
}

inline void store16(void* to, const void* from) {
  emulator::require_aligned(to, 16);
  emulator::require_aligned(from, 16);
  emulator::count_written(to);
  std::memcpy(to, from, 16);
}

template <typename P>
P read_pack(const P* from) {
  emulator::require_aligned(from, sizeof(P));
  emulator::count_read(from);
  return *from;
}
template <typename P>
void write_pack(P* to, const P& pack) {
  emulator::require_aligned(to, sizeof(P));
  emulator::count_written(to);
  *to = pack;
}

inline unsigned char* shared_memory() { return emulator::shared_memory(); }
inline unsigned cluster_rank() { return emulator::cluster_rank(); }
inline void cluster_arrive() { emulator::cluster_arrive(); }
inline void cluster_wait() { emulator::cluster_wait(); }
template <typename T>
T* map_shared(T* address, unsigned rank) {
  return static_cast<T*>(emulator::map_shared(address, rank));
}

inline void mailbox_set_up(uint64_t* box) { emulator::mailbox_set_up(box); }
inline void mailbox_expect(uint64_t* box, int bytes) { emulator::mailbox_expect(box, bytes); }
inline void mailbox_wait(uint64_t* box, int phase) { emulator::mailbox_wait(box, phase & 1); }
inline void send8(void* to, uint2 value, uint64_t* box, unsigned rank) {
  emulator::require_aligned(to, 8);
  void* const there = map_shared(static_cast<unsigned char*>(to), rank);
  // here, where the sanitizers see it
  if (!emulator::delivers_late()) std::memcpy(there, &value, 8);
  emulator::send(there, value, map_shared(box, rank));
}

}  // namespace a3fta::cuda
