#include "groupnorm_silu.h"

#include <cmath>

namespace ddpo_fast {
namespace {

template <bool LAST>
struct ForwardScratch {
  std::vector<float> buffer, made;
  ChannelSums<LAST, double> sums, squares;
  Norm norm;

  explicit ForwardScratch(const Images& n)
      : buffer(std::max(PIECE, n.width)), made(buffer.size()), sums(n), squares(n), norm(n) {}
};

// Sums the channels of a block and their squares.
template <bool LAST, typename T>
void add_up(const Images& n, const Block& block, const T* x, ForwardScratch<LAST>& scratch) {
  constexpr int64_t AT_ONCE = 4;
  scratch.sums.start();
  scratch.squares.start();
  for_tiles<LAST>(n, block, [&](const Tile& tile) {
    const Runs from = load_runs(x + tile.at, tile.stride, tile.rows, tile.width, scratch.buffer.data());
    double *sum = scratch.sums.lanes.data(), *square = scratch.squares.lanes.data();
    int64_t row = 0;
    for (; row + AT_ONCE <= tile.rows; row += AT_ONCE)
      add_squares<AT_ONCE>(from.data + row * from.stride, from.stride, tile.width, sum, square);
    for (; row < tile.rows; ++row) add_squares<1>(from.data + row * from.stride, from.stride, tile.width, sum, square);
    scratch.sums.add_lanes(tile);
    scratch.squares.add_lanes(tile);
  });
}

// Sets the norms and statistics of a block's groups from the sums of its channels.
template <bool LAST>
void set_norms(
    const Images& n,
    const Block& block,
    const Parameters& parameters,
    double eps,
    ForwardScratch<LAST>& scratch,
    float* means,
    float* rstds) {
  const double count = static_cast<double>(n.group_size * n.pixels);
  for (int64_t group = 0; group < block.width / n.group_size; ++group) {
    double sum = 0, square = 0;
    for (int64_t i = group * n.group_size; i < (group + 1) * n.group_size; ++i) {
      // of the sums with the addend
      const double added = parameters.added_to(block.image, block.first + i), total = scratch.sums.total[i];
      sum += total + n.pixels * added;
      square += scratch.squares.total[i] + added * (2 * total + n.pixels * added);
    }
    const double mean = sum / count, variance = square / count - mean * mean;
    // a NaN stays
    const double rstd = 1 / std::sqrt((variance < 0 ? 0 : variance) + eps);
    const int64_t at = block.image * n.groups + block.first / n.group_size + group;
    means[at] = static_cast<float>(mean);
    rstds[at] = static_cast<float>(rstd);
    parameters.set(scratch.norm, n, block, group, mean, rstd);
  }
}

template <bool LAST, bool SILU, typename T>
void forward(const Images& n, const T* x, const Parameters& parameters, double eps, T* y, float* means, float* rstds) {
  for_blocks<ForwardScratch<LAST>>(n, [&](const Block& block, ForwardScratch<LAST>& scratch) {
    add_up<LAST>(n, block, x, scratch);
    set_norms<LAST>(n, block, parameters, eps, scratch, means, rstds);
    const Norm& norm = scratch.norm;
    for_tiles<LAST>(n, block, [&](const Tile& tile) {
      const Runs from = load_runs(x + tile.at, tile.stride, tile.rows, tile.width, scratch.buffer.data());
      const Runs to = runs_to_store(y + tile.at, tile.stride, tile.width, scratch.made.data());
      for (int64_t row = 0; row < tile.rows; ++row)
        normalize<LAST, SILU>(
            from.data + row * from.stride, tile.width, norm.shift.data() + tile.channel,
            norm.scale.data() + tile.channel, norm.bias.data() + tile.channel, to.data + row * to.stride);
      store_runs(scratch.made.data(), tile.rows, tile.width, y + tile.at, tile.stride);
    });
  });
}

void check_statistics(const Images& n, const Tensor& mean, const Tensor& rstd) {
  CHECK_SHAPE(mean, n.images, n.groups);
  CHECK_SHAPE(rstd, n.images, n.groups);
  for (const Tensor* statistic : {&mean, &rstd})
    STD_TORCH_CHECK(
        statistic->is_contiguous() && statistic->scalar_type() == ScalarType::Float, "statistics must be dense fp32");
}

void groupnorm_silu(
    const Tensor& x,
    const Tensor& weight,
    const Tensor& bias,
    double eps,
    bool silu,
    const std::optional<Tensor>& addend,
    const Tensor& y,
    const Tensor& mean,
    const Tensor& rstd) {
  const Images n = images_of(x, mean.size(1));
  check_like("y", y, x);
  check_statistics(n, mean, rstd);
  const Parameters parameters(n, weight, bias, addend);
  for_dtype(x, [&](auto kind) {
    using T = decltype(kind);
    const auto run = [&](auto last, auto with_silu) {
      forward<last(), with_silu()>(
          n, static_cast<const T*>(x.const_data_ptr()), parameters, eps, static_cast<T*>(y.mutable_data_ptr()),
          mean.mutable_data_ptr<float>(), rstd.mutable_data_ptr<float>());
    };
    const auto run_layout = [&](auto last) { silu ? run(last, std::true_type{}) : run(last, std::false_type{}); };
    n.channels_last ? run_layout(std::true_type{}) : run_layout(std::false_type{});
  });
}

// The tensors of the backward pass, and its sums of each image and channel.
template <typename T>
struct Gradients {
  const T *x, *grad, *skip;
  T* dx;
  std::vector<float> weight, bias, addend;
};

template <bool LAST, typename T>
struct BackwardScratch {
  std::vector<float> buffer, upper;
  // the gradient of z, which is kept where that of x will be if it is fp32
  std::vector<float> wide;
  ChannelSums<LAST, float> sums, products, added;
  Norm norm;
  std::vector<float> slope, offset;

