#include "gaussian.h"

namespace ddpo_fast {
namespace {

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
  check_step(latents, table, timesteps);
  CHECK_LATENTS(noise, latents);
  CHECK_LATENTS(next_latents, latents);
  CHECK_SHAPE(log_probs, latents.size(0));
  check_same_rows("next_input", next_input, model_output);
  const Rows rows = rows_of(model_output, latents, guidance_scale.has_value());
  check_timesteps(timesteps, table);
  const float guidance = guidance_scale.value_or(1.0);
  const float* x = latents.const_data_ptr<float>();
  const float* z = noise.const_data_ptr<float>();
  float* stored = next_latents.mutable_data_ptr<float>();
  for_dtype(model_output, [&](auto kind) {
    using T = decltype(kind);
    const T* output = static_cast<const T*>(model_output.const_data_ptr());
    T* input = static_cast<T*>(next_input.mutable_data_ptr());
    for_images(rows, [&](int64_t image) {
      const Coefficients c = coefficients(table, timesteps, image);
      double sum = 0;
      for_tiles(rows, [&](int64_t start, int64_t n) {
        alignas(64) float mean[TILE];
        const int64_t at = image * rows.elements + start;
        load_guided(output, rows, image, start, n, guidance, mean);
        mean_tile(c, x + at, n, mean);
        for (int64_t i = 0; i < n; ++i) {
          const float following = __builtin_fmaf(c.sigma, z[at + i], mean[i]);
          stored[at + i] = following;
          // The log-prob is that of the stored latents. `following` is rounded, so this is not exactly sigma * noise.
          mean[i] = following - mean[i];
        }
        store_tile(stored + at, rows, image, start, n, input);
        if (rows.guided) store_tile(stored + at, rows, image + rows.images, start, n, input);
        sum += sum_of_squares(mean, n);
      });
      log_probs.mutable_data_ptr<float>()[image] = log_density(sum, rows.elements, c.sigma);
    });
  });
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
  check_step(latents, table, timesteps);
  CHECK_LATENTS(next_latents, latents);
  CHECK_LATENTS(grad_next_latents, latents);
  CHECK_LATENTS(grad_latents, latents);
  CHECK_SHAPE(grad_log_probs, latents.size(0));
  check_same_rows("grad_next_input", grad_next_input, model_output);
  check_same_rows("grad_output", grad_output, model_output);
  const Rows rows = rows_of(model_output, latents, guidance_scale.has_value());
  check_timesteps(timesteps, table);
  const float guidance = guidance_scale.value_or(1.0);
  const float* x = latents.const_data_ptr<float>();
  const float* following = next_latents.const_data_ptr<float>();
  const float* grad_following = grad_next_latents.const_data_ptr<float>();
  const float* grad_scores = grad_log_probs.const_data_ptr<float>();
  float* grad_x = grad_latents.mutable_data_ptr<float>();
  for_dtype(model_output, [&](auto kind) {
    using T = decltype(kind);
    const T* output = static_cast<const T*>(model_output.const_data_ptr());
    const T* grad_input = static_cast<const T*>(grad_next_input.const_data_ptr());
    T* grad = static_cast<T*>(grad_output.mutable_data_ptr());
    for_images(rows, [&](int64_t image) {
      const Coefficients c = coefficients(table, timesteps, image);
      // d log_prob / d mean = difference / (sigma^2 D), at fixed next latents
      const float slope = grad_scores[image] / (c.sigma * c.sigma * rows.elements);
      for_tiles(rows, [&](int64_t start, int64_t n) {
        alignas(64) float mean[TILE], uncond[TILE], text[TILE] = {};
        const int64_t at = image * rows.elements + start;
        load_guided(output, rows, image, start, n, guidance, mean);
        mean_tile(c, x + at, n, mean);
        load_tile(grad_input, rows, image, start, n, uncond);
        if (rows.guided) load_tile(grad_input, rows, image + rows.images, start, n, text);
        for (int64_t i = 0; i < n; ++i) {
          const float difference = following[at + i] - mean[i];
          // the mean affects the log-prob, the next latents, and their one or (guided) two copies in the UNet's next
          // input
          const float grad_mean = __builtin_fmaf(slope, difference, grad_following[at + i]) + (uncond[i] + text[i]);
          grad_x[at + i] = c.c_x * grad_mean;
          uncond[i] = c.c_m * grad_mean;
        }
        store_guided(uncond, rows, image, start, n, guidance, grad);
      });
    });
  });
}

}  // namespace
}  // namespace ddpo_fast

STABLE_TORCH_LIBRARY_IMPL(ddpo_fast_csrc, CPU, m) {
  m.impl("step_logprob", TORCH_BOX(&ddpo_fast::step_logprob));
  m.impl("step_logprob_backward", TORCH_BOX(&ddpo_fast::step_logprob_backward));
}
