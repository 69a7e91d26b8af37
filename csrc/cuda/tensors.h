// From torch tensors (stable ABI) to what the launchers take.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include "launch.h"

// torch exports this where it has CUDA; weak, so that the library loads without
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

// the emulator's tests register the same functions for CPU tensors
#ifndef A3FTA_CUDA_KEY
#define A3FTA_CUDA_KEY CUDA
#endif

namespace a3fta::cuda {

#pragma GCC visibility push(hidden)

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// What all arguments of one call share with its first tensor. Makes that tensor's device current.
class Call {
 public:
  explicit Call(const Tensor& like)
      : like_(like), device_(like.get_device_index()), guard_(device_) {
    // torch's guard speaks to torch's copy of the CUDA runtime; this library has its own
    check(cudaSetDevice(device_), "cudaSetDevice");
    switch (like.scalar_type()) {
      case ScalarType::Float:
        dtype_ = DType::fp32;
        break;
      case ScalarType::Half:
        dtype_ = DType::fp16;
        break;
      case ScalarType::BFloat16:
        dtype_ = DType::bf16;
        break;
      default:
        STD_TORCH_CHECK(false, "the CUDA kernels compute in fp32, fp16 or bf16");
    }
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                    "this build of torch has no CUDA streams");
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream) == 0,
                    "no current CUDA stream");
    stream_ = static_cast<cudaStream_t>(stream);
  }

  DType dtype() const { return dtype_; }
  cudaStream_t stream() const { return stream_; }

  Tensor empty(int64_t rows, int64_t cols) const {
    return torch::stable::new_empty(like_, {rows, cols});
  }
  Tensor wide(int64_t rows, int64_t cols) const {
    return torch::stable::new_empty(like_, {rows, cols}, ScalarType::Float);
  }
  Tensor wide(int64_t size) const {
    return torch::stable::new_empty(like_, {size}, ScalarType::Float);
  }
  Tensor none() const { return torch::stable::new_empty(like_, {0}, ScalarType::Float); }

  Matrix matrix(const char* name, const Tensor& t, int64_t rows, int64_t cols) const {
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols, name,
                    ": expected shape (", rows, ", ", cols, "), got ", describe(t));
    STD_TORCH_CHECK(cols <= 1 || rows == 0 || t.stride(1) == 1, name,
                    ": expected unit column stride, got ", t.stride(1));
    same(name, t);
    return {t.data_ptr(), rows, cols, t.stride(0)};
  }
  Matrix matrix(const char* name, const OptionalTensor& t, int64_t rows, int64_t cols) const {
    return t.has_value() ? matrix(name, *t, rows, cols) : Matrix{};
  }

  // the data of a contiguous tensor of this shape
  void* dense(const char* name, const Tensor& t, std::initializer_list<int64_t> shape) const {
    bool fits = t.dim() == static_cast<int64_t>(shape.size()) && t.is_contiguous();
    std::string expected;
    int64_t i = 0;
    for (const int64_t n : shape) {
      fits = fits && t.size(i++) == n;
      expected += (expected.empty() ? "" : ", ") + std::to_string(n);
    }
    STD_TORCH_CHECK(fits, name, ": expected a contiguous (", expected, ") tensor, got ",
                    describe(t));
    STD_TORCH_CHECK(t.get_device_index() == device_, name, ": expected device ", device_,
                    ", got ", t.get_device_index());
    return t.data_ptr();
  }

  Vector vector(const char* name, const OptionalTensor& t, int64_t size) const {
    if (!t.has_value()) return {};
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == size && t->is_contiguous(), name,
                    ": expected a contiguous vector of ", size, ", got ", describe(*t));
    const bool wide = t->scalar_type() == ScalarType::Float;
    if (!wide) same(name, *t);
    STD_TORCH_CHECK(t->get_device_index() == device_, name, ": expected device ", device_,
                    ", got ", t->get_device_index());
    return {t->data_ptr(), wide};
  }

  Modulation modulation(const OptionalTensor& gamma, const OptionalTensor& beta, int64_t rows,
                        int64_t rank) const {
    Modulation result;
    result.gamma = per_sample("gamma", gamma, rows, rank, result);
    result.beta = per_sample("beta", beta, rows, rank, result);
    return result;
  }

  void same(const char* name, const Tensor& t) const {
    STD_TORCH_CHECK(t.scalar_type() == like_.scalar_type(), name,
                    ": expected the dtype of the first tensor, ",
                    torch::headeronly::toString(like_.scalar_type()), ", got ",
                    torch::headeronly::toString(t.scalar_type()));
    STD_TORCH_CHECK(t.get_device_index() == device_, name, ": expected device ", device_,
                    ", got ", t.get_device_index());
  }

 private:
  const void* per_sample(const char* name, const OptionalTensor& t, int64_t rows, int64_t rank,
                         Modulation& result) const {
    if (!t.has_value()) return nullptr;
    STD_TORCH_CHECK(t->dim() == 2 && t->size(1) == rank && t->is_contiguous(), name,
                    ": expected a contiguous (B, ", rank, ") tensor, got ", describe(*t));
    const int64_t samples = t->size(0);
    STD_TORCH_CHECK(samples == 0 ? rows == 0 : rows % samples == 0, name, ": its ", samples,
                    " samples do not divide ", rows, " rows");
    if (rows > 0) result.rows_per_sample = rows / samples;
    same(name, *t);
    return t->data_ptr();
  }

  static std::string describe(const Tensor& t) {
    std::string text = "(";
    for (int64_t i = 0; i < t.dim(); ++i) {
      text += (i > 0 ? ", " : "") + std::to_string(t.size(i));
    }
    return text + ")";
  }

  Tensor like_;
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  DType dtype_ = DType::fp32;
  cudaStream_t stream_ = nullptr;
};

// A freshly made contiguous (rows, cols) tensor, or an absent one.
inline Matrix whole(const Tensor& t) { return {t.data_ptr(), t.size(0), t.size(1), t.size(1)}; }

// columns begin .. begin + count
inline Matrix columns(const Matrix& m, int64_t begin, int64_t count, DType dtype) {
  const int64_t size = dtype == DType::fp32 ? 4 : 2;
  return {static_cast<char*>(m.data) + begin * size, m.rows, count, m.stride};
}

// left.T @ right and the column sums of left, in fp32
struct RowProductResult {
  Tensor product;  // (N, R)
  Tensor sums;     // (N,)
};
RowProductResult row_product(const Call& call, const Matrix& left, const Matrix& right);

// The backward of the bottleneck and of what feeds on it; tensors not asked for are empty.
struct BottleneckGradients {
  Tensor da;               // (M, R): where h is absent
  RowProductResult up;     // dy.T @ z, column sums of dy
  RowProductResult down;   // da.T @ h, column sums of da: where h is given
  Tensor dgamma, dbeta;    // (B, R)
};
// `h`: (M, C) or absent. `dh`: (M, N) out = dy + da @ w_down, together with w_down, or absent
BottleneckGradients bottleneck_gradients(const Call& call, const Matrix& dy, const Matrix& h,
                                         const Matrix& a, const Matrix& w_up,
                                         const OptionalTensor& gamma, const OptionalTensor& beta,
                                         int64_t activation, bool need_dw, const Matrix& w_down,
                                         const Matrix& dh);

#pragma GCC visibility pop

}  // namespace a3fta::cuda
