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
using OptionalTensor = std::optional<Tensor>;

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
    const char* name, const OptionalTensor& x, std::initializer_list<int64_t> shape,
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
    const OptionalTensor& gamma, const OptionalTensor& beta, int64_t rows, int64_t rank,
    const Tensor& like) {
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

// a parameter (C,) of a normalisation, in x's dtype or wide
inline void check_parameter(
    const char* name, const OptionalTensor& p, int64_t channels, const Tensor& x) {
  if (!p.has_value()) return;
  check_shape(name, *p, {channels});
  check_contiguous(name, *p);
  STD_TORCH_CHECK(
      p->scalar_type() == x.scalar_type() || p->scalar_type() == wide(x), name,
      ": expected the dtype of x, or that of its sums");
  STD_TORCH_CHECK(
      p->is_cuda() == x.is_cuda() && p->get_device_index() == x.get_device_index(), name,
      ": expected the device of x");
}

// mean and rstd of this shape, in the dtype of the sums
inline void check_statistics(
    const Tensor& mean, const Tensor& rstd, std::initializer_list<int64_t> shape, const Tensor& x) {
  for (const Tensor* t : {&mean, &rstd}) {
    const char* name = t == &mean ? "mean" : "rstd";
    check_shape(name, *t, shape);
    check_contiguous(name, *t);
    STD_TORCH_CHECK(t->scalar_type() == wide(x), name, ": expected the dtype of x's sums");
    STD_TORCH_CHECK(
        t->is_cuda() == x.is_cuda() && t->get_device_index() == x.get_device_index(), name,
        ": expected the device of x");
  }
}

// x (B, C, S) of group_norm
inline void check_groups(const Tensor& x, int64_t groups, int64_t activation) {
  STD_TORCH_CHECK(x.dim() == 3, "x: expected shape (B, C, S), got ", shape_text(x));
  STD_TORCH_CHECK(
      groups > 0 && x.size(1) > 0 && x.size(1) % groups == 0,
      "groups: expected a divisor of x's ", x.size(1), " channels, got ", groups);
  STD_TORCH_CHECK(
      activation == kIdentity || activation == kSilu,
      "activation: expected identity or silu, got ", activation);
}

// whether the channels of x (B, C, S) are neighbours; refuses what is neither that nor contiguous
inline bool channels_last(const char* name, const Tensor& x) {
  const int64_t c = x.size(1), s = x.size(2);
  if (x.numel() == 0) return false;
  const bool samples = x.size(0) == 1 || x.stride(0) == c * s;
  // of one position either layout is both: the kernels for channels last have the longer rows
  const bool last = (c == 1 || x.stride(1) == 1) && (s == 1 || x.stride(2) == c);
  const bool first = (c == 1 || x.stride(1) == s) && (s == 1 || x.stride(2) == 1);
  STD_TORCH_CHECK(
      samples && (last || first), name,
      ": expected a contiguous tensor or one with channels last, got shape ", shape_text(x));
  return last && !(first && s > 1);
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
