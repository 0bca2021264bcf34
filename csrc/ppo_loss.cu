#include "gaussian.cuh"
#include "ppo_loss.h"

namespace ddpo_fast {
namespace {

struct Pairs {
  const float* latents;
  const float* next_latents;
  const float* old_log_probs;
  const float* advantages;
  const float* table;
  const int64_t* timesteps;
  // null for no loss scale
  const float* grad_scale;
};

// `scratch` holds the terms to be averaged, [5, pairs], followed by the ticket, a counter of finished blocks.
struct Results {
  float* loss;
  float* metrics;
  float* log_probs;
  float* scratch;
  unsigned int* ticket;
};

// Written out, because fminf and fmaxf drop a NaN. A NaN advantage or ratio must reach the loss.
__device__ float clamp(float value, float low, float high) { return value < low ? low : (value > high ? high : value); }

// Stores a pair's log-prob and its terms of the averages (in one thread); returns d term / d log_prob in every thread.
__device__ float settle_pair(
    float log_prob,
    float reference_kl,
    float credit,
    const Pairs& pairs,
    const Bounds& bounds,
    const Results& results) {
  const int64_t pair = blockIdx.x, count = gridDim.x;
  const float advantage = clamp(pairs.advantages[pair], -bounds.advantage_limit, bounds.advantage_limit);
  const float change = log_prob - pairs.old_log_probs[pair];
  const float ratio = expf(credit * change);
  const float moved = fabsf(ratio - 1.0f);
  const float plain = -advantage * ratio;
  const float clipped = -advantage * clamp(ratio, bounds.low, bounds.high);
  const bool beyond = (advantage > 0 && ratio > bounds.high) || (advantage < 0 && ratio < bounds.low);
  if (threadIdx.x == 0) {
    results.log_probs[pair] = log_prob;
    results.scratch[pair] = __fmaf_rn(bounds.reference_weight, reference_kl, plain < clipped ? clipped : plain);
    results.scratch[count + pair] = 0.5f * change * change;
    results.scratch[2 * count + pair] = moved > bounds.clip_range ? 1.0f : 0.0f;
    results.scratch[3 * count + pair] = moved;
    results.scratch[4 * count + pair] = reference_kl;
  }
  return beyond ? 0.0f : plain * credit;
}

// The sum of `count` values in a fixed order. They are volatile because other blocks wrote them during the launch, so
// the reads must not come from this multiprocessor's first-level cache.
__device__ float column_sum(const volatile float* column, int64_t count) {
  float sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += THREADS) sum += column[i];
  return block_sum(sum);
}

// Stores the means over the pairs, added in a fixed order, and the largest |ratio - 1|. Atomic additions by every block
// would be simpler, but their order, and so the last bits of the loss, would differ between launches.
__device__ void average(const Results& results) {
  const int64_t count = gridDim.x;
  __shared__ float largest[THREADS];
  const volatile float* moved = results.scratch + 3 * count;
  float mine = 0;
  for (int64_t i = threadIdx.x; i < count; i += THREADS) mine = fmaxf(mine, moved[i]);
  largest[threadIdx.x] = mine;
  float sums[5];
  for (int i = 0; i < 5; ++i) sums[i] = column_sum(results.scratch + i * count, count);
  if (threadIdx.x != 0) return;
  for (int i = 1; i < THREADS; ++i) mine = fmaxf(mine, largest[i]);
  *results.loss = sums[0] / count;
  results.metrics[0] = sums[1] / count;
  results.metrics[1] = sums[2] / count;
  // fmaxf ignores a NaN, but the sum is NaN if any term is
  results.metrics[2] = isnan(sums[3]) ? sums[3] : mine;
  results.metrics[3] = sums[4] / count;
}

// Whether this block is the last of the launch to arrive here. Blocks run in no particular order and cannot wait for
// each other. So each block increments a counter after it has stored its terms, and the block that increments it last
// knows that all terms are stored. The fence before the increment makes the block's stores visible to other blocks
// first; the fence after it keeps later reads from moving ahead of the increment. CUDA's threadFenceReduction sample
// does this.
__device__ bool is_last(unsigned int* ticket) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

template <typename T>
__global__ void __launch_bounds__(THREADS) ppo_loss_fwd_kernel(
    const T* output, const T* reference, Pairs pairs, Bounds bounds, Layout layout, T* grad, Results results) {
  const int64_t pair = blockIdx.x;
  const int64_t row = pair * layout.elements;
  const Coefficients c = coefficients(pairs.table, pairs.timesteps, true);
  float squares = 0, apart_squares = 0;
  for_fours(layout.elements, [&](int64_t d) {
    float mean[4], x[4], following[4], other[4];
    load_guided(output, layout, pair, d, mean);
    if (reference) {
      load_guided(reference, layout, pair, d, other);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float apart = c.c_m * (mean[j] - other[j]);
        apart_squares = __fmaf_rn(apart, apart, apart_squares);
      }
    }
    load_four(pairs.latents + row, layout, false, d, x);
    load_four(pairs.next_latents + row, layout, false, d, following);
    mean_four(c, x, mean);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float difference = following[j] - mean[j];
      squares = __fmaf_rn(difference, difference, squares);
    }
  });
  const float elements = static_cast<float>(layout.elements);
  const float log_prob = log_density(block_sum(squares), layout.elements, c.sigma);
  // the KL's share of a step of this credit
  const float credit_squared = c.credit * c.credit;
  const float reference_kl =
      reference ? block_sum(apart_squares) / elements / (2.0f * c.sigma * c.sigma) * credit_squared : 0.0f;
  // both terms of the gradient have this factor: d mean / d guided = c_m, 1 / sigma^2, and the means over D and pairs
  float share = c.c_m / (c.sigma * c.sigma) / (elements * static_cast<float>(gridDim.x));
  if (pairs.grad_scale) share *= *pairs.grad_scale;
  const float slope = share * settle_pair(log_prob, reference_kl, c.credit, pairs, bounds, results);
  const float reference_slope = share * credit_squared * bounds.reference_weight;
  // The second pass loads everything again, because a whole image does not fit in registers. The data is still cached.
  for_fours(layout.elements, [&](int64_t d) {
    float guided[4], mean[4], x[4], following[4], other[4], grads[4];
    load_guided(output, layout, pair, d, guided);
    load_four(pairs.latents + row, layout, false, d, x);
    load_four(pairs.next_latents + row, layout, false, d, following);
    if (reference) load_guided(reference, layout, pair, d, other);
#pragma unroll
    for (int j = 0; j < 4; ++j) mean[j] = guided[j];
    mean_four(c, x, mean);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      grads[j] = slope * (following[j] - mean[j]);
      if (reference) grads[j] = __fmaf_rn(reference_slope * c.c_m, guided[j] - other[j], grads[j]);
    }
    store_guided(grads, layout, pair, d, grad);
  });
  if (is_last(results.ticket)) average(results);
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
  const Rows rows = check_pairs(
      model_output, reference_output, latents, next_latents, old_log_probs, advantages, table, timesteps,
      guidance_scale.has_value(), metrics, log_probs, grad);
  const int64_t count = rows.images;
  const cudaStream_t stream = current_stream(latents);
  // a fresh ticket for each launch, so that launches on several streams do not share one
  Tensor scratch = torch::stable::new_empty(log_probs, {5 * count + 1});
  float* ticket = scratch.mutable_data_ptr<float>() + 5 * count;
  STD_TORCH_CHECK(
      cudaMemsetAsync(ticket, 0, sizeof(unsigned int), stream) == cudaSuccess, "the ticket was not cleared");
  const Bounds bounds = bounds_of(clip_range, advantage_limit, reference_weight);
  for_cuda_type(model_output, [&](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    ppo_loss_fwd_kernel<T><<<count, THREADS, 0, stream>>>(
        static_cast<const T*>(model_output.const_data_ptr()),
        reference_output ? static_cast<const T*>(reference_output->const_data_ptr()) : nullptr,
        Pairs{
            latents.const_data_ptr<float>(), next_latents.const_data_ptr<float>(),
            old_log_probs.const_data_ptr<float>(), advantages.const_data_ptr<float>(), table.const_data_ptr<float>(),
            timesteps.const_data_ptr<int64_t>(), grad_scale ? grad_scale->const_data_ptr<float>() : nullptr},
        bounds, layout_of(rows, guidance_scale), static_cast<T*>(grad.mutable_data_ptr()),
        Results{
            loss.mutable_data_ptr<float>(), metrics.mutable_data_ptr<float>(), log_probs.mutable_data_ptr<float>(),
            scratch.mutable_data_ptr<float>(), reinterpret_cast<unsigned int*>(ticket)});
  });
  check_launch();
}

}  // namespace
}  // namespace ddpo_fast

STABLE_TORCH_LIBRARY_IMPL(ddpo_fast_csrc, CUDA, m) { m.impl("ppo_loss", TORCH_BOX(&ddpo_fast::ppo_loss)); }
