// The groups of a batch of images, in either memory layout, as runs of numbers, and the loops over a run, which
// compilers vectorise.
#pragma once

#include "elementwise.h"

#include <numeric>

namespace ddpo_fast {

// the lanes in which a sum over consecutive pixels of a channel is kept
constexpr int64_t LANES = 64;
// A thread computes at least as many channels of a channels_last image at once, and more up to this number of elements,
// which stay in a second-level cache. With fewer channels, parts of cache lines would be unused. If so many channels
// have far more elements, it computes all channels, whose pixels are read in order.
constexpr int64_t LEAST_CHANNELS = 64;
constexpr int64_t MOST_ELEMENTS = 65536;
// the fp32 numbers of a vector register: a run of whole vectors has no rest
constexpr int64_t VECTOR = 16;

// A batch of images [images, channels, pixels]. `width` is the channels of a block, the groups that a thread computes
// at once.
struct Images {
  int64_t images, channels, pixels, groups, group_size, width;
  bool channels_last;

  int64_t blocks() const { return (channels + width - 1) / width; }
};

inline Images images_of(const Tensor& x, int64_t groups) {
  STD_TORCH_CHECK(x.dim() >= 2, "x must be [N, C, ...]");
  const int64_t channels = x.size(1);
  STD_TORCH_CHECK(groups > 0 && channels % groups == 0, "x must have a multiple of ", groups, " channels");
  Images n{x.size(0), channels, 1, groups, channels / groups, channels, !x.is_contiguous()};
  for (int64_t i = 2; i < x.dim(); ++i) n.pixels *= x.size(i);
  STD_TORCH_CHECK(!n.channels_last || is_channels_last(x), "x must be contiguous or channels_last");
  n.width = n.group_size;
  if (n.channels_last) {
    const int64_t wanted = std::max(LEAST_CHANNELS, MOST_ELEMENTS / std::max<int64_t>(1, n.pixels));
    const int64_t unit = std::lcm(n.group_size, VECTOR), whole = (wanted + unit - 1) / unit * unit;
    n.width = whole * n.pixels > 2 * MOST_ELEMENTS ? channels : std::min(channels, whole);
  }
  return n;
}

// The channels of an image that are computed together.
struct Block {
  int64_t image, first, width;
};

// Calls f(block, scratch) for all blocks, in parallel. Each thread has a Scratch of its own, made from `n`.
template <typename Scratch, typename F>
void for_blocks(const Images& n, const F& f) {
  const int64_t grain = std::max<int64_t>(1, GRAIN / (n.width * n.pixels));
  torch::stable::parallel_for(0, n.images * n.blocks(), grain, [&](int64_t begin, int64_t end) {
    Scratch scratch(n);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % n.blocks() * n.width;
      f(Block{i / n.blocks(), first, std::min(n.width, n.channels - first)}, scratch);
    }
  });
}

// `rows` runs of `width` consecutive elements each, `stride` apart, from element `at` of the batch on. In a
// channels_last image a run is a pixel's channels of the block, in another one it is pixels of one channel: `channel`,
// counted from the block's first. `before` is the number of the block's elements before these.
struct Tile {
  int64_t at, stride, rows, width, channel, before;
};

// Calls f(tile) for all elements of a block. LAST is whether the images are channels_last.
template <bool LAST, typename F>
void for_tiles(const Images& n, const Block& block, const F& f) {
  const int64_t start = block.image * n.channels * n.pixels;
  if constexpr (LAST) {
    const int64_t most = std::max<int64_t>(1, PIECE / block.width);
    for (int64_t pixel = 0; pixel < n.pixels; pixel += most)
      f(Tile{
          start + pixel * n.channels + block.first, n.channels, std::min(most, n.pixels - pixel), block.width, 0,
          pixel * block.width});
  } else {
    constexpr int64_t MOST = PIECE / LANES;
    for (int64_t channel = 0; channel < block.width; ++channel) {
      const int64_t from = start + (block.first + channel) * n.pixels, before = channel * n.pixels;
      const int64_t whole = n.pixels / LANES, done = whole * LANES, left = n.pixels - done;
      for (int64_t row = 0; row < whole; row += MOST)
        f(Tile{from + row * LANES, LANES, std::min(MOST, whole - row), LANES, channel, before + row * LANES});
      if (left) f(Tile{from + done, left, 1, left, channel, before + done});
    }
  }
}

// Sums of the channels of a block. The lanes of a tile are summed in fp32 or fp64, and all lanes of a channel in fp64.
template <bool LAST, typename Number>
struct ChannelSums {
  std::vector<Number> lanes;
  std::vector<double> total;

