#include "gaussian.h"

#include <memory>
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

struct Terms {
  float loss;
  float change;
  float moved;
  float reference_kl;
  // d loss / d log_prob
  float slope;
};

// std::min and std::max drop NaN on one side; a NaN advantage or ratio must reach the loss
float clamp(float value, float low, float high) { return value < low ? low : (value > high ? high : value); }

Terms settle_pair(float log_prob, float old_log_prob, float advantage, float reference_kl, const Bounds& bounds) {
  advantage = clamp(advantage, -bounds.advantage_limit, bounds.advantage_limit);
  const float change = log_prob - old_log_prob;
  const float ratio = static_cast<float>(std::exp(static_cast<double>(change)));
  const float plain = -advantage * ratio;
  const float clipped = -advantage * clamp(ratio, bounds.low, bounds.high);
  const bool beyond = (advantage > 0 && ratio > bounds.high) || (advantage < 0 && ratio < bounds.low);
  const float term = plain < clipped ? clipped : plain;
  return {term + bounds.reference_weight * reference_kl, change, std::abs(ratio - 1), reference_kl, beyond ? 0 : plain};
}

void average(const std::vector<Terms>& pairs, const Bounds& bounds, float* loss, float* metrics) {
  double sums[4] = {};
  float largest = 0;
  for (const Terms& pair : pairs) {
    sums[0] += pair.loss;
    sums[1] += 0.5 * pair.change * pair.change;
    sums[2] += pair.moved > bounds.clip_range;
    sums[3] += pair.reference_kl;
    // stays NaN once it is
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
  check_timesteps(timesteps, table);
  const int64_t count = latents.size(0);
  CHECK_LATENTS(next_latents, latents);
  CHECK_SHAPE(timesteps, count);
  CHECK_SHAPE(old_log_probs, count);
  CHECK_SHAPE(advantages, count);
  CHECK_SHAPE(log_probs, count);
  CHECK_SHAPE(metrics, 4);
  check_same_rows("grad", grad, model_output);
  if (reference_output) check_same_rows("reference_output", *reference_output, model_output);
  const Rows rows = rows_of(model_output, latents, guidance_scale.has_value());
  STD_TORCH_CHECK(latents.numel() > 0, "there must be pairs");
  const float guidance = guidance_scale.value_or(1.0);
  const Bounds bounds{
      static_cast<float>(1 - clip_range), static_cast<float>(1 + clip_range), static_cast<float>(clip_range),
      static_cast<float>(advantage_limit), static_cast<float>(reference_weight)};
  const int64_t tiles = (rows.elements + TILE - 1) / TILE;
  const float* x = latents.const_data_ptr<float>();
  const float* following = next_latents.const_data_ptr<float>();
  // differences of the first pass, for the gradient: a cache of the second; they need not be cleared
  const std::unique_ptr<float[]> differences(new float[latents.numel()]);
  const std::unique_ptr<float[]> apart(new float[reference_output ? latents.numel() : 0]);
  std::vector<double> sums(count * tiles), apart_sums(count * tiles);
  std::vector<Terms> pairs(count);
  for_dtype(model_output, [&](auto kind) {
    using T = decltype(kind);
    const T* output = static_cast<const T*>(model_output.const_data_ptr());
    const T* reference = reference_output ? static_cast<const T*>(reference_output->const_data_ptr()) : nullptr;
    for_tiles(rows, [&](int64_t pair, int64_t tile, int64_t start, int64_t n) {
      alignas(64) float mean[TILE];
      const Coefficients c = coefficients(table, timesteps, pair);
      const int64_t at = pair * rows.elements + start;
      float* difference = differences.get() + at;
      load_guided(output, rows, pair, start, n, guidance, mean);
      if (reference) {
        float* distance = apart.get() + at;
        load_guided(reference, rows, pair, start, n, guidance, distance);
        for (int64_t i = 0; i < n; ++i) distance[i] = c.c_m * (mean[i] - distance[i]);
        apart_sums[pair * tiles + tile] = sum_of_squares(distance, n);
      }
      mean_tile(c, x + at, n, mean);
      for (int64_t i = 0; i < n; ++i) difference[i] = following[at + i] - mean[i];
      sums[pair * tiles + tile] = sum_of_squares(difference, n);
    });
    for (int64_t pair = 0; pair < count; ++pair) {
      const double sigma = coefficients(table, timesteps, pair).sigma;
      double apart_sum = 0;
      for (int64_t t = 0; t < tiles; ++t) apart_sum += apart_sums[pair * tiles + t];
      const float log_prob = log_density(&sums[pair * tiles], tiles, rows.elements, sigma);
      log_probs.mutable_data_ptr<float>()[pair] = log_prob;
      pairs[pair] = settle_pair(
          log_prob, old_log_probs.const_data_ptr<float>()[pair], advantages.const_data_ptr<float>()[pair],
          static_cast<float>(apart_sum / rows.elements / (2 * sigma * sigma)), bounds);
    }
    const double scale = grad_scale ? static_cast<double>(*grad_scale->const_data_ptr<float>()) : 1.0;
    T* gradient = static_cast<T*>(grad.mutable_data_ptr());
    for_tiles(rows, [&](int64_t pair, int64_t, int64_t start, int64_t n) {
      alignas(64) float uncond[TILE], text[TILE];
      const Coefficients c = coefficients(table, timesteps, pair);
      const int64_t at = pair * rows.elements + start;
      // d log_prob / d mean = difference / (sigma^2 D), d mean / d guided = c_m
      const double share = scale * c.c_m / (static_cast<double>(c.sigma) * c.sigma) / latents.numel();
      const float slope = static_cast<float>(share * pairs[pair].slope);
      const float reference_slope = static_cast<float>(share * bounds.reference_weight);
      for (int64_t i = 0; i < n; ++i) {
        float g = slope * differences[at + i];
        if (reference) g = __builtin_fmaf(reference_slope, apart[at + i], g);
        uncond[i] = rows.guided ? (1 - guidance) * g : g;
        text[i] = guidance * g;
      }
      store_tile(uncond, rows, pair, start, n, gradient);
      if (rows.guided) store_tile(text, rows, pair + rows.images, start, n, gradient);
    });
  });
  average(pairs, bounds, loss.mutable_data_ptr<float>(), metrics.mutable_data_ptr<float>());
}

}  // namespace
}  // namespace ddpo_fast

STABLE_TORCH_LIBRARY_IMPL(ddpo_fast_csrc, CPU, m) { m.impl("ppo_loss", TORCH_BOX(&ddpo_fast::ppo_loss)); }
