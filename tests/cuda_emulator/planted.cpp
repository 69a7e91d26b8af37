#include "planted.h"

#include <cstring>

#include "../../csrc/cuda/launch.h"
#include "../../csrc/cuda/mma.cuh"
#include "emulator.h"

using namespace a3fta::cuda;

namespace {

__nv_bfloat16* tile() { return reinterpret_cast<__nv_bfloat16*>(shared_memory()); }

// a neighbour's element without a barrier; the last thread's lies past the end
void neighbour(float* out) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  shared[4 * threadIdx.x] = 1.0f;
  *out = shared[4 * threadIdx.x + 4];
}

// each warp's matrices are written by the other one
void matrices(float* out) {
  const int row = static_cast<int>(threadIdx.x) ^ 32;
  for (int i = 0; i < 8; ++i) tile()[row * 8 + i].bits = 0;
  uint32_t r[4];
  ldmatrix(r, tile() + threadIdx.x * 8);
  if (threadIdx.x == 0) *out = static_cast<float>(r[0]);
}

// the copy of a lane is waited for by the lane alone, not by the warp that reads it
void copies(const void* from) {
  copy16(tile() + threadIdx.x * 8, from, true);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  uint32_t r[4];
  ldmatrix(r, tile() + (threadIdx.x ^ 32) * 8);
}

void lanes(float* out) {
  float d[4] = {};
  const uint32_t a[4] = {};
  if (threadIdx.x != 3) mma<__nv_bfloat16>(d, a, 0, 0);
  if (threadIdx.x == 0) *out = d[0];
}

void unwaited(const void* from) { copy16(tile() + threadIdx.x * 8, from, true); }

// a block's word is read by its neighbour before the cluster's barrier
void remote(float* out) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  shared[threadIdx.x] = 1.0f;
  const float found = *map_shared(shared + threadIdx.x, cluster_rank() ^ 1);
  cluster_arrive();
  cluster_wait();
  if (threadIdx.x == 0 && cluster_rank() == 0) *out = found;
}

void remote_end(float* out) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  *out = *map_shared(shared + 64 * 4, cluster_rank() ^ 1);
}

void half_a_barrier(float*) {
  if (cluster_rank() == 0) return;
  cluster_arrive();
  cluster_wait();
}

void arrival(float*) { cluster_arrive(); }

uint64_t* box() { return reinterpret_cast<uint64_t*>(shared_memory()); }
void* letter() { return shared_memory() + 8 + 8 * threadIdx.x; }

void set_up(int bytes) {
  if (threadIdx.x == 0) {
    mailbox_set_up(box());
    mailbox_expect(box(), bytes);
  }
  cluster_arrive();
  cluster_wait();
}

// what the neighbour sends is read without waiting for it
void unread(float* out) {
  set_up(64 * 8);
  send8(letter(), {1, 2}, box(), cluster_rank() ^ 1);
  cluster_arrive();
  if (threadIdx.x == 0 && cluster_rank() == 1) *out = *static_cast<float*>(letter());
  cluster_wait();
}

void lost(float* out) {
  set_up(64 * 8 + 8);
  send8(letter(), {1, 2}, box(), cluster_rank() ^ 1);
  mailbox_wait(box(), 0);
  if (threadIdx.x == 0 && cluster_rank() == 0) *out = *static_cast<float*>(letter());
}

}  // namespace

void run_planted(const char* name) {
  static float word[4] = {};
  const auto run = [&](const char* kernel_name, auto kernel, int cluster) {
    if (std::strcmp(name, kernel_name) != 0) return;
    Grid grid{};
    grid.x = cluster;
    grid.threads = 64;
    grid.shared_bytes = 64 * 16;
    grid.cluster = cluster;
    launch(kernel_name, kernel, grid, nullptr, word);
  };
  run("neighbour", neighbour, 1);
  run("matrices", matrices, 1);
  run("copies", copies, 1);
  run("lanes", lanes, 1);
  run("unwaited", unwaited, 1);
  run("remote", remote, 2);
  run("remote_end", remote_end, 2);
  run("half_a_barrier", half_a_barrier, 2);
  run("arrival", arrival, 2);
  emulator::deliver_late(false);
  run("unread", unread, 2);
  run("lost", lost, 2);
}