  explicit ChannelSums(const Images& n) : lanes(std::max(LANES, n.width)), total(n.width) {}

  void start() { std::fill(total.begin(), total.end(), 0.0); }

  void add_lanes(const Tile& tile) {
    for (int64_t i = 0; i < tile.width; ++i) total[LAST ? i : tile.channel] += lanes[i];
    std::fill_n(lanes.begin(), tile.width, Number{});
  }
};

// What is the same for all pixels of a channel: z = (x - shift) * scale + bias. `shift` is the mean less the addend,
// and `scale` is weight / deviation.
struct Norm {
  std::vector<float> shift, scale, bias;

  explicit Norm(const Images& n) : shift(n.width), scale(n.width), bias(n.width) {}
};

// The vectors of the channels as fp32; `addend` is that of every image, or of all.
struct Parameters {
  std::vector<float> weight, bias;
  std::vector<std::vector<float>> addend;

  Parameters(const Images& n, const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& added) {
    CHECK_SHAPE(weight, n.channels);
    CHECK_SHAPE(bias, n.channels);
    this->weight = vector_of(weight);
    this->bias = vector_of(bias);
    if (!added) return;
    check_shape("addend", *added, {added->size(0) == 1 ? 1 : n.images, n.channels});
    for (int64_t i = 0; i < added->size(0); ++i) addend.push_back(vector_of(*added, i));
  }

  double added_to(int64_t image, int64_t channel) const {
    return addend.empty() ? 0.0 : addend[addend.size() == 1 ? 0 : image][channel];
  }

  // Sets the norm of a group, the block's number `group`.
  void set(Norm& norm, const Images& n, const Block& block, int64_t group, double mean, double rstd) const {
    for (int64_t i = group * n.group_size; i < (group + 1) * n.group_size; ++i) {
      norm.shift[i] = static_cast<float>(mean - added_to(block.image, block.first + i));
      norm.scale[i] = static_cast<float>(rstd * weight[block.first + i]);
      norm.bias[i] = bias[block.first + i];
    }
  }
};

// Adds ROWS runs of numbers, and their squares, to sums. In fp64 the variance is the mean square less the square of the
// mean, without a loss of digits that fp32 numbers have.
template <int64_t ROWS>
inline void add_squares(
    const float* __restrict x, int64_t stride, int64_t n, double* __restrict sum, double* __restrict square) {
  for (int64_t i = 0; i < n; ++i) {
    double total = sum[i], squares = square[i];
    for (int64_t row = 0; row < ROWS; ++row) {
      const double value = x[row * stride + i];
      total += value;
      squares = __builtin_fma(value, value, squares);
    }
    sum[i] = total;
    square[i] = squares;
  }
}

template <bool LAST, bool SILU>
inline void normalize(
    const float* __restrict x,
    int64_t n,
    const float* __restrict shift,
    const float* __restrict scale,
    const float* __restrict bias,
    float* __restrict y) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t c = LAST ? i : 0;
    const float z = __builtin_fmaf(x[i] - shift[c], scale[c], bias[c]);
    y[i] = SILU ? z * sigmoid(z) : z;
  }
}

// The gradient of z, and its sums and those of its products with x - shift.
template <bool LAST, bool SILU>
inline void differentiate(
    const float* __restrict x,
    const float* __restrict grad,
    int64_t n,
    const float* __restrict shift,
    const float* __restrict scale,
    const float* __restrict bias,
    float* __restrict dz,
    float* __restrict sum,
    float* __restrict product) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t c = LAST ? i : 0;
    const float centred = x[i] - shift[c];
    float g = grad[i];
    if constexpr (SILU) {
      const float z = __builtin_fmaf(centred, scale[c], bias[c]), s = sigmoid(z);
      g *= s * __builtin_fmaf(z, 1.0f - s, 1.0f);
    }
    dz[i] = g;
    sum[i] += g;
    product[i] = __builtin_fmaf(g, centred, product[i]);
  }
}

// Replaces the gradient of z by that of x, dz * scale + (x - shift) * slope + offset, and adds it to the sums.
template <bool LAST>
inline void finish(
    const float* __restrict x,
    int64_t n,
    const float* __restrict shift,
    const float* __restrict scale,
    const float* __restrict slope,
    const float* __restrict offset,
    float* __restrict dz,
    float* __restrict sum) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t c = LAST ? i : 0;
    dz[i] = __builtin_fmaf(dz[i], scale[c], __builtin_fmaf(x[i] - shift[c], slope[c], offset[c]));
    sum[i] += dz[i];
  }
}

}  // namespace ddpo_fast
