// Converts n consecutive numbers from and to fp32, rounding to nearest even.
#pragma once

#include "common.h"

#include <cstring>

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace ddpo_fast {

inline void to_float(const float* values, int64_t n, float* out) { std::memcpy(out, values, n * sizeof(float)); }

inline void to_float(const BFloat16* values, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    // bf16 is the upper half of fp32
    const uint32_t bits = static_cast<uint32_t>(values[i].x) << 16;
    std::memcpy(out + i, &bits, sizeof bits);
  }
}

inline void to_float(const Half* values, int64_t n, float* out) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values + i))));
#endif
  for (; i < n; ++i) out[i] = static_cast<float>(values[i]);
}

inline void from_float(const float* values, int64_t n, float* out) { std::memcpy(out, values, n * sizeof(float)); }

inline void from_float(const float* values, int64_t n, BFloat16* out) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, values + i, sizeof bits);
    // Adding just under half of the last kept bit, or exactly half where that bit is 1, rounds to nearest with ties to
    // even. NaN is handled separately, because the addition could carry into its sign or turn it into infinity.
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    out[i].x = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  }
}

inline void from_float(const float* values, int64_t n, Half* out) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < n; ++i) out[i] = Half(values[i]);
}

}  // namespace ddpo_fast
