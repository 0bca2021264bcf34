// Launches of the kernels in `groupnorm_silu.cuh`.
#include "groupnorm_silu.cuh"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>

namespace ddpo_fast {
namespace {

constexpr int FEWEST_THREADS = 64;
// of the sums of channels of all threads
constexpr int MOST_SUM_BYTES = MOST_THREADS * 8 * sizeof(float);
constexpr int MOST_IMAGES = 65535;  // of a grid

// A launch: the tile of a block, the bytes of a pack, and the block's threads and shared memory.
struct Plan {
  Tile tile;
  dim3 grid;
  int pack_bytes, threads, shared_bytes;
  bool fits;
};

int attribute(cudaDeviceAttr name, const Tensor& x) {
  int value = 0;
  STD_TORCH_CHECK(
      cudaDeviceGetAttribute(&value, name, x.get_device_index()) == cudaSuccess, "the device has no such attribute");
  return value;
}

// `slabs` is the number of tensors that are kept. The plan fits if the device has the shared memory that it asks for.
// `addresses` is the union of all bits of the addresses that packs are loaded from and stored to.
Plan plan_of(const Tensor& x, int64_t groups, int slabs, uintptr_t addresses = 0) {
  STD_TORCH_CHECK(
      x.dim() >= 2 && groups > 0 && x.size(1) % groups == 0, "x must have a multiple of ", groups, " channels");
  const int64_t images = x.size(0), channels = x.size(1), group_size = channels / groups;
  const int64_t pixels = x.numel() / std::max<int64_t>(1, images * channels), itemsize = x.element_size();
  const int64_t limit = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, x);
  const int64_t processors = attribute(cudaDevAttrMultiProcessorCount, x);
  const auto slab_bytes = [&](int64_t owned) { return (owned * group_size * pixels * itemsize + 15) / 16 * 16; };

  // A group has a short segment of memory in each pixel: 20 bytes for 10 channels of half precision. Of neighbouring
  // groups a block can load whole 32-byte sectors, 16 bytes at a time. Groups are joined only as long as two blocks
  // fit on a multiprocessor, of which one loads while the other computes, and enough are left for all of them.
  int64_t owned = 1;
  const auto is_short = [&](int64_t bytes) { return bytes < 64 || bytes % 16 != 0; };
  while (groups % (2 * owned) == 0 && is_short(owned * group_size * itemsize) &&
         slabs * slab_bytes(2 * owned) <= limit / 2 - MOST_SUM_BYTES && images * groups >= 2 * owned * 2 * processors)
    owned *= 2;
  const int64_t width = owned * group_size;
  int64_t pack_bytes = 16;
  while ((width * itemsize | addresses) % pack_bytes) pack_bytes /= 2;
  const int64_t columns = width * itemsize / pack_bytes;

  Plan plan{};
  int64_t threads = MOST_THREADS;
  // four packs or more for a thread
  while (threads > FEWEST_THREADS && threads / 2 >= columns && threads * 2 >= pixels * columns) threads /= 2;
  const auto rows = [&] { return std::min(threads / columns, pixels); };
  const auto bytes = [&]() -> int64_t {
    return slabs * slab_bytes(owned) + (rows() * width + 2 * owned) * sizeof(float);
  };
  // The sums of half as many threads may fit beside a slab. With still fewer, little would be under way.
  if (threads == MOST_THREADS && bytes() > limit && threads / 2 >= columns) threads /= 2;
  plan.fits = images <= MOST_IMAGES && rows() > 0 && bytes() <= limit;
  if (!plan.fits) return plan;
  const auto number = [](int64_t value) { return static_cast<int>(value); };
  plan.tile = {
      number(channels),
      number(pixels),
      number(owned),
      number(group_size),
      number(width),
      number(columns),
      number(rows()),
      number(rows() * columns),
      number(slab_bytes(owned))};
  plan.grid = dim3(groups / owned, images);
  plan.pack_bytes = number(pack_bytes);
  plan.threads = number(threads);
  plan.shared_bytes = number(bytes());
  return plan;
}

// The plan of a launch that keeps `slabs` of these tensors, x and others like it.
Plan checked_plan(int64_t groups, int slabs, std::initializer_list<std::pair<const char*, const Tensor*>> tensors) {
  const Tensor& x = *tensors.begin()->second;
  uintptr_t addresses = 0;
  for (const auto& [name, tensor] : tensors) {
    check_like(name, *tensor, x);
    STD_TORCH_CHECK(is_channels_last(*tensor), name, " must be channels_last");
    addresses |= reinterpret_cast<uintptr_t>(tensor->const_data_ptr());
  }
  const Plan plan = plan_of(x, groups, slabs, addresses);
  STD_TORCH_CHECK(plan.fits, "the groups of x must fit into the device's shared memory");
  return plan;
}

// Launches a kernel on the current stream of a tensor's device.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const Tensor& like, const Plan& plan, Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = plan.grid;
  config.blockDim = dim3(plan.threads);
  config.dynamicSmemBytes = plan.shared_bytes;
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  config.stream = static_cast<cudaStream_t>(stream);
  // without this a kernel may use 48 KB of shared memory
  cudaError_t error = cudaFuncSetAttribute(
      reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, arguments...);
  STD_TORCH_CHECK(error == cudaSuccess, "the launch failed: ", cudaGetErrorString(error));
}

// Calls f with a null pointer to the packs of a plan. f uses only the type of its argument.
template <typename F>
void for_packs(const Tensor& x, int bytes, const F& f) {
  for_dtype(x, [&](auto kind) {
    using T = decltype(kind);
    constexpr int SIZE = sizeof(T);
    if (bytes == 16) return f(static_cast<Pack<T, 16 / SIZE>*>(nullptr));
    if (bytes == 8) return f(static_cast<Pack<T, 8 / SIZE>*>(nullptr));
    if (bytes == 4) return f(static_cast<Pack<T, 4 / SIZE>*>(nullptr));
    if constexpr (SIZE == 2) return f(static_cast<Pack<T, 1>*>(nullptr));
  });
}

