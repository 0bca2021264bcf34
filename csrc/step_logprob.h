// The checks that the CPU's and the GPU's denoising step share. Each returns the layout of the rows.
#pragma once

#include "common.h"

namespace ddpo_fast {

inline Rows check_forward(
    const Tensor& model_output,
    const Tensor& latents,
    const Tensor& noise,
    const Tensor& table,
    const Tensor& timesteps,
    bool guided,
    const Tensor& next_latents,
    const Tensor& log_probs,
    const Tensor& next_input) {
  check_step(latents, table, timesteps);
  CHECK_LATENTS(noise, latents);
  CHECK_LATENTS(next_latents, latents);
  CHECK_SHAPE(log_probs, latents.size(0));
  check_same_rows("next_input", next_input, model_output);
  return rows_of(model_output, latents, guided);
}

inline Rows check_backward(
    const Tensor& model_output,
    const Tensor& latents,
    const Tensor& next_latents,
    const Tensor& table,
    const Tensor& timesteps,
    bool guided,
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
  return rows_of(model_output, latents, guided);
}

}  // namespace ddpo_fast
