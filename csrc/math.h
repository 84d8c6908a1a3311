// Arithmetic shared by host and device code. ddpm_fast/reference/noise.py states the formula; this is it, operation by
// operation: multiplication, addition and square root in float32, never contracted, so that all backends agree in bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "philox.h"

namespace ddpm {

struct Pair {
  float first, second;
};

DDPM_INLINE int32_t float_bits(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

DDPM_INLINE float bits_float(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// sqrt(-2 log u), u = (k + 1/2) / 2^32, taken from the nearer end of (0, 1).
DDPM_INLINE float radius(uint32_t k) {
  const bool low = k < 0x80000000u;
  const float v = float(2 * (low ? k : ~k) + 1) * 0x1p-33f;
  const int32_t bits = float_bits(v);
  const int32_t exponent = (bits - 0x3F2AAAAB) >> 23;
  const float mantissa = bits_float(bits - exponent * (1 << 23));
  const bool near_one = 1.0f - v >= 0x1.555556p-1f;
  const float f = low ? mantissa - 1.0f : near_one ? -v : 1.0f - 2.0f * v;
  const float e = low ? float(exponent) : near_one ? 0.0f : -1.0f;
  float q = 0x1.1f427ap-3f;
  q = q * f + -0x1.3b2846p-3f;
  q = q * f + 0x1.1ea258p-3f;
  q = q * f + -0x1.5032eap-3f;
  q = q * f + 0x1.99d428p-3f;
  q = q * f + -0x1.001480p-2f;
  q = q * f + 0x1.5554fap-2f;
  q = q * f + -0x1.ffffd6p-2f;
  const float log1p = f + f * f * q;
  const float log_u = e * 0x1.62e4p-1f + (log1p + e * 0x1.7f7d1cp-20f);
  return __builtin_sqrtf(-2.0f * log_u);
}

// Cosine and sine of 2 pi (j + 1/2) / 2^32: the nearest quarter turn and what is left of it.
DDPM_INLINE Pair cos_sin(uint32_t j) {
  const uint32_t shifted = j + 0x20000000u;
  const uint32_t quarter = shifted >> 30;
  const int32_t rest = int32_t(shifted & 0x3FFFFFFFu) - 0x20000000;
  const float x = float(2 * rest + 1) * 0x1p-31f;
  const float y = x * x;
  float s = -0x1.2dc84cp-8f;
  s = s * y + 0x1.466004p-4f;
  s = s * y + -0x1.4abbbep-1f;
  const float sin = x * (0x1.921fb6p+0f + (-0x1.777a5cp-25f + y * s));
  float c = 0x1.d9d57ep-11f;
  c = c * y + -0x1.55c5e0p-6f;
  c = c * y + 0x1.03c1dep-2f;
  c = c * y + -0x1.3bd3ccp+0f;
  const float cos = 1.0f + y * c;
  const bool odd = quarter & 1;
  // The sign goes in by its bit: a select between two negated values is slower.
  const int32_t cos_sign = int32_t(((quarter + 1) & 2) << 30), sin_sign = int32_t((quarter & 2) << 30);
  return {bits_float(float_bits(odd ? sin : cos) ^ cos_sign), bits_float(float_bits(odd ? cos : sin) ^ sin_sign)};
}

// Two standard normals from two words (Box-Muller).
DDPM_INLINE Pair box_muller(uint32_t k, uint32_t j) {
  const float r = radius(k);
  const Pair angle = cos_sin(j);
  return {r * angle.first, r * angle.second};
}

}  // namespace ddpm
