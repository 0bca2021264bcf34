// Checks and descriptions of tensors that all ops share. B images, D elements of an image, K rows of the table.
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
#define CHECK_LATENTS(tensor, like)                                                              \
  do {                                                                                           \
    CHECK_DTYPE(tensor, Float);                                                                  \
    CHECK_CONTIGUOUS(tensor);                                                                    \
    STD_TORCH_CHECK((tensor).numel() == (like).numel(), #tensor " must be as large as latents"); \
  } while (false)

// The memory layout of the UNet's output: contiguous or channels_last. Latents are always contiguous; ops number the
// elements of both in NCHW order. With guidance there are two rows for each image: first the unconditional outputs of
// all images, then the outputs for their prompts.
struct Rows {
  int64_t images;
  int64_t elements;
  int64_t channels;
  int64_t pixels;
  bool channels_last;
  bool guided;

  int64_t rows() const { return guided ? 2 * images : images; }
};

inline Rows rows_of(const Tensor& model_output, const Tensor& latents, bool guided) {
  Rows rows{latents.size(0), 0, 1, 1, false, guided};
  STD_TORCH_CHECK(
      model_output.dim() == latents.dim() && model_output.size(0) == rows.rows(), "model_output must have ",
      rows.rows(), " rows but has ", model_output.size(0));
  rows.elements = 1;
  for (int64_t i = 1; i < latents.dim(); ++i) {
    STD_TORCH_CHECK(model_output.size(i) == latents.size(i), "model_output and latents must have images of one shape");
    rows.elements *= latents.size(i);
  }
  rows.channels_last = !model_output.is_contiguous();
  if (rows.channels_last) {
    STD_TORCH_CHECK(
        model_output.dim() == 4 && model_output.stride(1) == 1 && model_output.stride(3) == model_output.size(1),
        "model_output must be contiguous or channels_last");
    rows.channels = model_output.size(1);
    rows.pixels = model_output.size(2) * model_output.size(3);
  }
  return rows;
}

inline void check_same_rows(const char* name, const Tensor& tensor, const Tensor& model_output) {
  STD_TORCH_CHECK(
      tensor.numel() == model_output.numel() && tensor.scalar_type() == model_output.scalar_type() &&
          (tensor.is_contiguous() == model_output.is_contiguous()),
      name, " must have the shape, dtype and layout of model_output");
}

inline void check_step(const Tensor& latents, const Tensor& table, const Tensor& timesteps) {
  CHECK_DTYPE(latents, Float);
  CHECK_CONTIGUOUS(latents);
  CHECK_DTYPE(table, Float);
  CHECK_CONTIGUOUS(table);
  CHECK_SHAPE(table, table.size(0), 4);
  CHECK_DTYPE(timesteps, Long);
  CHECK_CONTIGUOUS(timesteps);
  if (timesteps.dim() > 0) CHECK_SHAPE(timesteps, latents.size(0));
}

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
