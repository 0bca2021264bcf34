// The Gaussian denoising step on the GPU, defined in `ddpo_fast/ops/gaussian.py`. A block computes a whole image.
//
// Sampling and training must compute the same log-prob in every bit for the same UNet output, so that ratios are
// exactly 1 while the policy has not changed. Both call these functions, with the same number of threads and the same
// order of sums. The compiler may not fuse products and sums by itself (--fmad=false); the code calls `__fmaf_rn`
// explicitly.
#pragma once

#include "common.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace ddpo_fast {

constexpr int THREADS = 512;
constexpr float LOG_SQRT_2PI = 0.9189385332046727f;

// `Rows` and the guidance scale, in a struct that is passed to kernels by value
struct Layout {
  int64_t images;
  int64_t elements;
  int64_t channels;
  int64_t pixels;
  bool channels_last;
  bool guided;
  float guidance;
};

inline Layout layout_of(const Rows& rows, std::optional<double> guidance_scale) {
  return {
      rows.images,
      rows.elements,
      rows.channels,
      rows.pixels,
      rows.channels_last,
      rows.guided,
      static_cast<float>(guidance_scale.value_or(1.0))};
}

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch() {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "the launch failed: ", cudaGetErrorString(error));
}

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline void from_float(float value, float* out) { *out = value; }
__device__ inline void from_float(float value, __half* out) { *out = __float2half_rn(value); }
__device__ inline void from_float(float value, __nv_bfloat16* out) { *out = __float2bfloat16_rn(value); }

// The alignment makes the compiler load and store four elements in one instruction.
template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T values[4];
};

// Calls f(d) for each group of four consecutive elements that this thread computes; d is the first of the four.
template <typename F>
__device__ void for_fours(int64_t elements, const F& f) {
  for (int64_t d = 4 * threadIdx.x; d < elements; d += 4 * THREADS) f(d);
}

// The offset in memory of element d of a channels_last or contiguous row, counted in NCHW order.
__device__ inline int64_t place(const Layout& layout, int64_t d) {
  return layout.channels_last ? (d % layout.pixels) * layout.channels + d / layout.pixels : d;
}

// Loads four consecutive elements of a row into fp32, zeros beyond the row's end. This is one instruction if the
// elements are adjacent in memory and every row is aligned, which a row length divisible by four ensures.
template <typename T>
__device__ void load_four(const T* row, const Layout& layout, bool strided, int64_t d, float out[4]) {
  if (!strided && layout.elements % 4 == 0) {
    const Four<T> loaded = *reinterpret_cast<const Four<T>*>(row + d);
#pragma unroll
    for (int j = 0; j < 4; ++j) out[j] = to_float(loaded.values[j]);
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j)
    out[j] = d + j < layout.elements ? to_float(row[strided ? place(layout, d + j) : d + j]) : 0.0f;
}

// Stores four elements to the place that `load_four` loads them from.
template <typename T>
__device__ void store_four(const float values[4], const Layout& layout, bool strided, int64_t d, T* row) {
  if (!strided && layout.elements % 4 == 0) {
    Four<T> stored;
#pragma unroll
    for (int j = 0; j < 4; ++j) from_float(values[j], &stored.values[j]);
    *reinterpret_cast<Four<T>*>(row + d) = stored;
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j)
    if (d + j < layout.elements) from_float(values[j], row + (strided ? place(layout, d + j) : d + j));
}

// Loads four elements of the model's output for an image. With guidance they are u + s (t - u), with the unconditional
// row u, the row t for the prompt, and the guidance scale s.
template <typename T>
__device__ void load_guided(const T* output, const Layout& layout, int64_t image, int64_t d, float out[4]) {
  load_four(output + image * layout.elements, layout, layout.channels_last, d, out);
  if (!layout.guided) return;
  float text[4];
  load_four(output + (image + layout.images) * layout.elements, layout, layout.channels_last, d, text);
#pragma unroll
  for (int j = 0; j < 4; ++j) out[j] = __fmaf_rn(layout.guidance, text[j] - out[j], out[j]);
}

// Stores the gradient of the model's output; `grad` is the gradient of the guided output.
template <typename T>
__device__ void store_guided(const float grad[4], const Layout& layout, int64_t image, int64_t d, T* output) {
  T* row = output + image * layout.elements;
  if (!layout.guided) return store_four(grad, layout, layout.channels_last, d, row);
  float uncond[4], text[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    uncond[j] = (1.0f - layout.guidance) * grad[j];
    text[j] = layout.guidance * grad[j];
  }
  store_four(uncond, layout, layout.channels_last, d, row);
  store_four(text, layout, layout.channels_last, d, row + layout.images * layout.elements);
}

struct Coefficients {
  float c_x;
  float c_m;
  float sigma;
  float credit;
};

__device__ inline Coefficients coefficients(const float* table, const int64_t* timesteps, bool per_image) {
  const float* entry = table + timesteps[per_image ? blockIdx.x : 0] * 4;
  return {entry[0], entry[1], entry[2], entry[3]};
}

// Replaces the model's output in `mean` by the step's mean, c_m * output + c_x * latents.
__device__ inline void mean_four(const Coefficients& c, const float latents[4], float mean[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) mean[j] = __fmaf_rn(c.c_m, mean[j], c.c_x * latents[j]);
}

// The sum over the block's threads, returned to each of them. The order is the same in every launch: a butterfly
// reduction within each warp, then every thread adds the sums of all warps in order.
__device__ inline float block_sum(float value) {
  __shared__ float warps[THREADS / 32];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  // wait for threads that may still read the warps' sums of an earlier call
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0;
  for (int warp = 0; warp < THREADS / 32; ++warp) sum += warps[warp];
  return sum;
}

__device__ inline float log_density(float sum_of_squares, int64_t elements, float sigma) {
  return -(sum_of_squares / static_cast<float>(elements)) / (2.0f * sigma * sigma) - logf(sigma) - LOG_SQRT_2PI;
}

// Calls f with a null pointer to the CUDA type of the tensor's elements. f uses only the type of its argument.
template <typename F>
void for_cuda_type(const Tensor& tensor, const F& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return f(static_cast<float*>(nullptr));
    case ScalarType::Half:
      return f(static_cast<__half*>(nullptr));
    case ScalarType::BFloat16:
      return f(static_cast<__nv_bfloat16*>(nullptr));
    default:
      STD_TORCH_CHECK(false, "model_output must be float32, float16 or bfloat16");
  }
}

}  // namespace ddpo_fast
