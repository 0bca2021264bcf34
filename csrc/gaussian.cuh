// The Gaussian denoising step on the GPU: one block owns an image.
//
// Sampling and training share these functions and the order of the sum, and contraction is off but for explicit fused
// multiply-adds: both compute the same log-prob to the last bit.
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

// what a kernel needs to know of `Rows`, and the guidance scale
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

template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T values[4];
};

// Calls f(first element) for each group of up to four consecutive elements that this thread owns.
template <typename F>
__device__ void for_fours(int64_t elements, const F& f) {
  for (int64_t d = 4 * threadIdx.x; d < elements; d += 4 * THREADS) f(d);
}

__device__ inline int64_t place(const Layout& layout, int64_t d) {
  return layout.channels_last ? (d % layout.pixels) * layout.channels + d / layout.pixels : d;
}

// Four consecutive elements of a row in fp32, zeros beyond its end; in one transaction where they lie together.
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

template <typename T>
__device__ void load_guided(const T* output, const Layout& layout, int64_t image, int64_t d, float out[4]) {
  load_four(output + image * layout.elements, layout, layout.channels_last, d, out);
  if (!layout.guided) return;
  float text[4];
  load_four(output + (image + layout.images) * layout.elements, layout, layout.channels_last, d, text);
#pragma unroll
  for (int j = 0; j < 4; ++j) out[j] = __fmaf_rn(layout.guidance, text[j] - out[j], out[j]);
}

// The gradient to the model's output from that to the guided one: what `load_guided` combines.
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
};

__device__ inline Coefficients coefficients(const float* table, const int64_t* timesteps, bool per_image) {
  const float* entry = table + timesteps[per_image ? blockIdx.x : 0] * 3;
  return {entry[0], entry[1], entry[2]};
}

// The step's mean: the model's output goes in, the mean comes out.
__device__ inline void mean_four(const Coefficients& c, const float latents[4], float mean[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) mean[j] = __fmaf_rn(c.c_m, mean[j], c.c_x * latents[j]);
}

// Sum over the block, the same in every thread and in every launch.
__device__ inline float block_sum(float value) {
  __shared__ float warps[THREADS / 32];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  // the last sum may still be read
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

// Calls f with a null pointer to the CUDA type of the tensor's elements.
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
