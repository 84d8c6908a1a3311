// Arithmetic shared by host and device code, for one number or a vector of them. ddpm_fast/reference/noise.py states the
// formula. This gives its bits: multiplication, addition and square root in float32, never contracted; where operations
// are saved, values are the formula's times a power of two, or with the other sign, which changes no rounding.
#pragma once

#include <cstdint>
#include <cstring>

#include "philox.h"

namespace ddpm {

template <class V>
struct PairOf {
  typename V::Float first, second;
};
using Pair = PairOf<Scalar>;

// The same bits as another type.
template <class To, class From>
DDPM_INLINE To as(From x) {
  static_assert(sizeof(To) == sizeof(From), "another size");
  To to;
  std::memcpy(&to, &x, sizeof to);
  return to;
}

// sqrt(-2 log u), u = (k + 1/2) / 2^32, taken from the nearer end of (0, 1).
template <class V = Scalar>
DDPM_INLINE typename V::Float radius(typename V::Word k) {
  using Float = typename V::Float;
  using Int = typename V::Int;
  using Word = typename V::Word;
  const Word high = as<Word>(as<Int>(k) >> 31);                   // all bits where u > 1/2
  const Float v = V::to_float(((k + k) ^ high) | 1u) * 0x1p-32f;  // 2 u, or 2 (1 - u) in the high half
  const auto near_one = k >= 0xAAAAAAC0u;                         // where the rounded u is above 2/3
  const Int below = (as<Int>(v) - 0x3FAAAAAB) & ~0x7FFFFF;
  const Int exponent = near_one ? Int{} : below;  // of u, in the place that it has in a float
  const Float mantissa = as<Float>(as<Int>(v) - exponent);  // doubled
  const Float rest = near_one ? mantissa : mantissa - 2.0f;
  const Float h = as<Float>(as<Word>(rest) ^ (~k & 0x80000000u));  // u = (1 - h / 2) 2^exponent
  Float q = h * 0x1.1f427ap-11f + 0x1.3b2846p-10f;
  q = q * h + 0x1.1ea258p-9f;
  q = q * h + 0x1.5032eap-8f;
  q = q * h + 0x1.99d428p-7f;
  q = q * h + 0x1.001480p-5f;
  q = q * h + 0x1.5554fap-4f;
  q = q * h + 0x1.ffffd6p-3f;
  const Float e = V::to_float(exponent);
  return V::root(e * -0x1.62e4p-23f + (h + h * h * q + e * -0x1.7f7d1cp-42f));
}

// Cosine and sine of 2 pi (j + 1/2) / 2^32: the nearest quarter turn and what is left of it.
template <class V = Scalar>
DDPM_INLINE PairOf<V> cos_sin(typename V::Word j) {
  using Float = typename V::Float;
  using Int = typename V::Int;
  using Word = typename V::Word;
  const Float x = V::to_float(as<Int>(j << 2 | 2u)) * 0x1p-32f;
  const Float y = x * x;
  Float s = y * -0x1.2dc84cp-8f + 0x1.466004p-4f;
  s = s * y + -0x1.4abbbep-1f;
  const Float sin = x * (0x1.921fb6p+0f + (-0x1.777a5cp-25f + y * s));
  Float c = y * 0x1.d9d57ep-11f + -0x1.55c5e0p-6f;
  c = c * y + 0x1.03c1dep-2f;
  c = c * y + -0x1.3bd3ccp+0f;
  const Float cos = 1.0f + y * c;
  const Word quarter = j + 0x20000000u;  // in the highest two bits
  const auto even = (quarter & 0x40000000u) == 0u;
  const Word cos_sign = (quarter + 0x40000000u) & 0x80000000u, sin_sign = quarter & 0x80000000u;
  // The sign goes in by its bit: a select between two negated values is slower.
  const Float first = even ? cos : sin, second = even ? sin : cos;
  return {as<Float>(as<Word>(first) ^ cos_sign), as<Float>(as<Word>(second) ^ sin_sign)};
}

// Two standard normals from two words (Box-Muller).
template <class V = Scalar>
DDPM_INLINE PairOf<V> box_muller(typename V::Word k, typename V::Word j) {
  const auto r = radius<V>(k);
  const auto angle = cos_sin<V>(j);
  return {r * angle.first, r * angle.second};
}

}  // namespace ddpm
