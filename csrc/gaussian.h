// The Gaussian denoising step on the CPU, a tile of an image at a time.
//
// Sampling and training share these functions, and contraction is off but for explicit fused multiply-adds: both
// compute the same log-prob to the last bit, whatever the number of threads.
#pragma once

#include "convert.h"

#include <algorithm>
#include <cmath>

namespace ddpo_fast {

// a tile's buffers fit the first-level cache
constexpr int64_t TILE = 1024;
constexpr double LOG_SQRT_2PI = 0.91893853320467274178;

// Calls f(position in the tile, position in the row, count) for each run of elements of one channel.
template <typename F>
void for_runs(const Rows& rows, int64_t start, int64_t n, const F& f) {
  for (int64_t i = 0; i < n;) {
    const int64_t d = start + i;
    const int64_t pixel = d % rows.pixels;
    const int64_t count = std::min(n - i, rows.pixels - pixel);
    f(i, pixel * rows.channels + d / rows.pixels, count);
    i += count;
  }
}

template <typename T>
void load_tile(const T* data, const Rows& rows, int64_t row, int64_t start, int64_t n, float* out) {
  data += row * rows.elements;
  if (!rows.channels_last) return to_float(data + start, n, out);
  for_runs(rows, start, n, [&](int64_t i, int64_t at, int64_t count) {
    for (int64_t j = 0; j < count; ++j) out[i + j] = static_cast<float>(data[at + j * rows.channels]);
  });
}

template <typename T>
void store_tile(const float* tile, const Rows& rows, int64_t row, int64_t start, int64_t n, T* data) {
  data += row * rows.elements;
  if (!rows.channels_last) return from_float(tile, n, data + start);
  for_runs(rows, start, n, [&](int64_t i, int64_t at, int64_t count) {
    for (int64_t j = 0; j < count; ++j) data[at + j * rows.channels] = static_cast<T>(tile[i + j]);
  });
}

template <typename T>
void load_guided(
    const T* output, const Rows& rows, int64_t image, int64_t start, int64_t n, float guidance, float* out) {
  load_tile(output, rows, image, start, n, out);
  if (!rows.guided) return;
  alignas(64) float text[TILE];
  load_tile(output, rows, image + rows.images, start, n, text);
  for (int64_t i = 0; i < n; ++i) out[i] = __builtin_fmaf(guidance, text[i] - out[i], out[i]);
}

inline void check_timesteps(const Tensor& timesteps, const Tensor& table) {
  for (int64_t i = 0; i < timesteps.numel(); ++i) {
    const int64_t row = timesteps.const_data_ptr<int64_t>()[i];
    STD_TORCH_CHECK(row >= 0 && row < table.size(0), "timestep ", row, " is not a row of the table");
  }
}

// The gradient to the model's output from that to the guided one: what `load_guided` combines. Overwrites the tile.
template <typename T>
void store_guided(float* tile, const Rows& rows, int64_t image, int64_t start, int64_t n, float guidance, T* data) {
  if (!rows.guided) return store_tile(tile, rows, image, start, n, data);
  alignas(64) float text[TILE];
  for (int64_t i = 0; i < n; ++i) {
    text[i] = guidance * tile[i];
    tile[i] = (1 - guidance) * tile[i];
  }
  store_tile(tile, rows, image, start, n, data);
  store_tile(text, rows, image + rows.images, start, n, data);
}

struct Coefficients {
  float c_x;
  float c_m;
  float sigma;
};

inline Coefficients coefficients(const Tensor& table, const Tensor& timesteps, int64_t image) {
  const int64_t row = timesteps.const_data_ptr<int64_t>()[timesteps.dim() > 0 ? image : 0];
  const float* entry = table.const_data_ptr<float>() + row * 3;
  return {entry[0], entry[1], entry[2]};
}

// The step's mean for a tile: the model's output goes in, the mean comes out.
inline void mean_tile(const Coefficients& c, const float* latents, int64_t n, float* mean) {
  for (int64_t i = 0; i < n; ++i) mean[i] = __builtin_fmaf(c.c_m, mean[i], c.c_x * latents[i]);
}

inline double sum_of_squares(const float* values, int64_t n) {
  constexpr int64_t LANES = 32;
  float lanes[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int64_t j = 0; j < LANES; ++j) lanes[j] = __builtin_fmaf(values[i + j], values[i + j], lanes[j]);
  for (; i < n; ++i) lanes[i % LANES] = __builtin_fmaf(values[i], values[i], lanes[i % LANES]);
  double sum = 0;
  for (float lane : lanes) sum += lane;
  return sum;
}

// Mean over an image's elements of a Gaussian's log-density, from the squared differences to its mean.
inline float log_density(double sum_of_squares, int64_t elements, double sigma) {
  return static_cast<float>(-(sum_of_squares / elements) / (2 * sigma * sigma) - std::log(sigma) - LOG_SQRT_2PI);
}

// Calls f(start, n) for the tiles of an image, in order: a sum over them does not depend on the number of threads.
template <typename F>
void for_tiles(const Rows& rows, const F& f) {
  for (int64_t start = 0; start < rows.elements; start += TILE) f(start, std::min(TILE, rows.elements - start));
}

// Calls f(image) for all images, in parallel.
template <typename F>
void for_images(const Rows& rows, const F& f) {
  torch::stable::parallel_for(0, rows.images, 1, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) f(image);
  });
}

}  // namespace ddpo_fast
