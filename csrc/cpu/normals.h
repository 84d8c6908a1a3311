// Standard normals of a sample, a batch of counters at a time.
#pragma once

#include <utility>

#include "../math.h"
#include "vec.h"

namespace ddpm::cpu {

constexpr int kNormals = 64;  // normals of a batch

typedef uint64_t Words64 __attribute__((vector_size(kVecBytes)));

// What the formulas need of a vector.
struct Vector {
  using Float = Floats;
  using Int = Ints;
  using Word = Words32;
  using Wide = Words64;
  static DDPM_INLINE Wide product(Wide a, uint32_t b) {
#if defined(__AVX512F__)
    return (Wide)_mm512_maskz_mul_epu32(0xFF, (__m512i)a, (__m512i)(Wide{} + b));
#elif defined(__AVX2__)
    return (Wide)_mm256_mul_epu32((__m256i)a, (__m256i)(Wide{} + b));
#elif defined(__SSE2__)
    return (Wide)_mm_mul_epu32((__m128i)a, (__m128i)(Wide{} + b));
#else
    return (a & 0xFFFFFFFFu) * uint64_t{b};
#endif
  }
  static DDPM_INLINE Float to_float(Int x) { return __builtin_convertvector(x, Float); }
  static DDPM_INLINE Float to_float(Word x) { return __builtin_convertvector(x, Float); }
  static DDPM_INLINE Float root(Float x) {
#if defined(__AVX512F__)
    return (Float)_mm512_maskz_sqrt_ps(0xFFFF, (__m512)x);
#else
    for (int i = 0; i < kVec; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
  }
};

// Lanes 4 i to 4 i + 3 of the result are those of a (0 to 3) and b (4 to 7), i being the same.
template <int... From, class T, int... I>
static inline T picked(T a, T b, std::integer_sequence<int, I...>) {
  constexpr int from[] = {From...};
  return __builtin_shufflevector(a, b, ((I & ~3) + (from[I & 3] & 3) + (from[I & 3] & 4) / 4 * kVec)...);
}

template <int A, int B, int C, int D, class T>
static inline T pick(T a, T b) {
  return picked<A, B, C, D>(a, b, std::make_integer_sequence<int, kVec>{});
}

static inline Words32 low_words(Words64 a, Words64 b) { return pick<0, 2, 4, 6>((Words32)a, (Words32)b); }

// out[4 i + k] = w[k][lane of counter i].
template <class T>
static inline void store_interleaved(T (&w)[4], T* out) {
  const T a = pick<0, 4, 1, 5>(w[0], w[1]), b = pick<0, 4, 1, 5>(w[2], w[3]);
  const T c = pick<2, 6, 3, 7>(w[0], w[1]), d = pick<2, 6, 3, 7>(w[2], w[3]);
  const T rows[4] = {pick<0, 1, 4, 5>(a, b), pick<2, 3, 6, 7>(a, b), pick<0, 1, 4, 5>(c, d), pick<2, 3, 6, 7>(c, d)};
  std::memcpy(out, rows, sizeof rows);
}

// out[i] = normal number 4 first + i of the sample, for i < kNormals.
static inline void normals(const Counter& at, uint32_t first, float* out) {
#pragma GCC unroll 4
  for (int i = 0; i < kNormals / 4; i += kVec) {
    Words64 even;
    for (int l = 0; l < kVec / 2; ++l) even[l] = uint32_t((l & 1) * kVec / 4 + l / 2);
    even += uint64_t{first} + uint64_t(i);
    const auto a = words<Vector>(at, even), b = words<Vector>(at, even + uint64_t{kVec / 2});
    const auto low = box_muller<Vector>(low_words(a.w[0], b.w[0]), low_words(a.w[1], b.w[1]));
    const auto high = box_muller<Vector>(low_words(a.w[2], b.w[2]), low_words(a.w[3], b.w[3]));
    Floats z[4] = {low.first, low.second, high.first, high.second};
    store_interleaved(z, (Floats*)(out + 4 * i));
  }
}

}  // namespace ddpm::cpu