template <typename T>
Vector<T> vector_of(const char* name, const std::optional<Tensor>& vector, const Tensor& x) {
  if (!vector) return {};
  const bool is_float = vector->scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(is_float || vector->scalar_type() == x.scalar_type(), name, " must be fp32 or have the dtype of x");
  const int64_t last = vector->dim() - 1, images = last == 0 || vector->size(0) == 1 ? 1 : x.size(0);
  last == 0 ? check_shape(name, *vector, {x.size(1)}) : check_shape(name, *vector, {images, x.size(1)});
  return {vector->const_data_ptr(), is_float, vector->stride(last), images == 1 ? 0 : vector->stride(0)};
}

template <typename T>
Norm<T> norm_of(const Tensor& x, const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& addend) {
  return {vector_of<T>("weight", weight, x), vector_of<T>("bias", bias, x), vector_of<T>("addend", addend, x)};
}

Target target_of(const char* name, const std::optional<Tensor>& tensor, int64_t rows, const Tensor& x) {
  if (!tensor) return {};
  for_dtype(*tensor, [](auto) {});
  check_shape(name, *tensor, {rows, x.size(1)});
  STD_TORCH_CHECK(tensor->is_contiguous(), name, " must be contiguous");
  return {tensor->mutable_data_ptr(), tensor->scalar_type()};
}

void check_statistics(const Tensor& x, const Tensor& mean, const Tensor& rstd) {
  CHECK_SHAPE(mean, x.size(0), mean.size(1));
  CHECK_SHAPE(rstd, x.size(0), mean.size(1));
  for (const Tensor* statistic : {&mean, &rstd})
    STD_TORCH_CHECK(
        statistic->is_contiguous() && statistic->scalar_type() == ScalarType::Float, "statistics must be dense fp32");
}

// Whether the device's shared memory holds what a block keeps of x: its groups, and backward those of the gradient too.
bool groupnorm_silu_fits(const Tensor& x, int64_t groups, bool backward) {
  return is_channels_last(x) && plan_of(x, groups, backward ? 2 : 1).fits;
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
  const Plan plan = checked_plan(mean.size(1), 1, {{"x", &x}, {"y", &y}});
  check_statistics(x, mean, rstd);
  for_packs(x, plan.pack_bytes, [&](auto* kind) {
    using P = std::remove_pointer_t<decltype(kind)>;
    launch(
        groupnorm_silu_fwd_kernel<P>, x, plan, static_cast<const P*>(x.const_data_ptr()),
        norm_of<typename P::Element>(x, weight, bias, addend),
        Statistics<float>{mean.mutable_data_ptr<float>(), rstd.mutable_data_ptr<float>()}, plan.tile,
        static_cast<float>(eps), silu, static_cast<P*>(y.mutable_data_ptr()));
  });
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
  const Plan plan =
      checked_plan(mean.size(1), 2, {{"x", &x}, {"grad", &grad}, {"dx", &dx}, {"skip", skip ? &*skip : &x}});
  check_statistics(x, mean, rstd);
  const int64_t images = x.size(0), channels = x.size(1);
  const Target affine = target_of("daffine", daffine, 2, x);
  const bool shared = addend && addend->size(0) != images;
  const Target added = target_of("daddend", daddend, shared ? 1 : images, x);
  float* parts = nullptr;
  std::optional<Tensor> kept;
  if (daffine || (daddend && shared)) {
    kept = torch::stable::new_empty(mean, {3 * images * channels});
    parts = kept->mutable_data_ptr<float>();
  }
  for_packs(x, plan.pack_bytes, [&](auto* kind) {
    using P = std::remove_pointer_t<decltype(kind)>;
    const Gradients<P> of{
        static_cast<const P*>(x.const_data_ptr()),
        static_cast<const P*>(grad.const_data_ptr()),
        skip ? static_cast<const P*>(skip->const_data_ptr()) : nullptr,
        static_cast<P*>(dx.mutable_data_ptr()),
        parts,
        shared ? Target{} : added};
    launch(
        groupnorm_silu_bwd_kernel<P>, x, plan, of, norm_of<typename P::Element>(x, weight, bias, addend),
        Statistics<const float>{mean.const_data_ptr<float>(), rstd.const_data_ptr<float>()}, plan.tile, silu);
  });
  const auto sum_images = [&](const float* from, unsigned vectors, const Target& to) {
    Plan sums{};
    sums.grid = dim3((channels + WARP - 1) / WARP, vectors);
    sums.threads = 8 * WARP;
    sums.shared_bytes = sums.threads * sizeof(float);
    launch(groupnorm_silu_sum_kernel, x, sums, from, static_cast<int>(images), static_cast<int>(channels), to);
  };
  if (daffine) sum_images(parts, 2, affine);
  if (daddend && shared) sum_images(parts + 2 * images * channels, 1, added);
}

}  // namespace
}  // namespace ddpo_fast

STABLE_TORCH_LIBRARY_IMPL(ddpo_fast_csrc, CUDA, m) {
  m.impl("groupnorm_silu", TORCH_BOX(&ddpo_fast::groupnorm_silu));
  m.impl("groupnorm_silu_backward", TORCH_BOX(&ddpo_fast::groupnorm_silu_backward));
  m.impl("groupnorm_silu_fits", TORCH_BOX(&ddpo_fast::groupnorm_silu_fits));
}
