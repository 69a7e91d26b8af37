// Argument checks of the compiled library. The Python side has checked what users pass; these hold
// the line between Python and the kernels, so that no wrong call reads outside its tensors.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "math.h"

namespace a3fta {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_text(const Tensor& x) {
  std::ostringstream text;
  text << "(";
  for (int64_t i = 0; i < x.dim(); ++i) text << (i > 0 ? ", " : "") << x.size(i);
  text << ")";
  return text.str();
}

inline void check_shape(const char* name, const Tensor& x, std::initializer_list<int64_t> shape) {
  bool same = x.dim() == int64_t(shape.size());
  int64_t i = 0;
  std::ostringstream expected;
  for (int64_t n : shape) {
    same = same && x.size(i) == n;
    expected << (i++ > 0 ? ", " : "") << n;
  }
  STD_TORCH_CHECK(
      same, name, ": expected shape (", expected.str(), "), got ", shape_text(x));
}

inline void check_matrix(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2, name, ": expected a matrix, got shape ", shape_text(x));
}

// a row stride that holds also where a matrix has one row, or none
inline int64_t row_stride(const Tensor& x) { return x.size(0) > 1 ? x.stride(0) : x.size(1); }

// unit column stride, rows that do not overlap
inline void check_rows(const char* name, const Tensor& x) {
  check_matrix(name, x);
  const bool dense = x.size(1) == 1 || x.stride(1) == 1;
  STD_TORCH_CHECK(
      x.numel() == 0 || (dense && row_stride(x) >= x.size(1)), name,
      ": expected unit column stride and rows apart, got strides (", x.stride(0), ", ",
      x.stride(1), ") for shape ", shape_text(x));
}

inline void check_contiguous(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.is_contiguous(), name, ": expected a contiguous tensor");
}

inline void check_like(const char* name, const Tensor& x, const Tensor& like) {
  STD_TORCH_CHECK(
      x.scalar_type() == like.scalar_type(), name, ": expected the dtype of the first argument");
  STD_TORCH_CHECK(
      x.is_cuda() == like.is_cuda() && x.get_device_index() == like.get_device_index(), name,
      ": expected the device of the first argument");
}

// a contiguous matrix or vector of this shape, of the dtype and device of `like`
inline void check_dense(
    const char* name, const Tensor& x, std::initializer_list<int64_t> shape, const Tensor& like) {
  check_shape(name, x, shape);
  check_contiguous(name, x);
  check_like(name, x, like);
}

inline void check_dense(
    const char* name, const std::optional<Tensor>& x, std::initializer_list<int64_t> shape,
    const Tensor& like) {
  if (x.has_value()) check_dense(name, *x, shape, like);
}

inline void check_activation(int64_t activation) {
  STD_TORCH_CHECK(
      activation >= 0 && activation < kActivations, "activation: expected 0 to ",
      kActivations - 1, ", got ", activation);
}

// gamma and beta (B, R), where B divides the rows
inline void check_modulation(
    const std::optional<Tensor>& gamma, const std::optional<Tensor>& beta, int64_t rows,
    int64_t rank, const Tensor& like) {
  for (const auto* x : {&gamma, &beta}) {
    if (!x->has_value()) continue;
    const char* name = x == &gamma ? "gamma" : "beta";
    check_matrix(name, **x);
    const int64_t samples = (*x)->size(0);
    check_dense(name, **x, {samples, rank}, like);
    STD_TORCH_CHECK(
        samples > 0 ? rows % samples == 0 : rows == 0, name, ": expected a number of samples ",
        "that divides the ", rows, " rows, got ", samples);
  }
  STD_TORCH_CHECK(
      !gamma.has_value() || !beta.has_value() || gamma->size(0) == beta->size(0),
      "beta: expected as many samples as gamma has");
}

// 8-bit codes (n,) and their ranges, one for each 128 of them
constexpr int64_t kCodesPerRange = 128;
inline int64_t range_count(int64_t codes) { return (codes + kCodesPerRange - 1) / kCodesPerRange; }

inline void check_quantized(const Tensor& codes, const Tensor& ranges) {
  check_shape("codes", codes, {codes.numel()});
  check_contiguous("codes", codes);
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Char, "codes: expected int8");
  check_shape("ranges", ranges, {range_count(codes.numel()), 2});
  check_contiguous("ranges", ranges);
  STD_TORCH_CHECK(ranges.scalar_type() == ScalarType::BFloat16, "ranges: expected bfloat16");
  STD_TORCH_CHECK(
      ranges.is_cuda() == codes.is_cuda() && ranges.get_device_index() == codes.get_device_index(),
      "ranges: expected the device of codes");
}

// the dtype that sums over rows are kept in
inline ScalarType wide(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor empty(const Tensor& like, std::vector<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

inline Tensor empty(const Tensor& like, std::vector<int64_t> shape) {
  return torch::stable::new_empty(like, shape, like.scalar_type());
}

inline Tensor zeros(const Tensor& like, std::vector<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_zeros(like, shape, dtype);
}

}  // namespace a3fta
