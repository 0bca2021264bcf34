#include "gaussian.cuh"
#include "step_logprob.h"

namespace ddpo_fast {
namespace {

template <typename T>
__global__ void __launch_bounds__(THREADS) step_logprob_fwd_kernel(
    const T* output,
    const float* latents,
    const float* noise,
    const float* table,
    const int64_t* timesteps,
    bool per_image,
    Layout layout,
    float* next_latents,
    float* log_probs,
    T* next_input) {
  const int64_t image = blockIdx.x;
  const int64_t row = image * layout.elements;
  const Coefficients c = coefficients(table, timesteps, per_image);
  float squares = 0;
  for_fours(layout.elements, [&](int64_t d) {
    float mean[4], x[4], z[4], following[4];
    load_guided(output, layout, image, d, mean);
    load_four(latents + row, layout, false, d, x);
    load_four(noise + row, layout, false, d, z);
    mean_four(c, x, mean);
#pragma unroll
    for (int j = 0; j < 4; ++j) following[j] = __fmaf_rn(c.sigma, z[j], mean[j]);
    store_four(following, layout, false, d, next_latents + row);
    store_four(following, layout, layout.channels_last, d, next_input + row);
    if (layout.guided)
      store_four(following, layout, layout.channels_last, d, next_input + row + layout.images * layout.elements);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      // The log-prob is that of the stored latents. `following` is rounded, so this is not exactly sigma * noise.
      const float difference = following[j] - mean[j];
      squares = __fmaf_rn(difference, difference, squares);
    }
  });
  squares = block_sum(squares);
  if (threadIdx.x == 0) log_probs[image] = log_density(squares, layout.elements, c.sigma);
}

template <typename T>
__global__ void __launch_bounds__(THREADS) step_logprob_bwd_kernel(
    const T* output,
    const float* latents,
    const float* next_latents,
    const float* table,
    const int64_t* timesteps,
    bool per_image,
    Layout layout,
    const float* grad_next_latents,
    const float* grad_log_probs,
    const T* grad_next_input,
    T* grad_output,
    float* grad_latents) {
  const int64_t image = blockIdx.x;
  const int64_t row = image * layout.elements;
  const int64_t text_row = row + layout.images * layout.elements;
  const Coefficients c = coefficients(table, timesteps, per_image);
  // d log_prob / d mean = difference / (sigma^2 D), at fixed next latents
  const float slope = grad_log_probs[image] / (c.sigma * c.sigma * static_cast<float>(layout.elements));
  for_fours(layout.elements, [&](int64_t d) {
    float mean[4], x[4], following[4], grad[4], uncond[4], text[4] = {};
    load_guided(output, layout, image, d, mean);
    load_four(latents + row, layout, false, d, x);
    load_four(next_latents + row, layout, false, d, following);
    load_four(grad_next_latents + row, layout, false, d, grad);
    load_four(grad_next_input + row, layout, layout.channels_last, d, uncond);
    if (layout.guided) load_four(grad_next_input + text_row, layout, layout.channels_last, d, text);
    mean_four(c, x, mean);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      // the mean affects the log-prob, the next latents, and their one or (guided) two copies in the UNet's next input
      const float grad_mean = __fmaf_rn(slope, following[j] - mean[j], grad[j]) + (uncond[j] + text[j]);
      grad[j] = c.c_x * grad_mean;
      uncond[j] = c.c_m * grad_mean;
    }
    store_four(grad, layout, false, d, grad_latents + row);
    store_guided(uncond, layout, image, d, grad_output);
  });
}

void step_logprob(
    const Tensor& model_output,
    const Tensor& latents,
    const Tensor& noise,
    const Tensor& table,
    const Tensor& timesteps,
    std::optional<double> guidance_scale,
    const Tensor& next_latents,
    const Tensor& log_probs,
    const Tensor& next_input) {
  const Rows rows = check_forward(
      model_output, latents, noise, table, timesteps, guidance_scale.has_value(), next_latents, log_probs, next_input);
  if (latents.numel() == 0) return;
  for_cuda_type(model_output, [&](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    step_logprob_fwd_kernel<T><<<rows.images, THREADS, 0, current_stream(latents)>>>(
        static_cast<const T*>(model_output.const_data_ptr()), latents.const_data_ptr<float>(),
        noise.const_data_ptr<float>(), table.const_data_ptr<float>(), timesteps.const_data_ptr<int64_t>(),
        timesteps.dim() > 0, layout_of(rows, guidance_scale), next_latents.mutable_data_ptr<float>(),
        log_probs.mutable_data_ptr<float>(), static_cast<T*>(next_input.mutable_data_ptr()));
  });
  check_launch();
}

void step_logprob_backward(
    const Tensor& model_output,
    const Tensor& latents,
    const Tensor& next_latents,
    const Tensor& table,
    const Tensor& timesteps,
    std::optional<double> guidance_scale,
    const Tensor& grad_next_latents,
    const Tensor& grad_log_probs,
    const Tensor& grad_next_input,
    const Tensor& grad_output,
    const Tensor& grad_latents) {
  const Rows rows = check_backward(
      model_output, latents, next_latents, table, timesteps, guidance_scale.has_value(), grad_next_latents,
      grad_log_probs, grad_next_input, grad_output, grad_latents);
  if (latents.numel() == 0) return;
  for_cuda_type(model_output, [&](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    step_logprob_bwd_kernel<T><<<rows.images, THREADS, 0, current_stream(latents)>>>(
        static_cast<const T*>(model_output.const_data_ptr()), latents.const_data_ptr<float>(),
        next_latents.const_data_ptr<float>(), table.const_data_ptr<float>(), timesteps.const_data_ptr<int64_t>(),
        timesteps.dim() > 0, layout_of(rows, guidance_scale), grad_next_latents.const_data_ptr<float>(),
        grad_log_probs.const_data_ptr<float>(), static_cast<const T*>(grad_next_input.const_data_ptr()),
        static_cast<T*>(grad_output.mutable_data_ptr()), grad_latents.mutable_data_ptr<float>());
  });
  check_launch();
}

}  // namespace
}  // namespace ddpo_fast

STABLE_TORCH_LIBRARY_IMPL(ddpo_fast_csrc, CUDA, m) {
  m.impl("step_logprob", TORCH_BOX(&ddpo_fast::step_logprob));
  m.impl("step_logprob_backward", TORCH_BOX(&ddpo_fast::step_logprob_backward));
}
