#include "gaussian.h"

#include <vector>

namespace ddpo_fast {
namespace {

struct Bounds {
  float low;
  float high;
  float clip_range;
  float advantage_limit;
  float reference_weight;
};

Bounds bounds_of(double clip_range, double advantage_limit, double reference_weight) {
  return {
      static_cast<float>(1 - clip_range), static_cast<float>(1 + clip_range), static_cast<float>(clip_range),
      static_cast<float>(advantage_limit), static_cast<float>(reference_weight)};
}

// A pair's terms of the loss and of the metrics.
struct Terms {
  float loss;
  float change;
  float moved;
  float reference_kl;
  // d term / d log_prob: -A r credit, and 0 where the ratio is clipped
  float slope;
};

// Written out, because std::min and std::max drop a NaN in one of their arguments. A NaN advantage or ratio must reach
// the loss.
float clamp(float value, float low, float high) { return value < low ? low : (value > high ? high : value); }

Terms settle_pair(
    float log_prob, float old_log_prob, float advantage, float reference_kl, float credit, const Bounds& bounds) {
  advantage = clamp(advantage, -bounds.advantage_limit, bounds.advantage_limit);
  const float change = log_prob - old_log_prob;
  const float ratio = static_cast<float>(std::exp(static_cast<double>(credit) * change));
  const float plain = -advantage * ratio;
  const float clipped = -advantage * clamp(ratio, bounds.low, bounds.high);
  const bool beyond = (advantage > 0 && ratio > bounds.high) || (advantage < 0 && ratio < bounds.low);
  const float term = plain < clipped ? clipped : plain;
  const float slope = beyond ? 0 : plain * credit;
  return {term + bounds.reference_weight * reference_kl, change, std::abs(ratio - 1), reference_kl, slope};
}

// Means over the pairs, added up in fp64 and in the order of the pairs, so that they do not depend on the number of
// threads.
void average(const std::vector<Terms>& pairs, const Bounds& bounds, float* loss, float* metrics) {
  double sums[4] = {};
  float largest = 0;
  for (const Terms& pair : pairs) {
    sums[0] += pair.loss;
    sums[1] += 0.5 * pair.change * pair.change;
    sums[2] += pair.moved > bounds.clip_range;
    sums[3] += pair.reference_kl;
    // every comparison with NaN is false, so this condition lets a NaN replace the largest value, and then stay
    if (!(pair.moved <= largest) && !std::isnan(largest)) largest = pair.moved;
  }
  const double count = pairs.size();
  *loss = static_cast<float>(sums[0] / count);
  metrics[0] = static_cast<float>(sums[1] / count);
  metrics[1] = static_cast<float>(sums[2] / count);
  metrics[2] = largest;
  metrics[3] = static_cast<float>(sums[3] / count);
}

void ppo_loss(
    const Tensor& model_output,
    std::optional<Tensor> reference_output,
    const Tensor& latents,
    const Tensor& next_latents,
    const Tensor& old_log_probs,
    const Tensor& advantages,
    const Tensor& table,
    const Tensor& timesteps,
    std::optional<Tensor> grad_scale,
    std::optional<double> guidance_scale,
    double clip_range,
    double advantage_limit,
    double reference_weight,
    const Tensor& loss,
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
  const Rows rows = rows_of(model_output, latents, guidance_scale.has_value());
  check_timesteps(timesteps, table);
  const float guidance = guidance_scale.value_or(1.0);
  const Bounds bounds = bounds_of(clip_range, advantage_limit, reference_weight);
  const float* x = latents.const_data_ptr<float>();
  const float* following = next_latents.const_data_ptr<float>();
  const double scale = grad_scale ? static_cast<double>(*grad_scale->const_data_ptr<float>()) : 1.0;
  std::vector<Terms> pairs(count);
  for_dtype(model_output, [&](auto kind) {
    using T = decltype(kind);
    const T* output = static_cast<const T*>(model_output.const_data_ptr());
    const T* reference = reference_output ? static_cast<const T*>(reference_output->const_data_ptr()) : nullptr;
    T* gradient = static_cast<T*>(grad.mutable_data_ptr());
    // Each pair is computed by one thread, so that the differences of the first pass are still in this core's cache
    // when the second pass turns them into the gradient.
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> difference(rows.elements), apart(reference ? rows.elements : 0);
      for (int64_t pair = begin; pair < end; ++pair) {
        const Coefficients c = coefficients(table, timesteps, pair);
        const float* x_pair = x + pair * rows.elements;
        const float* following_pair = following + pair * rows.elements;
        double sum = 0, apart_sum = 0;
        for_tiles(rows, [&](int64_t start, int64_t n) {
          alignas(64) float mean[TILE];
          load_guided(output, rows, pair, start, n, guidance, mean);
          if (reference) {
            float* distance = &apart[start];
            load_guided(reference, rows, pair, start, n, guidance, distance);
            for (int64_t i = 0; i < n; ++i) distance[i] = c.c_m * (mean[i] - distance[i]);
            apart_sum += sum_of_squares(distance, n);
          }
          mean_tile(c, x_pair + start, n, mean);
          for (int64_t i = 0; i < n; ++i) difference[start + i] = following_pair[start + i] - mean[i];
          sum += sum_of_squares(&difference[start], n);
        });
        const double variance = static_cast<double>(c.sigma) * c.sigma;
        // the KL's share of a step of this credit
        const double credit_squared = static_cast<double>(c.credit) * c.credit;
        const float log_prob = log_density(sum, rows.elements, c.sigma);
        log_probs.mutable_data_ptr<float>()[pair] = log_prob;
        pairs[pair] = settle_pair(
            log_prob, old_log_probs.const_data_ptr<float>()[pair], advantages.const_data_ptr<float>()[pair],
            static_cast<float>(apart_sum / rows.elements / (2 * variance) * credit_squared), c.credit, bounds);
        // both terms of the gradient have this factor: d mean / d guided = c_m, 1 / sigma^2, and the means over D and
        // pairs
        const double share = scale * c.c_m / variance / latents.numel();
        const float slope = static_cast<float>(share * pairs[pair].slope);
        const float reference_slope = static_cast<float>(share * credit_squared * bounds.reference_weight);
        for_tiles(rows, [&](int64_t start, int64_t n) {
          alignas(64) float tile[TILE];
          for (int64_t i = 0; i < n; ++i) {
            tile[i] = slope * difference[start + i];
            if (reference) tile[i] = __builtin_fmaf(reference_slope, apart[start + i], tile[i]);
          }
          store_guided(tile, rows, pair, start, n, guidance, gradient);
        });
      }
    });
  });
  average(pairs, bounds, loss.mutable_data_ptr<float>(), metrics.mutable_data_ptr<float>());
}

}  // namespace
}  // namespace ddpo_fast

STABLE_TORCH_LIBRARY_IMPL(ddpo_fast_csrc, CPU, m) { m.impl("ppo_loss", TORCH_BOX(&ddpo_fast::ppo_loss)); }
