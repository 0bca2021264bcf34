// GroupNorm and SiLU of channels_last images on the GPU, defined in `ddpo_fast/ops/groupnorm_silu.py`. A block computes
// whole groups of an image. It copies their elements, the slab, to shared memory, so that device memory is read once:
// the statistics must be known before the first result.
//
// A thread computes the same channels of every `rows`-th pixel. Their parameters stay in its registers, and of the slab
// it reads only what it has copied itself, so that no thread waits for another's copies. Sums over threads have a fixed
// order: two launches give the same bits.
#pragma once

#include "common.h"

#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

namespace ddpo_fast {

// the slabs of a block, its threads' sums of channels, and two numbers of each of its groups
extern __shared__ __align__(16) unsigned char shared_memory[];

namespace {

constexpr int MOST_THREADS = 512;
constexpr int WARP = 32;
// Packs that a thread has asked for and not yet used. Device memory needs about 20 KB under way for each multiprocessor
// to be kept busy; two blocks have at least 32 KB.
constexpr int AHEAD = 8;

// Elements that are loaded and stored in one instruction: V channels of a pixel.
template <typename T, int V>
struct alignas(V * sizeof(T)) Pack {
  using Element = T;
  static constexpr int WIDTH = V;
  T values[V];
};

// How a block computes `groups` groups, which are `width` channels in `columns` packs. `rows` pixels are computed at
// once, by `threads` threads; the block may have more, which only help to add up.
struct Tile {
  int channels, pixels, groups, group_size, width, columns, rows, threads;
  int slab_bytes;
};

// A vector of numbers in fp32 or as T, or zeros without data; those of two channels and of two images are `step` and
// `image_step` apart.
template <typename T>
struct Vector {
  const void* data;
  bool is_float;
  int64_t step, image_step;

  __device__ float operator[](int channel) const {
    if (!data) return 0.0f;
    const int64_t i = blockIdx.y * image_step + channel * step;
    return is_float ? static_cast<const float*>(data)[i] : static_cast<float>(static_cast<const T*>(data)[i]);
  }
};

template <typename T>
struct Norm {
  Vector<T> weight, bias, addend;
};

// Where numbers are stored as one of the dtypes; nowhere without data.
struct Target {
  void* data;
  ScalarType type;

  __device__ void store(int64_t i, float value) const {
    if (type == ScalarType::Half) static_cast<Half*>(data)[i] = value;
    if (type == ScalarType::BFloat16) static_cast<BFloat16*>(data)[i] = value;
    if (type == ScalarType::Float) static_cast<float*>(data)[i] = value;
  }
};

// mean and rstd = 1 / std of each image and group
template <typename Number>
struct Statistics {
  Number *mean, *rstd;
};

// The place of a thread in its block's tile, in packs of V channels.
struct Lane {
  int packs;      // of the thread; none if it only helps to add up
  int channel;    // of the block's, the first of its packs
  int64_t first;  // its first pack in the batch
  int64_t step;   // from a pack to its next one in the batch
  int slab_step;  // and in the slab, where its first one has the thread's number

  __device__ Lane(const Tile& tile, int V) {
    const int row = threadIdx.x / tile.columns, column = threadIdx.x % tile.columns;
    const int of_pixel = tile.channels / V;
    packs = threadIdx.x < tile.threads ? (tile.pixels - row + tile.rows - 1) / tile.rows : 0;
    channel = threadIdx.x < tile.threads ? column * V : 0;
    first = (static_cast<int64_t>(blockIdx.y) * tile.pixels + row) * of_pixel + blockIdx.x * tile.columns + column;
    step = static_cast<int64_t>(tile.rows) * of_pixel;
    slab_step = tile.threads;
  }