  explicit BackwardScratch(const Images& n)
      : buffer(std::max(PIECE, n.width)),
        upper(buffer.size()),
        wide(std::is_same_v<T, float> ? 0 : n.width * n.pixels),
        sums(n),
        products(n),
        added(n),
        norm(n),
        slope(n.width),
        offset(n.width) {}

  Runs gradients_of(const Tile& tile, T* dx) {
    return runs_to_store(dx + tile.at, tile.stride, tile.width, wide.data() + tile.before);
  }
};

// Computes the gradient of z, and the sums over the pixels from which the others follow.
template <bool LAST, bool SILU, typename T>
void differentiate_block(
    const Images& n, const Block& block, const Gradients<T>& of, BackwardScratch<LAST, T>& scratch) {
  const Norm& norm = scratch.norm;
  scratch.sums.start();
  scratch.products.start();
  for_tiles<LAST>(n, block, [&](const Tile& tile) {
    const Runs from = load_runs(of.x + tile.at, tile.stride, tile.rows, tile.width, scratch.buffer.data());
    const Runs above = load_runs(of.grad + tile.at, tile.stride, tile.rows, tile.width, scratch.upper.data());
    const Runs to = scratch.gradients_of(tile, of.dx);
    for (int64_t row = 0; row < tile.rows; ++row)
      differentiate<LAST, SILU>(
          from.data + row * from.stride, above.data + row * above.stride, tile.width, norm.shift.data() + tile.channel,
          norm.scale.data() + tile.channel, norm.bias.data() + tile.channel, to.data + row * to.stride,
          scratch.sums.lanes.data(), scratch.products.lanes.data());
    scratch.sums.add_lanes(tile);
    scratch.products.add_lanes(tile);
  });
}

// Sets the gradients of weight and bias and, with the group's means m1 of weight dz and m2 of weight dz xhat, what
// makes dx = rstd (weight dz - m1 - xhat m2).
template <bool LAST, typename T>
void set_slopes(
    const Images& n,
    const Block& block,
    const Parameters& parameters,
    const float* rstds,
    Gradients<T>& of,
    BackwardScratch<LAST, T>& scratch) {
  const double count = static_cast<double>(n.group_size * n.pixels);
  for (int64_t group = 0; group < block.width / n.group_size; ++group) {
    const double rstd = rstds[group];
    double m1 = 0, m2 = 0;
    for (int64_t i = group * n.group_size; i < (group + 1) * n.group_size; ++i) {
      const int64_t channel = block.image * n.channels + block.first + i;
      const double weight = parameters.weight[block.first + i];
      const double sum = scratch.sums.total[i], product = scratch.products.total[i] * rstd;
      m1 += weight * sum / count;
      m2 += weight * product / count;
      of.weight[channel] = static_cast<float>(product);
      of.bias[channel] = static_cast<float>(sum);
    }
    for (int64_t i = group * n.group_size; i < (group + 1) * n.group_size; ++i) {
      scratch.slope[i] = static_cast<float>(-rstd * rstd * m2);
      scratch.offset[i] = static_cast<float>(-rstd * m1);
    }
  }
}

// Computes the gradient of x from that of z.
template <bool LAST, typename T>
void finish_block(const Images& n, const Block& block, Gradients<T>& of, BackwardScratch<LAST, T>& scratch) {
  const Norm& norm = scratch.norm;
  scratch.added.start();
  for_tiles<LAST>(n, block, [&](const Tile& tile) {
    const Runs from = load_runs(of.x + tile.at, tile.stride, tile.rows, tile.width, scratch.buffer.data());
    const Runs to = scratch.gradients_of(tile, of.dx);
    for (int64_t row = 0; row < tile.rows; ++row)
      finish<LAST>(
          from.data + row * from.stride, tile.width, norm.shift.data() + tile.channel, norm.scale.data() + tile.channel,
          scratch.slope.data() + tile.channel, scratch.offset.data() + tile.channel, to.data + row * to.stride,
          scratch.added.lanes.data());
    scratch.added.add_lanes(tile);
    if (of.skip) {
      const Runs skip = load_runs(of.skip + tile.at, tile.stride, tile.rows, tile.width, scratch.upper.data());
      for (int64_t row = 0; row < tile.rows; ++row)
        for (int64_t i = 0; i < tile.width; ++i) to.data[row * to.stride + i] += skip.data[row * skip.stride + i];
    }
    store_runs(to.data, tile.rows, tile.width, of.dx + tile.at, tile.stride);
  });
  for (int64_t i = 0; i < block.width; ++i)
    of.addend[block.image * n.channels + block.first + i] = static_cast<float>(scratch.added.total[i]);
}

template <bool LAST, bool SILU, typename T>
void backward(const Images& n, const Parameters& parameters, const float* means, const float* rstds, Gradients<T>& of) {
  using Scratch = BackwardScratch<LAST, T>;
  for_blocks<Scratch>(n, [&](const Block& block, Scratch& scratch) {
    const int64_t first = block.image * n.groups + block.first / n.group_size;
    for (int64_t group = 0; group < block.width / n.group_size; ++group)
      parameters.set(scratch.norm, n, block, group, means[first + group], rstds[first + group]);
    differentiate_block<LAST, SILU>(n, block, of, scratch);
    set_slopes<LAST>(n, block, parameters, rstds + first, of, scratch);
    finish_block<LAST>(n, block, of, scratch);
  });
}

// Adds up the sums of all images, in their order, and stores them as a row of `to`.
void store_total(const Images& n, const std::vector<float>& sums, const Tensor& to, int64_t row) {
  std::vector<float> total(n.channels);
  for (int64_t channel = 0; channel < n.channels; ++channel) {
    double sum = 0;
    for (int64_t image = 0; image < n.images; ++image) sum += sums[image * n.channels + channel];
    total[channel] = static_cast<float>(sum);
  }
  store_numbers(total.data(), n.channels, to, row * n.channels);
}

void groupnorm_silu_backward(
    const Tensor& x,
    const Tensor& grad,
    const std::optional<Tensor>& skip,
    const Tensor& weight,
    const Tensor& bias,
    const std::optional<Tensor>& addend,
    const Tensor& mean,
    const Tensor& rstd,
    bool silu,
    const Tensor& dx,
    const std::optional<Tensor>& daffine,
    const std::optional<Tensor>& daddend) {
  const Images n = images_of(x, mean.size(1));
  check_like("grad", grad, x);
  check_like("dx", dx, x);
  if (skip) check_like("skip", *skip, x);
  check_statistics(n, mean, rstd);
  if (daffine) {
    check_shape("daffine", *daffine, {2, n.channels});
    CHECK_CONTIGUOUS(*daffine);
  }
  const Parameters parameters(n, weight, bias, addend);
  if (daddend) {
    check_shape("daddend", *daddend, {addend ? addend->size(0) : n.images, n.channels});
    CHECK_CONTIGUOUS(*daddend);
  }
  for_dtype(x, [&](auto kind) {
    using T = decltype(kind);
    const size_t numbers = n.images * n.channels;
    Gradients<T> of{
        static_cast<const T*>(x.const_data_ptr()),
        static_cast<const T*>(grad.const_data_ptr()),
        skip ? static_cast<const T*>(skip->const_data_ptr()) : nullptr,
        static_cast<T*>(dx.mutable_data_ptr()),
        std::vector<float>(numbers),
        std::vector<float>(numbers),
        std::vector<float>(numbers)};
    const auto run = [&](auto last, auto with_silu) {
      backward<last(), with_silu()>(n, parameters, mean.const_data_ptr<float>(), rstd.const_data_ptr<float>(), of);
    };
    const auto run_layout = [&](auto last) { silu ? run(last, std::true_type{}) : run(last, std::false_type{}); };
    n.channels_last ? run_layout(std::true_type{}) : run_layout(std::false_type{});
    if (daffine) {
      store_total(n, of.weight, *daffine, 0);
      store_total(n, of.bias, *daffine, 1);
    }
    if (daddend && daddend->size(0) == n.images) store_numbers(of.addend.data(), numbers, *daddend, 0);
    if (daddend && daddend->size(0) != n.images) store_total(n, of.addend, *daddend, 0);
  });
}

}  // namespace
}  // namespace ddpo_fast

STABLE_TORCH_LIBRARY_IMPL(ddpo_fast_csrc, CPU, m) {
  m.impl("groupnorm_silu", TORCH_BOX(&ddpo_fast::groupnorm_silu));
  m.impl("groupnorm_silu_backward", TORCH_BOX(&ddpo_fast::groupnorm_silu_backward));
}
