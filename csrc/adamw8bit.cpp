#include "adamw8bit.h"

namespace ddpo_fast {
namespace {

// the fewest blocks of 256 weights that are given to a thread
constexpr int64_t GRAIN = 64;

void check(
    const Tensor& master,
    const Tensor& codes1,
    const Tensor& codes2,
    const Tensor& absmax1,
    const Tensor& absmax2,
    const Tensor& grad,
    const std::optional<Tensor>& out,
    const Tensor& maps,
    const Tensor& decades) {
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

// Converts a tensor's elements from and to fp32. The functions are chosen once for each tensor, because asking a tensor
// for its dtype takes about as long as updating a block.
struct Converter {
  char* data = nullptr;
  int64_t size = 0;
  void (*load)(const void* values, int64_t n, float* out) = nullptr;
  void (*store)(const float* values, int64_t n, void* out) = nullptr;
};

Converter converter_of(const Tensor& tensor, void* data) {
  Converter found;
  for_dtype(tensor, [&](auto kind) {
    using T = decltype(kind);
    found = {
        static_cast<char*>(data), sizeof(T),
        [](const void* values, int64_t n, float* out) { to_float(static_cast<const T*>(values), n, out); },
        [](const float* values, int64_t n, void* out) { from_float(values, n, static_cast<T*>(out)); }};
  });
  return found;
}

// Updates the last block if it has fewer than 256 weights. It is padded with weights, gradients and moments of zero,
// which do not change the block's scales; 127 is the code of zero in the signed map.
void adamw_tail(
    const AdamStep& s,
    const float* grad,
    int64_t n,
    float* master,
    uint8_t* codes1,
    uint8_t* codes2,
    float& absmax1,
    float& absmax2) {
  alignas(64) float g[BLOCK] = {}, p[BLOCK] = {};
  alignas(64) uint8_t c1[BLOCK], c2[BLOCK] = {};
  std::fill_n(c1, BLOCK, 127);
  std::copy_n(grad, n, g);
  std::copy_n(master, n, p);
  std::copy_n(codes1, n, c1);
  std::copy_n(codes2, n, c2);
  adamw_block(s, g, p, c1, c2, absmax1, absmax2);
  std::copy_n(p, n, master);
  std::copy_n(c1, n, codes1);
  std::copy_n(c2, n, codes2);
}

void adamw8bit(
    const Tensor& master,
    const Tensor& codes1,
    const Tensor& codes2,
    const Tensor& absmax1,
    const Tensor& absmax2,
    const Tensor& grad,
    const std::optional<Tensor>& out,
    const Tensor& maps,
    const Tensor& decades,
    double beta1,
    double beta2,
    double rest1,
    double rest2,
    double decay,
    double eps,
    double step_size) {
  check(master, codes1, codes2, absmax1, absmax2, grad, out, maps, decades);
  const float* map = maps.const_data_ptr<float>();
  const AdamStep s{
      static_cast<float>(beta1),
      static_cast<float>(beta2),
      static_cast<float>(rest1),
      static_cast<float>(rest2),
      static_cast<float>(decay),
      static_cast<float>(eps),
      static_cast<float>(step_size),
      map[0],
      Map(map),
      Map(map + BLOCK),
      quantizer_of(decades, 0),
      quantizer_of(decades, 1)};
  const int64_t n = master.numel();
  float* p = master.mutable_data_ptr<float>();
  uint8_t* c1 = codes1.mutable_data_ptr<uint8_t>();
  uint8_t* c2 = codes2.mutable_data_ptr<uint8_t>();
  float* a1 = absmax1.mutable_data_ptr<float>();
  float* a2 = absmax2.mutable_data_ptr<float>();
  const bool is_float = grad.scalar_type() == ScalarType::Float;
  const Converter g = converter_of(grad, const_cast<void*>(grad.const_data_ptr()));
  const Converter copy = out ? converter_of(*out, out->mutable_data_ptr()) : Converter{};
  torch::stable::parallel_for(0, absmax1.numel(), GRAIN, [&](int64_t begin, int64_t end) {
    alignas(64) float wide[BLOCK];
    for (int64_t block = begin; block < end; ++block) {
      const int64_t at = block * BLOCK, count = std::min(BLOCK, n - at);
      const float* values = is_float ? reinterpret_cast<const float*>(g.data) + at : wide;
      if (!is_float) g.load(g.data + at * g.size, count, wide);
      if (count == BLOCK)
        adamw_block(s, values, p + at, c1 + at, c2 + at, a1[block], a2[block]);
      else
        adamw_tail(s, values, count, p + at, c1 + at, c2 + at, a1[block], a2[block]);
      // the half-precision copy is written while the block is still in the cache
      if (copy.data) copy.store(p + at, count, copy.data + at * copy.size);
    }
  });
}

}  // namespace
}  // namespace ddpo_fast

STABLE_TORCH_LIBRARY_IMPL(ddpo_fast_csrc, CPU, m) { m.impl("adamw8bit", TORCH_BOX(&ddpo_fast::adamw8bit)); }
