// An AdamW step with 8-bit moments for one block: 256 weights and, for each moment, 256 codes and one scale.
//
// `ddpo_fast/ops/adamw8bit.py` defines the computation and makes the tables. A code stands for a value of a map times
// the block's scale. A map consists of decades that are divided into equal parts, so the code of the nearest value is
// found by arithmetic. With AVX-512 VBMI the tables are kept in vector registers. Without it, the same computation
// consists of loops that compilers vectorise.
#pragma once

#include "convert.h"

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>

#if defined(__AVX512VBMI__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#define DDPO_FAST_VBMI
#include <immintrin.h>
#endif

namespace ddpo_fast {

constexpr int64_t BLOCK = 256;
// The number of weights that are updated before their moments are quantized. With small parts the processor overlaps
// the divisions and square roots of one part with the shuffles of another, which use other execution units.
constexpr int64_t PART = 64;
constexpr int64_t DECADES = 8;

// For each decade, the size |value| / scale at which the decade begins, and the line min(slope * size + offset, last),
// whose integer part is the distance of the code from the code of zero.
struct Decades {
  float threshold[DECADES], slope[DECADES], offset[DECADES], last[DECADES];
};

// The bits of the largest and of the lowest value of a block. They are found by integer comparisons, which do not lose
// a NaN as comparisons of floats do. `most` is the maximum as signed integers: the bits of floats from zero up are
// ordered as the floats are, and the bits of negative floats are smaller, so the maximum belongs to the largest value.
// `least` is the maximum as unsigned integers: there negative floats come after the positive ones, the lowest one last,
// and a NaN with its sign set after that. So the maximum belongs to the lowest value, or to the largest value if none
// is negative.
struct Extremes {
  int32_t most = 0;
  uint32_t least = 0;
};

#ifdef DDPO_FAST_VBMI

inline __m512 as_floats(__m512i bits) { return _mm512_castsi512_ps(bits); }
inline __m512i as_bits(__m512 floats) { return _mm512_castps_si512(floats); }

// AVX-512's unpack and pack instructions work separately in each quarter (128 bits) of a register. This permutation of
// dwords, before two unpacks or after two packs, brings the elements into order.
inline __m512i dealt() { return _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15); }

// The map as four tables of bytes, one for each byte of a float. One shuffle looks up 64 codes in a table of 128 bytes,
// and two shuffles cover the 256 codes; gathering floats would take several times as long.
struct Map {
  __m512i bytes[4][4];

  explicit Map(const float* values) {
    alignas(64) uint8_t planes[4][BLOCK];
    for (int64_t i = 0; i < BLOCK; ++i)
      for (int64_t j = 0; j < 4; ++j)
        planes[j][i] = static_cast<uint8_t>(std::bit_cast<uint32_t>(values[i]) >> (8 * j));
    for (int64_t j = 0; j < 4; ++j)
      for (int64_t k = 0; k < 4; ++k) bytes[j][k] = _mm512_load_si512(planes[j] + 64 * k);
  }
};

// Looks up the map's values for 64 codes.
inline void look_up(const Map& map, const uint8_t* codes, __m512 values[4]) {
  const __m512i c = _mm512_permutexvar_epi32(dealt(), _mm512_loadu_si512(codes));
  const __mmask64 upper = _mm512_movepi8_mask(c);
  __m512i plane[4];
  for (int64_t j = 0; j < 4; ++j)
    plane[j] = _mm512_mask_blend_epi8(
        upper, _mm512_permutex2var_epi8(map.bytes[j][0], c, map.bytes[j][1]),
        _mm512_permutex2var_epi8(map.bytes[j][2], c, map.bytes[j][3]));
  const __m512i low1 = _mm512_unpacklo_epi8(plane[0], plane[1]), high1 = _mm512_unpackhi_epi8(plane[0], plane[1]);
  const __m512i low2 = _mm512_unpacklo_epi8(plane[2], plane[3]), high2 = _mm512_unpackhi_epi8(plane[2], plane[3]);
  values[0] = as_floats(_mm512_unpacklo_epi16(low1, low2));
  values[1] = as_floats(_mm512_unpackhi_epi16(low1, low2));
  values[2] = as_floats(_mm512_unpacklo_epi16(high1, high2));
  values[3] = as_floats(_mm512_unpackhi_epi16(high1, high2));
}