  __device__ int in_slab(int k) const { return threadIdx.x + k * slab_step; }
};

template <typename P>
__device__ void copy_async(P* to, const P* from) {
  // the hardware copies no less than 4 bytes without a register
  if constexpr (sizeof(P) < 4)
    *to = *from;
  else
    __pipeline_memcpy_async(to, from, sizeof(P));
}

// Calls copy(k) for each pack of the thread, which starts to copy it, and use(k) once it has arrived.
template <typename Copy, typename Use>
__device__ void pipeline(int packs, const Copy& copy, const Use& use) {
#pragma unroll 1
  for (int k = 0; k < packs + AHEAD; ++k) {
    if (k < packs) copy(k);
    // also where nothing is left to copy: the wait counts these marks
    __pipeline_commit();
    if (k < AHEAD) continue;
    __pipeline_wait_prior(AHEAD);
    use(k - AHEAD);
  }
}

// Adds up what the threads have found for each of the block's channels, sums[channel], for all threads to read. They
// must have read earlier sums: `sum_groups` waits for that.
template <int V>
__device__ void sum_channels(const Tile& tile, const float (&found)[V], float* sums) {
  if (threadIdx.x < tile.threads)
#pragma unroll
    for (int j = 0; j < V; ++j) sums[threadIdx.x * V + j] = found[j];
  __syncthreads();
  for (int rows = tile.rows; rows > 1;) {
    const int half = (rows + 1) / 2;
    for (int i = threadIdx.x; i < (rows - half) * tile.width; i += blockDim.x) sums[i] += sums[half * tile.width + i];
    __syncthreads();
    rows = half;
  }
}

// Calls store(group, sum) in one thread for each of the block's groups, with the sum of of_channel over its channels.
// All threads see what is stored.
template <typename OfChannel, typename Store>
__device__ void sum_groups(const Tile& tile, const OfChannel& of_channel, const Store& store) {
  const int lane = threadIdx.x % WARP;
  for (int group = threadIdx.x / WARP; group < tile.groups; group += blockDim.x / WARP) {
    float sum = 0;
    for (int i = lane; i < tile.group_size; i += WARP) sum += of_channel(group * tile.group_size + i);
    for (int offset = WARP / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (lane == 0) store(group, sum);
  }
  __syncthreads();
}

__device__ float sigmoid(float z) { return __fdividef(1.0f, 1.0f + __expf(-z)); }

template <typename P>
__global__ void __launch_bounds__(MOST_THREADS, 1) groupnorm_silu_fwd_kernel(
    const P* x, Norm<typename P::Element> norm, Statistics<float> to, Tile tile, float eps, bool silu, P* y) {
  constexpr int V = P::WIDTH;
  P* slab = reinterpret_cast<P*>(shared_memory);
  float* sums = reinterpret_cast<float*>(shared_memory + tile.slab_bytes);
  float* mean = sums + tile.rows * tile.width;
  float* rstd = mean + tile.groups;
  const Lane lane(tile, V);
  const int channels = blockIdx.x * tile.width;
  const int64_t statistic = (static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x) * tile.groups;
  const float count = static_cast<float>(tile.group_size) * tile.pixels;

  float found[V] = {};
  const auto copy = [&](int k) { copy_async(slab + lane.in_slab(k), x + lane.first + k * lane.step); };
  pipeline(lane.packs, copy, [&](int k) {
    const P pack = slab[lane.in_slab(k)];
#pragma unroll
    for (int j = 0; j < V; ++j) found[j] += static_cast<float>(pack.values[j]);
  });
  sum_channels(tile, found, sums);
  sum_groups(
      tile, [&](int c) { return sums[c] + tile.pixels * norm.addend[channels + c]; },
      [&](int group, float sum) { to.mean[statistic + group] = mean[group] = sum / count; });

  // The squares are of distances from the mean. E[x^2] - E[x]^2 would need no second pass over the slab, but it loses
  // all digits to cancellation where the mean is large.
  float shift[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const int c = lane.channel + j;
    shift[j] = mean[c / tile.group_size] - norm.addend[channels + c];
    found[j] = 0;
  }
#pragma unroll 4
  for (int k = 0; k < lane.packs; ++k) {
    const P pack = slab[lane.in_slab(k)];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float distance = static_cast<float>(pack.values[j]) - shift[j];
      found[j] += distance * distance;
    }
  }
  sum_channels(tile, found, sums);
  sum_groups(
      tile, [&](int c) { return sums[c]; },
      [&](int group, float sum) { to.rstd[statistic + group] = rstd[group] = 1.0f / sqrtf(sum / count + eps); });

  float scale[V], bias[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const int c = lane.channel + j;
    scale[j] = rstd[c / tile.group_size] * norm.weight[channels + c];
    bias[j] = norm.bias[channels + c];
  }
#pragma unroll 1
  for (int k = 0; k < lane.packs; ++k) {
    P pack = slab[lane.in_slab(k)];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float z = (static_cast<float>(pack.values[j]) - shift[j]) * scale[j] + bias[j];
      pack.values[j] = silu ? z * sigmoid(z) : z;
    }
    y[lane.first + k * lane.step] = pack;
  }
}

// `parts` [3, images, channels] gets each image's gradients of weight and bias and, if there is no `daddend` [images,
// channels] that does, of the addend; without parts nothing does.
template <typename P>
struct Gradients {
  const P *x, *grad, *skip;
  P* dx;
  float* parts;
  Target daddend;
};

template <typename P>
__global__ void __launch_bounds__(MOST_THREADS, 1) groupnorm_silu_bwd_kernel(
    Gradients<P> of, Norm<typename P::Element> norm, Statistics<const float> statistics, Tile tile, bool silu) {
  constexpr int V = P::WIDTH;
  P* slab = reinterpret_cast<P*>(shared_memory);
  P* grad_slab = reinterpret_cast<P*>(shared_memory + tile.slab_bytes);
  float* sums = reinterpret_cast<float*>(shared_memory + 2 * tile.slab_bytes);
  // sums over a group, divided by its size: of h, the gradient of xhat, and of h xhat
  float* along_one = sums + tile.rows * tile.width;
  float* along_x = along_one + tile.groups;
  const Lane lane(tile, V);
  const int channels = blockIdx.x * tile.width;
  const int64_t statistic = (static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x) * tile.groups;
  const float count = static_cast<float>(tile.group_size) * tile.pixels;
  const int64_t vector = static_cast<int64_t>(gridDim.y) * tile.channels;
  const int64_t of_image = static_cast<int64_t>(blockIdx.y) * tile.channels + channels;

  float shift[V], scale[V], bias[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const int c = lane.channel + j;
    shift[j] = statistics.mean[statistic + c / tile.group_size] - norm.addend[channels + c];
    scale[j] = statistics.rstd[statistic + c / tile.group_size] * norm.weight[channels + c];
    bias[j] = norm.bias[channels + c];
  }
  // The gradient of z = centred scale + bias, which is computed again so that the forward pass need not save it.
  const auto of_z = [&](float centred, float grad, int j) {
    if (!silu) return grad;
    const float z = centred * scale[j] + bias[j], s = sigmoid(z);
    return grad * s * (1.0f + z * (1.0f - s));
  };

  float dz[V] = {}, products[V] = {};
  const auto copy = [&](int k) {
    copy_async(slab + lane.in_slab(k), of.x + lane.first + k * lane.step);
    copy_async(grad_slab + lane.in_slab(k), of.grad + lane.first + k * lane.step);
  };
  pipeline(lane.packs, copy, [&](int k) {
    const P pack = slab[lane.in_slab(k)], grad = grad_slab[lane.in_slab(k)];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float centred = static_cast<float>(pack.values[j]) - shift[j];
      const float g = of_z(centred, static_cast<float>(grad.values[j]), j);
      dz[j] += g;
      products[j] += g * centred;
    }
  });

