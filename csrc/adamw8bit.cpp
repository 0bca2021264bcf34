#include "adamw8bit.h"

namespace ddpo_fast {
namespace {

// so many blocks are worth a thread
constexpr int64_t GRAIN = 64;

void check(
    const Tensor& master, const Tensor& codes1, const Tensor& codes2, const Tensor& absmax1, const Tensor& absmax2,
    const Tensor& grad, const std::optional<Tensor>& out, const Tensor& maps, const Tensor& decades) {
  const int64_t n = master.numel(), blocks = (n + BLOCK - 1) / BLOCK;
  CHECK_DTYPE(master, Float);
  CHECK_SHAPE(master, n);
  CHECK_SHAPE(grad, n);
  CHECK_CONTIGUOUS(master);
  CHECK_CONTIGUOUS(grad);
  for (const Tensor* codes : {&codes1, &codes2}) {
    check_shape("codes", *codes, {n});
    STD_TORCH_CHECK(codes->is_contiguous() && codes->scalar_type() == ScalarType::Byte, "codes must be dense uint8");
  }
  for (const Tensor* absmax : {&absmax1, &absmax2}) {
    check_shape("absmax", *absmax, {blocks});
    STD_TORCH_CHECK(absmax->is_contiguous() && absmax->scalar_type() == ScalarType::Float, "absmax must be dense fp32");
  }
  if (out) {
    check_shape("out", *out, {n});
    STD_TORCH_CHECK(out->is_contiguous(), "out must be contiguous");
  }
  CHECK_SHAPE(maps, 2, BLOCK);
  CHECK_SHAPE(decades, 2, 4, DECADES);
  CHECK_DTYPE(maps, Float);
  CHECK_DTYPE(decades, Float);
  CHECK_CONTIGUOUS(maps);
  CHECK_CONTIGUOUS(decades);
}

Quantizer quantizer_of(const Tensor& decades, int64_t moment) {
  Decades d;
  std::memcpy(&d, decades.const_data_ptr<float>() + moment * 4 * DECADES, sizeof d);
  return Quantizer(d);
}

// A block that ends early, padded with weights of zero: they change no scale.
template <typename T>
void adamw_tail(
    const AdamStep& s, const T* grad, int64_t n, float* master, uint8_t* codes1, uint8_t* codes2, float& absmax1,
    float& absmax2) {
  alignas(64) float g[BLOCK] = {}, p[BLOCK] = {};
  alignas(64) uint8_t c1[BLOCK], c2[BLOCK] = {};
  std::fill_n(c1, BLOCK, 127);
  to_float(grad, n, g);
  std::copy_n(master, n, p);
  std::copy_n(codes1, n, c1);
  std::copy_n(codes2, n, c2);
  adamw_block(s, g, p, c1, c2, absmax1, absmax2);
  std::copy_n(p, n, master);
  std::copy_n(c1, n, codes1);
  std::copy_n(c2, n, codes2);
}

template <typename T>
void adamw_block_of(
    const AdamStep& s, const T* grad, float* master, uint8_t* codes1, uint8_t* codes2, float& absmax1,
    float& absmax2) {
  if constexpr (std::is_same_v<T, float>) return adamw_block(s, grad, master, codes1, codes2, absmax1, absmax2);
  alignas(64) float wide[BLOCK];
  to_float(grad, BLOCK, wide);
  adamw_block(s, wide, master, codes1, codes2, absmax1, absmax2);
}

void adamw8bit(
    const Tensor& master, const Tensor& codes1, const Tensor& codes2, const Tensor& absmax1, const Tensor& absmax2,
    const Tensor& grad, const std::optional<Tensor>& out, const Tensor& maps, const Tensor& decades, double beta1,
    double beta2, double rest1, double rest2, double decay, double eps, double step_size) {
  check(master, codes1, codes2, absmax1, absmax2, grad, out, maps, decades);
  const float* map = maps.const_data_ptr<float>();
  const AdamStep s{
      static_cast<float>(beta1), static_cast<float>(beta2), static_cast<float>(rest1), static_cast<float>(rest2),
      static_cast<float>(decay), static_cast<float>(eps), static_cast<float>(step_size), map[0], Map(map),
      Map(map + BLOCK), quantizer_of(decades, 0), quantizer_of(decades, 1)};
  const int64_t n = master.numel();
  float* p = master.mutable_data_ptr<float>();
  uint8_t* c1 = codes1.mutable_data_ptr<uint8_t>();
  uint8_t* c2 = codes2.mutable_data_ptr<uint8_t>();
  float* a1 = absmax1.mutable_data_ptr<float>();
  float* a2 = absmax2.mutable_data_ptr<float>();
  for_dtype(grad, [&](auto kind) {
    using T = decltype(kind);
    const T* g = static_cast<const T*>(grad.const_data_ptr());
    const auto step = [&](int64_t block) {
      const int64_t at = block * BLOCK, count = std::min(BLOCK, n - at);
      if (count == BLOCK)
        adamw_block_of(s, g + at, p + at, c1 + at, c2 + at, a1[block], a2[block]);
      else
        adamw_tail(s, g + at, count, p + at, c1 + at, c2 + at, a1[block], a2[block]);
      // while the block is in the cache
      if (out) for_dtype(*out, [&](auto half) {
        from_float(p + at, count, static_cast<decltype(half)*>(out->mutable_data_ptr()) + at);
      });
    };
    torch::stable::parallel_for(0, absmax1.numel(), GRAIN, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) step(block);
    });
  });
}

}  // namespace
}  // namespace ddpo_fast

STABLE_TORCH_LIBRARY_IMPL(ddpo_fast_csrc, CPU, m) { m.impl("adamw8bit", TORCH_BOX(&ddpo_fast::adamw8bit)); }
