// The bounds and checks that the CPU's and the GPU's clipped loss share. `ddpo_fast/ops/ppo_loss.py` derives the loss
// and its gradient.
#pragma once

#include "common.h"

namespace ddpo_fast {

struct Bounds {
  float low;
  float high;
  float clip_range;
  float advantage_limit;
  float reference_weight;
};

inline Bounds bounds_of(double clip_range, double advantage_limit, double reference_weight) {
  return {
      static_cast<float>(1 - clip_range), static_cast<float>(1 + clip_range), static_cast<float>(clip_range),
      static_cast<float>(advantage_limit), static_cast<float>(reference_weight)};
}

inline Rows check_pairs(
    const Tensor& model_output,
    const std::optional<Tensor>& reference_output,
    const Tensor& latents,
    const Tensor& next_latents,
    const Tensor& old_log_probs,
    const Tensor& advantages,
    const Tensor& table,
    const Tensor& timesteps,
    bool guided,
    const Tensor& metrics,
    const Tensor& log_probs,
    const Tensor& grad) {
  check_step(latents, table, timesteps);
  const int64_t count = latents.size(0);
  CHECK_LATENTS(next_latents, latents);
  CHECK_SHAPE(timesteps, count);
  CHECK_SHAPE(old_log_probs, count);
  CHECK_SHAPE(advantages, count);
  CHECK_SHAPE(log_probs, count);
  CHECK_SHAPE(metrics, 4);
  check_same_rows("grad", grad, model_output);
  if (reference_output) check_same_rows("reference_output", *reference_output, model_output);
  STD_TORCH_CHECK(latents.numel() > 0, "there must be pairs");
  return rows_of(model_output, latents, guided);
}

}  // namespace ddpo_fast