// The updated moment, map[code] * scale + (SIGNED ? rest * grad : (rest * grad)^2). The caller has multiplied the scale
// by beta. Returns the extremes of the block's values.
template <bool SIGNED>
inline Extremes next_moment(
    const Map& map, const uint8_t* codes, float scale, const float* grad, float rest, float* values) {
  const __m512 scales = _mm512_set1_ps(scale), rests = _mm512_set1_ps(rest);
  __m512i most = _mm512_setzero_si512(), least = most;
  for (int64_t i = 0; i < BLOCK; i += 64) {
    __m512 known[4];
    look_up(map, codes + i, known);
    for (int64_t j = 0; j < 4; ++j) {
      const __m512 g = _mm512_loadu_ps(grad + i + 16 * j), scaled = _mm512_mul_ps(g, rests);
      const __m512 value = SIGNED ? _mm512_fmadd_ps(known[j], scales, scaled)
                                  : _mm512_fmadd_ps(scaled, scaled, _mm512_mul_ps(known[j], scales));
      _mm512_store_ps(values + i + 16 * j, value);
      most = _mm512_max_epi32(most, as_bits(value));
      least = _mm512_max_epu32(least, as_bits(value));
    }
  }
  return {_mm512_reduce_max_epi32(most), _mm512_reduce_max_epu32(least)};
}

// The decades' lines in tables of 32 entries, looked up by the lowest five bits of a size's exponent. The sizes with
// one exponent contain at most one decade's threshold. Adding `ahead` to a size's bits moves the sizes from that
// threshold on to the next exponent, so that all sizes of a decade find the same line.
struct Quantizer {
  __m512i ahead[2];
  __m512 slope[2], offset[2], last[2];

  explicit Quantizer(const Decades& d) {
    alignas(64) int32_t carried[32] = {};
    alignas(64) float lines[3][32] = {};
    for (int32_t e = 0; e < 32; ++e) {
      // The exponent field of 2^(e - 31) is 96 + e, whose lowest five bits are e. Entry e is for sizes in [begin, 2
      // begin).
      const float begin = std::ldexp(1.0f, e - 31);
      for (int64_t k = 0; k < DECADES; ++k) {
        const float threshold = d.threshold[k];
        if (threshold >= begin && threshold < 2 * begin)
          carried[e] = std::bit_cast<int32_t>(2 * begin) - std::bit_cast<int32_t>(threshold);
        if (threshold >= begin) continue;
        lines[0][e] = d.slope[k];
        lines[1][e] = d.offset[k];
        lines[2][e] = d.last[k];
      }
    }
    for (int64_t j = 0; j < 2; ++j) {
      ahead[j] = _mm512_load_si512(carried + 16 * j);
      slope[j] = _mm512_load_ps(lines[0] + 16 * j);
      offset[j] = _mm512_load_ps(lines[1] + 16 * j);
      last[j] = _mm512_load_ps(lines[2] + 16 * j);
    }
  }
};

// For 16 values between -1 and 1, the distance of their codes from the code of zero, with the value's sign.
template <bool SIGNED>
inline __m512i steps_from_zero(const Quantizer& q, __m512 x) {
  const __m512 size = SIGNED ? _mm512_abs_ps(x) : x;
  // five bits of the exponent distinguish the sizes from 2^-31 up; smaller sizes use the line for 2^-31
  const __m512i bits = as_bits(_mm512_max_ps(size, _mm512_set1_ps(0x1p-31f)));
  const __m512i ahead = _mm512_permutex2var_epi32(q.ahead[0], _mm512_srli_epi32(bits, 23), q.ahead[1]);
  const __m512i at = _mm512_srli_epi32(_mm512_add_epi32(bits, ahead), 23);
  const __m512 slope = _mm512_permutex2var_ps(q.slope[0], at, q.slope[1]);
  const __m512 offset = _mm512_permutex2var_ps(q.offset[0], at, q.offset[1]);
  const __m512 last = _mm512_permutex2var_ps(q.last[0], at, q.last[1]);
  __m512 place = _mm512_min_ps(_mm512_fmadd_ps(size, slope, offset), last);
  if (SIGNED) place = _mm512_or_ps(place, _mm512_and_ps(x, _mm512_set1_ps(-0.0f)));
  return _mm512_cvttps_epi32(place);
}

// Stores the codes of a part's values; `inverse` is one over the block's scale.
template <bool SIGNED>
inline void quantize_part(const Quantizer& quantizer, const float* values, float inverse, uint8_t* codes) {
  __m512i n[4];
  for (int64_t j = 0; j < 4; ++j)
    n[j] = steps_from_zero<SIGNED>(quantizer, _mm512_mul_ps(_mm512_load_ps(values + 16 * j), _mm512_set1_ps(inverse)));
  __m512i low = _mm512_packs_epi32(n[0], n[1]), high = _mm512_packs_epi32(n[2], n[3]);
  if (SIGNED) {
    low = _mm512_add_epi16(low, _mm512_set1_epi16(127));
    high = _mm512_add_epi16(high, _mm512_set1_epi16(127));
  }
  _mm512_storeu_si512(codes, _mm512_permutexvar_epi32(dealt(), _mm512_packus_epi16(low, high)));
}

