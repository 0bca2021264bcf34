// Checks and descriptions of tensors that all ops share.
//
// The code uses only torch's stable ABI (torch/csrc/stable and torch/headeronly), so one library works with torch 2.11
// and later versions.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>

namespace ddpo_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Half = torch::headeronly::Half;
using BFloat16 = torch::headeronly::BFloat16;

inline void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t i = 0;
  for (int64_t size : shape) same = same && tensor.size(i++) == size;
  if (same) return;
  std::ostringstream message;
  message << name << " must have shape (";
  for (int64_t size : shape) message << size << ",";
  message << ") but has (";
  for (i = 0; i < tensor.dim(); ++i) message << tensor.size(i) << ",";
  message << ")";
  STD_TORCH_CHECK(false, message.str());
}

#define CHECK_SHAPE(tensor, ...) ::ddpo_fast::check_shape(#tensor, tensor, {__VA_ARGS__})
#define CHECK_CONTIGUOUS(tensor) STD_TORCH_CHECK((tensor).is_contiguous(), #tensor " must be contiguous")
#define CHECK_DTYPE(tensor, dtype) \
  STD_TORCH_CHECK((tensor).scalar_type() == ScalarType::dtype, #tensor " must have dtype " #dtype)
// Whether a tensor's channels are consecutive in memory, and its pixels and images follow in their order.
inline bool is_channels_last(const Tensor& x) {
  int64_t expected = 1;
  bool all = true;
  const auto follows = [&](int64_t i) {
    // the stride of a dimension of size 1 has no meaning
    all = all && (x.size(i) == 1 || x.stride(i) == expected);
    expected *= x.size(i);
  };
  follows(1);
  for (int64_t i = x.dim() - 1; i > 1; --i) follows(i);
  follows(0);
  return all;
}

inline void check_like(const char* name, const Tensor& tensor, const Tensor& x) {
  bool same = tensor.dim() == x.dim() && tensor.scalar_type() == x.scalar_type();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = tensor.size(i) == x.size(i);
  same = same && (x.is_contiguous() ? tensor.is_contiguous() : is_channels_last(tensor));
  STD_TORCH_CHECK(same, name, " must have the shape, dtype and layout of x");
}

// Calls f with a zero of the C++ type of the tensor's elements. f uses only the type of its argument.
template <typename F>
void for_dtype(const Tensor& tensor, const F& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Half:
      return f(Half{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    default:
      STD_TORCH_CHECK(false, "a tensor must be float32, float16 or bfloat16");
  }
}

}  // namespace ddpo_fast