  sum_channels(tile, dz, sums);
  if (of.parts)
    for (int c = threadIdx.x; c < tile.width; c += blockDim.x) of.parts[vector + of_image + c] = sums[c];
  sum_groups(
      tile, [&](int c) { return sums[c] * norm.weight[channels + c]; },
      [&](int group, float sum) { along_one[group] = sum / count; });
  sum_channels(tile, products, sums);
  const auto product = [&](int c) { return sums[c] * statistics.rstd[statistic + c / tile.group_size]; };
  if (of.parts)
    for (int c = threadIdx.x; c < tile.width; c += blockDim.x) of.parts[of_image + c] = product(c);
  sum_groups(
      tile, [&](int c) { return product(c) * norm.weight[channels + c]; },
      [&](int group, float sum) { along_x[group] = sum / count; });

  // xhat does not change if a constant is added to x or x is scaled (up to eps), so dx has no component along the
  // constant vector or along xhat: dx = rstd (h - mean(h) - xhat mean(h xhat)), with xhat = centred rstd.
  float slope[V], offset[V], of_addend[V] = {};
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const int group = (lane.channel + j) / tile.group_size;
    const float rstd = statistics.rstd[statistic + group];
    slope[j] = -rstd * rstd * along_x[group];
    offset[j] = -rstd * along_one[group];
  }
#pragma unroll 1
  for (int k = 0; k < lane.packs; ++k) {
    const P grad = grad_slab[lane.in_slab(k)];
    P pack = slab[lane.in_slab(k)], skip;
    if (of.skip) skip = of.skip[lane.first + k * lane.step];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float centred = static_cast<float>(pack.values[j]) - shift[j];
      float dx = of_z(centred, static_cast<float>(grad.values[j]), j) * scale[j] + (centred * slope[j] + offset[j]);
      if (of.skip) dx += static_cast<float>(skip.values[j]);
      of_addend[j] += dx;
      pack.values[j] = dx;
    }
    of.dx[lane.first + k * lane.step] = pack;
  }
  if (!of.parts && !of.daddend.data) return;
  sum_channels(tile, of_addend, sums);
  for (int c = threadIdx.x; c < tile.width; c += blockDim.x) {
    if (of.daddend.data) of.daddend.store(of_image + c, sums[c]);
    if (of.parts) of.parts[2 * vector + of_image + c] = sums[c];
  }
}

// Stores the sums over the images of vectors [grid's y, images, channels], for a warp's width of channels. Atomic
// additions in the kernel above would save the launch, but their order, and so the last bits, would differ.
__global__ void __launch_bounds__(MOST_THREADS, 1)
    groupnorm_silu_sum_kernel(const float* parts, int images, int channels, Target to) {
  float* sums = reinterpret_cast<float*>(shared_memory);
  const int channel = blockIdx.x * WARP + threadIdx.x % WARP;
  const float* of = parts + static_cast<int64_t>(blockIdx.y) * images * channels + channel;
  float sum = 0;
  if (channel < channels)
    for (int64_t i = threadIdx.x / WARP; i < images; i += blockDim.x / WARP) sum += of[i * channels];
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= WARP || channel >= channels) return;
  for (int i = threadIdx.x + WARP; i < blockDim.x; i += WARP) sum += sums[i];
  to.store(static_cast<int64_t>(blockIdx.y) * channels + channel, sum);
}

}  // namespace
}  // namespace ddpo_fast
