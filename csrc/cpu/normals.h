// Standard normals of a sample, a batch of counters at a time.
#pragma once

#include <utility>

#include "../math.h"
#include "vec.h"

namespace ddpm::cpu {

// Normals of a batch: enough independent vectors to hide how long each operation takes.
constexpr int kNormals = kVec == 16 ? 128 : 64;

typedef uint64_t Words64 __attribute__((vector_size(kVecBytes)));

// The numbers of the formulas, a vector of each kind.
struct Vector {
  using Float = Floats;
  using Int = Ints;
  using Word = Words32;
  using Wide = Words64;

  static DDPM_INLINE Wide product(Wide a, uint32_t factor) {
    const Wide b = Wide{} + factor;
#if defined(__AVX512F__)
    return (Wide)_mm512_maskz_mul_epu32(0xFF, (__m512i)a, (__m512i)b);  // the plain form warns in gcc 12
#elif defined(__AVX2__)
    return (Wide)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return (Wide)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
    return (a & 0xFFFFFFFFu) * b;
#endif
  }

  template <class T>
  static DDPM_INLINE Float to_float(T x) {
    return __builtin_convertvector(x, Float);
  }

  static DDPM_INLINE Float root(Float x) {
#if defined(__AVX512F__)
    return (Float)_mm512_maskz_sqrt_ps(0xFFFF, (__m512)x);
#else
    for (int i = 0; i < kVec; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
  }
};

// From a (0 to 3) and b (4 to 7), separately in each four lanes.
template <int... From, class T, int... Lane>
DDPM_INLINE T pick(T a, T b, std::integer_sequence<int, Lane...>) {
  constexpr int from[] = {From...};
  return __builtin_shufflevector(a, b, ((Lane & ~3) + (from[Lane & 3] & 3) + from[Lane & 3] / 4 * kVec)...);
}

template <int... From, class T>
DDPM_INLINE T pick(T a, T b) {
  return pick<From...>(a, b, std::make_integer_sequence<int, kVec>{});
}

// The words of kVec counters. Lane 4 i + j is of counter first + j kVec / 4 + i: as store_rows wants it.
DDPM_INLINE void words_of_lanes(const Counter& at, uint32_t first, Words32 (&w)[4]) {
  Words64 block = {};
  for (int l = 0; l < kVec / 2; ++l) block[l] = uint32_t(l % 2 * kVec / 4 + l / 2);
  block += first;
  const auto a = wide_words<Vector>(at, block), b = wide_words<Vector>(at, block + uint64_t{kVec / 2});
  for (int i = 0; i < 4; ++i) w[i] = pick<0, 2, 4, 6>((Words32)a.w[i], (Words32)b.w[i]);
}

// Four numbers of each counter, one counter after the other.
template <class T, class Number>
DDPM_INLINE void store_rows(const T (&w)[4], Number* out) {
  const T a = pick<0, 4, 1, 5>(w[0], w[1]), b = pick<0, 4, 1, 5>(w[2], w[3]);
  const T c = pick<2, 6, 3, 7>(w[0], w[1]), d = pick<2, 6, 3, 7>(w[2], w[3]);
  const T rows[] = {pick<0, 1, 4, 5>(a, b), pick<2, 3, 6, 7>(a, b), pick<0, 1, 4, 5>(c, d), pick<2, 3, 6, 7>(c, d)};
  std::memcpy(out, rows, sizeof rows);
}

// out[2 i] and out[2 i + 1] = low and high half of word i % 4 of counter first + i / 4, for i < kNormals.
DDPM_INLINE void random_halves(const Counter& at, uint32_t first, uint16_t* out) {
  for (int i = 0; i < kNormals; i += 4 * kVec) {
    Words32 w[4];
    words_of_lanes(at, first + uint32_t(i / 4), w);
    store_rows(w, out + 2 * i);  // all processors here are little-endian
  }
}

// out[i] = normal number 4 first + i of the sample, for i < kNormals. Inline, so that a loop prepares its keys once.
DDPM_INLINE void normals(const Counter& at, uint32_t first, float* out) {
#pragma GCC unroll 4
  for (int i = 0; i < kNormals; i += 4 * kVec) {
    Words32 w[4];
    words_of_lanes(at, first + uint32_t(i / 4), w);
    const auto low = box_muller<Vector>(w[0], w[1]), high = box_muller<Vector>(w[2], w[3]);
    const Floats z[4] = {low.first, low.second, high.first, high.second};
    store_rows(z, out + i);
  }
}

}  // namespace ddpm::cpu
