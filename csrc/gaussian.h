// The Gaussian denoising step, defined in `ddpo_fast/ops/gaussian.py`, one tile of an image at a time.
//
// Sampling and training must compute the same log-prob in every bit for the same UNet output, so that ratios are
// exactly 1 while the policy has not changed. Both call these functions, which add up in the same order for any number
// of threads. The compiler may not fuse products and sums by itself (-ffp-contract=off); the code calls
// `__builtin_fmaf` explicitly.
#pragma once

#include "convert.h"

#include <algorithm>
#include <cmath>

namespace ddpo_fast {

#define CHECK_LATENTS(tensor, like)                                                              \
  do {                                                                                           \
    CHECK_DTYPE(tensor, Float);                                                                  \
    CHECK_CONTIGUOUS(tensor);                                                                    \
    STD_TORCH_CHECK((tensor).numel() == (like).numel(), #tensor " must be as large as latents"); \
  } while (false)

// The memory layout of the UNet's output: contiguous or channels_last. Latents are always contiguous; ops number the
// elements of both in NCHW order. With guidance there are two rows for each image: first the unconditional outputs of
// all images, then the outputs for their prompts.
struct Rows {
  int64_t images;
  int64_t elements;
  int64_t channels;
  int64_t pixels;
  bool channels_last;
  bool guided;

  int64_t rows() const { return guided ? 2 * images : images; }
};

inline Rows rows_of(const Tensor& model_output, const Tensor& latents, bool guided) {
  Rows rows{latents.size(0), 0, 1, 1, false, guided};
  STD_TORCH_CHECK(
      model_output.dim() == latents.dim() && model_output.size(0) == rows.rows(), "model_output must have ",
      rows.rows(), " rows but has ", model_output.size(0));
  rows.elements = 1;
  for (int64_t i = 1; i < latents.dim(); ++i) {
    STD_TORCH_CHECK(model_output.size(i) == latents.size(i), "model_output and latents must have images of one shape");
    rows.elements *= latents.size(i);
  }
  rows.channels_last = !model_output.is_contiguous();
  if (rows.channels_last) {
    STD_TORCH_CHECK(
        model_output.dim() == 4 && model_output.stride(1) == 1 && model_output.stride(3) == model_output.size(1),
        "model_output must be contiguous or channels_last");
    rows.channels = model_output.size(1);
    rows.pixels = model_output.size(2) * model_output.size(3);
  }
  return rows;
}

inline void check_same_rows(const char* name, const Tensor& tensor, const Tensor& model_output) {
  STD_TORCH_CHECK(
      tensor.numel() == model_output.numel() && tensor.scalar_type() == model_output.scalar_type() &&
          (tensor.is_contiguous() == model_output.is_contiguous()),
      name, " must have the shape, dtype and layout of model_output");
}

inline void check_step(const Tensor& latents, const Tensor& table, const Tensor& timesteps) {
  CHECK_DTYPE(latents, Float);
  CHECK_CONTIGUOUS(latents);
  CHECK_DTYPE(table, Float);
  CHECK_CONTIGUOUS(table);
  CHECK_SHAPE(table, table.size(0), 4);
  CHECK_DTYPE(timesteps, Long);
  CHECK_CONTIGUOUS(timesteps);
  if (timesteps.dim() > 0) CHECK_SHAPE(timesteps, latents.size(0));
}

// elements of a tile: a few fp32 buffers of this size fit into a first-level cache of 32 KB
constexpr int64_t TILE = 1024;
// log(sqrt(2 pi))
constexpr double LOG_SQRT_2PI = 0.91893853320467274178;

// For channels_last rows: splits elements [start, start + n) in NCHW order into pieces of one channel each and calls
// f(index in the tile, offset in the row, count). Elements of a piece are rows.channels apart in memory.
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

// Reads elements [start, start + n) of a row, in NCHW order, into fp32.
template <typename T>
void load_tile(const T* data, const Rows& rows, int64_t row, int64_t start, int64_t n, float* out) {
  data += row * rows.elements;
  if (!rows.channels_last) return to_float(data + start, n, out);
  for_runs(rows, start, n, [&](int64_t i, int64_t at, int64_t count) {
    for (int64_t j = 0; j < count; ++j) out[i + j] = static_cast<float>(data[at + j * rows.channels]);
  });
}

// Writes a tile to the place that `load_tile` reads it from.
template <typename T>
void store_tile(const float* tile, const Rows& rows, int64_t row, int64_t start, int64_t n, T* data) {
  data += row * rows.elements;
  if (!rows.channels_last) return from_float(tile, n, data + start);
  for_runs(rows, start, n, [&](int64_t i, int64_t at, int64_t count) {
    for (int64_t j = 0; j < count; ++j) data[at + j * rows.channels] = static_cast<T>(tile[i + j]);
  });
}

// Reads the model's output for a tile of an image. With guidance it is u + s (t - u), with the unconditional row u, the
// row t for the prompt, and the guidance scale s.
template <typename T>
void load_guided(
    const T* output, const Rows& rows, int64_t image, int64_t start, int64_t n, float guidance, float* out) {
  load_tile(output, rows, image, start, n, out);
  if (!rows.guided) return;
  alignas(64) float text[TILE];
  load_tile(output, rows, image + rows.images, start, n, text);
  for (int64_t i = 0; i < n; ++i) out[i] = __builtin_fmaf(guidance, text[i] - out[i], out[i]);
}

// A timestep that is no row of the table would make the op read beyond the table. Only the CPU's ops check this: on a
// GPU the host would have to wait for the values.
inline void check_timesteps(const Tensor& timesteps, const Tensor& table) {
  for (int64_t i = 0; i < timesteps.numel(); ++i) {
    const int64_t row = timesteps.const_data_ptr<int64_t>()[i];
    STD_TORCH_CHECK(row >= 0 && row < table.size(0), "timestep ", row, " is not a row of the table");
  }
}

// Stores the gradient of the model's output. `tile` holds the gradient of the guided output, and is overwritten.
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
  float credit;
};

inline Coefficients coefficients(const Tensor& table, const Tensor& timesteps, int64_t image) {
  const int64_t row = timesteps.const_data_ptr<int64_t>()[timesteps.dim() > 0 ? image : 0];
  const float* entry = table.const_data_ptr<float>() + row * 4;
  return {entry[0], entry[1], entry[2], entry[3]};
}

// Replaces the model's output in `mean` by the step's mean, c_m * output + c_x * latents.
inline void mean_tile(const Coefficients& c, const float* latents, int64_t n, float* mean) {
  for (int64_t i = 0; i < n; ++i) mean[i] = __builtin_fmaf(c.c_m, mean[i], c.c_x * latents[i]);
}

// The sum of a tile's squares in a fixed order: 32 partial sums in fp32, which fit into vector registers of any width,
// then their sum in fp64. The sums of tiles are added in fp64, too.
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

// A Gaussian's log-density averaged over an image's elements, given the sum of their squared distances from its mean.
inline float log_density(double sum_of_squares, int64_t elements, double sigma) {
  return static_cast<float>(-(sum_of_squares / elements) / (2 * sigma * sigma) - std::log(sigma) - LOG_SQRT_2PI);
}

// Calls f(start, n) for the tiles of an image, in order.
template <typename F>
void for_tiles(const Rows& rows, const F& f) {
  for (int64_t start = 0; start < rows.elements; start += TILE) f(start, std::min(TILE, rows.elements - start));
}

// Calls f(image) for all images, in parallel. Each image is computed by one thread, so that sums over an image do not
// depend on the number of threads.
template <typename F>
void for_images(const Rows& rows, const F& f) {
  torch::stable::parallel_for(0, rows.images, 1, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) f(image);
  });
}

}  // namespace ddpo_fast
