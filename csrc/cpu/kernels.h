// What the CPU kernels look like from outside. kernels.cpp is compiled once per instruction set;
// each build exports one table of this type, and runtime.cpp picks one when the library loads.
//
// No torch and no standard C++ headers here or in kernels.cpp: an inline function compiled for
// one instruction set must not be merged with that of another.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace a3fta::cpu {

enum DType : int { kFloat64 = 0, kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3 };
constexpr int kDTypes = 4;

struct Host {
  // calls work(ctx, worker) for worker = 0 .. workers - 1, at once
  void (*parallel)(int64_t workers, void (*work)(void* ctx, int64_t worker), void* ctx);
  int64_t (*threads)();
  void* (*allocate)(size_t bytes);  // aligned to a cache line; throws
  void (*release)(void*);
};

struct Matrix {  // unit column stride
  void* data = nullptr;
  int64_t stride = 0;
};

// (1 + gamma) and beta, one row per sample
struct Modulation {
  const void* gamma = nullptr;  // (samples, R) or null, contiguous
  const void* beta = nullptr;
  int64_t samples = 1;
};

// a = h @ w_down.T + b_down, z = act(a) * (1 + gamma) + beta, and, where y is given,
// y = h + z @ w_up.T + b_up
struct ForwardArgs {
  int64_t rows, channels, rank;
  int activation;
  Matrix h, w_down, w_up;
  const void* b_down = nullptr;
  const void* b_up = nullptr;
  Modulation modulation;
  Matrix a, z, y;  // z, y: null where not wanted
};

// y_b = residual_b + scale[k] * (act(h_b @ w_down[k].T + b_down[k]) @ w_up[k].T + b_up[k]) for each
// sample b of rows / samples rows, k = index[b]; y_b = residual_b where k is -1
struct BankArgs {
  int64_t rows, channels, rank, samples, adapters;
  int activation;
  Matrix h, residual;
  const void *w_down, *w_up;  // (adapters, R, C), (adapters, C, R)
  const void* b_down = nullptr;  // (adapters, R)
  const void* b_up = nullptr;    // (adapters, C)
  const void* scale;             // (adapters,) in the accumulation dtype
  const int32_t* index;          // (samples,), -1 or below `adapters`
  Matrix y;
};

// out = residual + bias + x @ w.T (w: (columns, rank)) or x @ w (w: (rank, columns))
struct UpArgs {
  int64_t rows, columns, rank;
  Matrix x, w;
  bool transposed;  // w is (columns, rank)
  const void* bias = nullptr;
  bool bias_wide = false;  // bias is in the accumulation dtype
  Matrix residual, out;    // residual: null or (rows, columns), may be out
};

// dz = dy @ w_up, da = dz (1 + gamma) act'(a), z = act(a) (1 + gamma) + beta; then what is asked:
// dh = dy + da @ w_down, dw_down = da.T @ h, g_up = dy.T @ z, and the sums over rows
struct BackwardArgs {
  int64_t rows, channels, rank;
  int activation;
  Matrix dy, h, a, w_down, w_up;  // h: null without dw_down; w_down: null without dh
  Modulation modulation;
  Matrix da, dh;  // each may be null
  // in the accumulation dtype, contiguous; null where not wanted
  void* dw_down = nullptr;  // (R, C)
  void* g_up = nullptr;     // (C, R)
  void* da_sum = nullptr;   // (R,)
  void* dy_sum = nullptr;   // (C,)
  void* dgamma = nullptr;   // (samples, R), zeroed
  void* dbeta = nullptr;
};

// dw_down = da.T @ h and da_sum = sum(da)
struct OuterArgs {
  int64_t rows, channels, rank;
  Matrix da, h;
  void* dw_down;  // (R, C)
  void* da_sum;   // (R,)
};

// y = hidden * act(gate), dp = [dy * act(gate) | dy * hidden * act'(gate)]; p = [hidden | gate]
struct GegluArgs {
  int64_t rows, width;  // width: F, half the columns of p
  int activation;
  Matrix p, dy, out;  // dy: null in the forward; out: y or dp
};

constexpr int kQuantizeBlock = 128;

struct QuantizeArgs {
  int64_t count;
  const void* x;
  int8_t* codes;
  void* ranges;  // (blocks, 2) bf16: mid, half
};

struct DequantizeArgs {
  int64_t count;
  const int8_t* codes;
  const void* ranges;
  void* x;
};

// weight and bias (C,), each null, in the tensors' dtype, or wide: in the accumulation dtype
struct Affine {
  const void* weight = nullptr;
  const void* bias = nullptr;
  bool weight_wide = false, bias_wide = false;
};

// y = act(weight * xhat + bias); with dy, dx
struct GroupNormArgs {
  int64_t samples, channels, positions, groups;
  bool last;       // strides (C * S, 1, C), else contiguous
  int activation;  // identity or silu
  double eps;
  Affine affine;
  const void *x, *dy;
  void *mean, *rstd;  // (samples, groups) in the accumulation dtype: results of the forward
  void* out;          // y or dx
};

struct LayerNormArgs {
  int64_t rows, channels;
  double eps;
  Affine affine;
  Matrix x, dy;
  void *mean, *rstd;  // (rows,)
  void* out;          // contiguous
};

struct Kernels {
  const char* name;
  void (*forward[kDTypes])(const Host&, const ForwardArgs&);
  void (*bank[kDTypes])(const Host&, const BankArgs&);
  void (*up[kDTypes])(const Host&, const UpArgs&);
  void (*backward[kDTypes])(const Host&, const BackwardArgs&);
  void (*outer[kDTypes])(const Host&, const OuterArgs&);
  void (*geglu_forward[kDTypes])(const Host&, const GegluArgs&);
  void (*geglu_backward[kDTypes])(const Host&, const GegluArgs&);
  void (*quantize[kDTypes])(const Host&, const QuantizeArgs&);
  void (*dequantize[kDTypes])(const Host&, const DequantizeArgs&);
  void (*group_norm_forward[kDTypes])(const Host&, const GroupNormArgs&);
  void (*group_norm_backward[kDTypes])(const Host&, const GroupNormArgs&);
  void (*layer_norm_forward[kDTypes])(const Host&, const LayerNormArgs&);
  void (*layer_norm_backward[kDTypes])(const Host&, const LayerNormArgs&);
};

}  // namespace a3fta::cpu
