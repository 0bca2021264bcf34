// Functions of fp32 numbers for loops that compilers vectorise, and what the ops of rows have in common.
//
// The functions have no calls, branches or table look-ups, and give a number the same bits in a vector register as
// alone. So what an op computes from a row does not depend on how many rows there are.
#pragma once

#include "convert.h"

#include <algorithm>
#include <bit>
#include <vector>

namespace ddpo_fast {

// the most elements of a row that are converted at once: a few fp32 buffers of this size fit into a first-level cache
constexpr int64_t PIECE = 1024;
// the fewest elements that are given to a thread
constexpr int64_t GRAIN = 16384;

// The polynomial with these coefficients, that of the highest power first. Unrolled by the template, because compilers
// do not vectorise a loop around it otherwise.
template <typename... Coefficients>
inline float polynomial(float x, float highest, Coefficients... others) {
  float value = highest;
  ((value = __builtin_fmaf(value, x, others)), ...);
  return value;
}

// exp(x) to about one unit in the last place, for x from -87 to 88; beyond these it is the value at the limit. By a
// polynomial for r = x - n log 2 with |r| <= log(2) / 2 (Cephes' expf), times 2^n.
inline float exponential(float x) {
  constexpr float LOG2_E = 1.44269504088896341f, LOG_2_HIGH = 0.693359375f, LOG_2_LOW = -2.12194440e-4f;
  // adding 1.5 * 2^23 rounds to an integer, which is then in the lowest bits
  constexpr float TO_INTEGER = 12582912.0f;
  // a NaN passes both comparisons and stays
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = __builtin_fmaf(x, LOG2_E, TO_INTEGER);
  const float n = shifted - TO_INTEGER;
  const float r = __builtin_fmaf(n, -LOG_2_LOW, __builtin_fmaf(n, -LOG_2_HIGH, x));
  const float p = polynomial(
      r, 1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f);
  // moves n into the exponent of 1
  return (__builtin_fmaf(p, r * r, r) + 1.0f) *
         std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) << 23) + 0x3f800000u);
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// Of the normal distribution at x: its density, and the probability of a smaller number.
struct Normal {
  float density, below;
};

// The probability beyond |x| is exp(-x^2 / 2) t P(t) with t = 1 / (1 + 0.28 |x|), the form of formula 26.2.17 in
// Abramowitz and Stegun's Handbook. P is the polynomial of degree 8 with the least largest relative error for |x| up
// to 14, which is 5.4e-8.
inline Normal normal(float x) {
  constexpr float ONE_OVER_SQRT_2PI = 0.398942280401432678f;
  const float size = x < 0 ? -x : x;
  const float t = 1.0f / __builtin_fmaf(size, 0.28f, 1.0f);
  const float e = exponential(-0.5f * (x * x));
  const float p = polynomial(
      t, 2.279083678e-2f, -8.336320639e-2f, 6.977668571e-2f, 2.084375737e-2f, 5.326170949e-2f, 9.207756892e-2f,
      1.009306035e-1f, 1.119948042e-1f, 1.116872671e-1f);
  const float beyond = e * (t * p);
  return {ONE_OVER_SQRT_2PI * e, x < 0 ? beyond : 1.0f - beyond};
}

// `rows` runs of `width` fp32 numbers; the first numbers of two runs are `stride` apart.
struct Runs {
  float* data;
  int64_t stride;
};

// Runs of a tensor's elements as fp32: those of an fp32 tensor where they are, others converted into `buffer`.
template <typename T>
inline Runs load_runs(const T* data, int64_t stride, int64_t rows, int64_t width, float* buffer) {
  if constexpr (std::is_same_v<T, float>) return {const_cast<float*>(data), stride};
  if (stride == width || rows == 1) {
    to_float(data, rows * width, buffer);
  } else {
    for (int64_t row = 0; row < rows; ++row) to_float(data + row * stride, width, buffer + row * width);
  }
  return {buffer, width};
}

// Where runs of results are written: into an fp32 tensor itself, else into `buffer`, from which `store_runs` converts.
template <typename T>
inline Runs runs_to_store(T* data, int64_t stride, int64_t width, float* buffer) {
  if constexpr (std::is_same_v<T, float>) return {data, stride};
  return {buffer, width};
}

template <typename T>
inline void store_runs(const float* buffer, int64_t rows, int64_t width, T* data, int64_t stride) {
  if constexpr (std::is_same_v<T, float>) return;
  if (stride == width || rows == 1) return from_float(buffer, rows * width, data);
  for (int64_t row = 0; row < rows; ++row) from_float(buffer + row * width, width, data + row * stride);
}

// The elements of a vector, of any of the kernels' dtypes and any stride, as fp32; `row` of a matrix.
inline std::vector<float> vector_of(const Tensor& tensor, int64_t row = 0) {
  const int64_t last = tensor.dim() - 1, n = tensor.size(last), stride = tensor.stride(last);
  std::vector<float> values(n);
  for_dtype(tensor, [&](auto kind) {
    using T = decltype(kind);
    const T* data = static_cast<const T*>(tensor.const_data_ptr()) + (last > 0 ? row * tensor.stride(0) : 0);
    for (int64_t i = 0; i < n; ++i) values[i] = static_cast<float>(data[i * stride]);
  });
  return values;
}

// Writes n numbers to consecutive elements of a tensor, from element `at` on.
inline void store_numbers(const float* values, int64_t n, const Tensor& tensor, int64_t at) {
  for_dtype(tensor, [&](auto kind) {
    using T = decltype(kind);
    from_float(values, n, static_cast<T*>(tensor.mutable_data_ptr()) + at);
  });
}

}  // namespace ddpo_fast
