#include "elementwise.h"

namespace ddpo_fast {
namespace {

// Rows whose gradients are added up in fp32 before they are added in fp64. A constant, so that the gradient of the
// bias does not depend on the number of threads.
constexpr int64_t CHUNK = 64;

// x [rows, 2 inner]: values, then gates.
struct Sizes {
  int64_t rows, inner;
};

Sizes sizes_of(const Tensor& x, const std::optional<Tensor>& bias) {
  CHECK_CONTIGUOUS(x);
  const int64_t width = x.size(x.dim() - 1);
  STD_TORCH_CHECK(width > 0 && width % 2 == 0, "x must have an even number of columns but has ", width);
  if (bias) check_shape("bias", *bias, {width});
  return {x.numel() / width, width / 2};
}

void check_half(const char* name, const Tensor& half, const Tensor& x) {
  STD_TORCH_CHECK(
      half.is_contiguous() && 2 * half.numel() == x.numel() && half.scalar_type() == x.scalar_type(), name,
      " must be contiguous, half as large as x and of its dtype");
}

// n values, or the gates of the same columns, as fp32 with their biases.
template <typename T>
inline const float* load_half(const T* data, int64_t n, const float* bias, float* buffer) {
  const float* found = load_runs(data, n, 1, n, buffer).data;
  if (bias == nullptr) return found;
  for (int64_t i = 0; i < n; ++i) buffer[i] = found[i] + bias[i];
  return buffer;
}

// Calls f(row, first column, columns) for the pieces of some rows.
template <typename F>
inline void for_pieces(const Sizes& sizes, int64_t begin, int64_t end, const F& f) {
  for (int64_t row = begin; row < end; ++row)
    for (int64_t at = 0; at < sizes.inner; at += PIECE) f(row, at, std::min(PIECE, sizes.inner - at));
}

inline void gate(const float* __restrict a, const float* __restrict g, int64_t n, float* __restrict y) {
  for (int64_t i = 0; i < n; ++i) y[i] = a[i] * (g[i] * normal(g[i]).below);
}

inline void gate_backward(
    const float* __restrict dy,
    const float* __restrict a,
    const float* __restrict g,
    int64_t n,
    float* __restrict da,
    float* __restrict dg) {
  for (int64_t i = 0; i < n; ++i) {
    const Normal at = normal(g[i]);
    da[i] = dy[i] * (g[i] * at.below);
    dg[i] = dy[i] * a[i] * __builtin_fmaf(g[i], at.density, at.below);
  }
}

void geglu(const Tensor& x, const std::optional<Tensor>& bias, const Tensor& y) {
  const Sizes sizes = sizes_of(x, bias);
  check_half("y", y, x);
  const std::vector<float> added = bias ? vector_of(*bias) : std::vector<float>();
  for_dtype(x, [&](auto kind) {
    using T = decltype(kind);
    const T* input = static_cast<const T*>(x.const_data_ptr());
    T* output = static_cast<T*>(y.mutable_data_ptr());
    const int64_t grain = std::max<int64_t>(1, GRAIN / sizes.inner);
    torch::stable::parallel_for(0, sizes.rows, grain, [&](int64_t begin, int64_t end) {
      alignas(64) float values[PIECE], gates[PIECE], made[PIECE];
      for_pieces(sizes, begin, end, [&](int64_t row, int64_t at, int64_t n) {
        const T* from = input + row * 2 * sizes.inner + at;
        T* to = output + row * sizes.inner + at;
        const float* b = bias ? added.data() + at : nullptr;
        const float* a = load_half(from, n, b, values);
        const float* g = load_half(from + sizes.inner, n, b ? b + sizes.inner : nullptr, gates);
        gate(a, g, n, runs_to_store(to, n, n, made).data);
        store_runs(made, 1, n, to, n);
      });
    });
  });
}

void geglu_backward(
    const Tensor& grad,
    const Tensor& x,
    const std::optional<Tensor>& bias,
    const Tensor& dx,
    const std::optional<Tensor>& dbias) {
  const Sizes sizes = sizes_of(x, bias);
  check_half("grad", grad, x);
  STD_TORCH_CHECK(
      dx.is_contiguous() && dx.numel() == x.numel() && dx.scalar_type() == x.scalar_type(), "dx must be like x");
  if (dbias) {
    check_shape("dbias", *dbias, {2 * sizes.inner});
    CHECK_CONTIGUOUS(*dbias);
  }
  const std::vector<float> added = bias ? vector_of(*bias) : std::vector<float>();
  const int64_t chunks = (sizes.rows + CHUNK - 1) / CHUNK, width = 2 * sizes.inner;
  std::vector<float> sums(dbias ? chunks * width : 0);
  for_dtype(x, [&](auto kind) {
    using T = decltype(kind);
    const T* input = static_cast<const T*>(x.const_data_ptr());
    const T* above = static_cast<const T*>(grad.const_data_ptr());
    T* output = static_cast<T*>(dx.mutable_data_ptr());
    const int64_t grain = std::max<int64_t>(1, GRAIN / (CHUNK * sizes.inner));
    torch::stable::parallel_for(0, chunks, grain, [&](int64_t first, int64_t last) {
      alignas(64) float values[PIECE], gates[PIECE], upper[PIECE], da[PIECE], dg[PIECE];
      for_pieces(sizes, first * CHUNK, std::min(last * CHUNK, sizes.rows), [&](int64_t row, int64_t at, int64_t n) {
        const T* from = input + row * width + at;
        T* to = output + row * width + at;
        const float* b = bias ? added.data() + at : nullptr;
        const float* a = load_half(from, n, b, values);
        const float* g = load_half(from + sizes.inner, n, b ? b + sizes.inner : nullptr, gates);
        const float* dy = load_runs(above + row * sizes.inner + at, n, 1, n, upper).data;
        float* to_a = runs_to_store(to, n, n, da).data;
        float* to_g = runs_to_store(to + sizes.inner, n, n, dg).data;
        gate_backward(dy, a, g, n, to_a, to_g);
        store_runs(da, 1, n, to, n);
        store_runs(dg, 1, n, to + sizes.inner, n);
        if (!dbias) return;
        float* sum = sums.data() + row / CHUNK * width + at;
        for (int64_t i = 0; i < n; ++i) sum[i] += to_a[i];
        for (int64_t i = 0; i < n; ++i) sum[sizes.inner + i] += to_g[i];
      });
    });
  });
  if (!dbias) return;
  std::vector<double> total(width);
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t i = 0; i < width; ++i) total[i] += sums[chunk * width + i];
  const std::vector<float> rounded(total.begin(), total.end());
  store_numbers(rounded.data(), width, *dbias, 0);
}

}  // namespace
}  // namespace ddpo_fast

STABLE_TORCH_LIBRARY_IMPL(ddpo_fast_csrc, CPU, m) {
  m.impl("geglu", TORCH_BOX(&ddpo_fast::geglu));
  m.impl("geglu_backward", TORCH_BOX(&ddpo_fast::geglu_backward));
}