#else

struct Map {
  float values[BLOCK];

  explicit Map(const float* from) { std::copy_n(from, BLOCK, values); }
};

struct Quantizer {
  Decades decades;

  explicit Quantizer(const Decades& decades) : decades(decades) {}
};

template <bool SIGNED>
inline Extremes next_moment(
    const Map& map, const uint8_t* codes, float scale, const float* grad, float rest, float* values) {
  Extremes found;
  // a separate loop, because compilers do not vectorise a table look-up well, and it would slow down the loop below
  for (int64_t i = 0; i < BLOCK; ++i) values[i] = map.values[codes[i]];
  for (int64_t i = 0; i < BLOCK; ++i) {
    const float scaled = grad[i] * rest;
    values[i] = SIGNED ? __builtin_fmaf(values[i], scale, scaled) : __builtin_fmaf(scaled, scaled, values[i] * scale);
    const int32_t bits = std::bit_cast<int32_t>(values[i]);
    found.most = std::max(found.most, bits);
    found.least = std::max(found.least, static_cast<uint32_t>(bits));
  }
  return found;
}

template <bool SIGNED>
inline void quantize_part(const Quantizer& quantizer, const float* values, float inverse, uint8_t* codes) {
  // A local copy, because a pointer to uint8_t may alias anything: the compiler would have to assume that writing a
  // code changes the quantizer, and load it again for each value.
  const Decades d = quantizer.decades;
  for (int64_t i = 0; i < PART; ++i) {
    const float x = values[i] * inverse;
    const float size = SIGNED ? std::fabs(x) : x;
    float slope = 0, offset = 0, last = 0;
    for (int64_t k = 0; k < DECADES; ++k) {
      const bool beyond = size >= d.threshold[k];
      slope = beyond ? d.slope[k] : slope;
      offset = beyond ? d.offset[k] : offset;
      last = beyond ? d.last[k] : last;
    }
    const float place = __builtin_fmaf(size, slope, offset);
    const int32_t n = static_cast<int32_t>(place < last ? place : last);
    codes[i] = static_cast<uint8_t>(SIGNED ? (x < 0 ? 127 - n : 127 + n) : n);
  }
}

#endif

// The scalars and tables of an update, which are the same for all blocks.
struct AdamStep {
  float beta1, beta2, rest1, rest2, decay, eps, step_size;
  float lowest;  // the value of the first moment's code 0
  Map map1, map2;
  Quantizer quantizer1, quantizer2;
};

// Returns one over a scale. A subnormal scale, whose inverse could be infinite, is set to zero, and the result is zero
// too, so that all values of the block get a code near zero.
inline float inverse_of(float& scale) {
  if (scale < FLT_MIN) scale = 0;
  return scale == 0 ? 0 : 1 / scale;
}

// The smallest scale with which both the largest and the lowest value lie within the map; NaN if one is NaN.
inline float scale_of(Extremes extremes, float lowest) {
  const float above = std::bit_cast<float>(extremes.most);
  const float below = extremes.least > 0x80000000u ? std::bit_cast<float>(extremes.least) / lowest : 0;
  // if neither comparison is true, one of the two is NaN, and so is their sum
  return above >= below ? above : below > above ? below : above + below;
}

// Updates a whole block: every pointer must have 256 elements. Inlined, so that the tables stay in registers.
__attribute__((always_inline)) inline void adamw_block(
    const AdamStep& s,
    const float* grad,
    float* master,
    uint8_t* codes1,
    uint8_t* codes2,
    float& absmax1,
    float& absmax2) {
  alignas(64) float m[BLOCK], v[BLOCK];
  const Extremes first = next_moment<true>(s.map1, codes1, absmax1 * s.beta1, grad, s.rest1, m);
  const Extremes second = next_moment<false>(s.map2, codes2, absmax2 * s.beta2, grad, s.rest2, v);
  absmax1 = scale_of(first, s.lowest);
  // second moments are never negative, so the unsigned maximum is the largest value
  absmax2 = std::bit_cast<float>(second.least);
  const float inverse1 = inverse_of(absmax1), inverse2 = inverse_of(absmax2);
  for (int64_t i = 0; i < BLOCK; i += PART) {
    for (int64_t j = i; j < i + PART; ++j) {
      const float update = m[j] / (std::sqrt(v[j]) + s.eps);
      master[j] = __builtin_fmaf(-s.step_size, update, master[j] * s.decay);
    }
    quantize_part<true>(s.quantizer1, m + i, inverse1, codes1 + i);
    quantize_part<false>(s.quantizer2, v + i, inverse2, codes2 + i);
  }
}

}  // namespace ddpo_fast
