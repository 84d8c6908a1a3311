// What csrc/ uses of AVX-512, made of AVX2: so that code is tested on processors without it.
// For `make sanitize` alone: its compiler finds this file before its own of the name. A function has the name of the
// intrinsic that it stands for, and where masks are all ones takes none into account.
#pragma once
#include_next <immintrin.h>

#include <cstdint>

#if !defined(__AVX512F__)
#define __AVX512F__ 1
#define __AVX512BF16__ 1

namespace emulated {

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

// Two vectors of AVX2.
template <class Half>
struct Pair {
  Half low, high;
};

template <class Half, class Whole>
inline Pair<Half> halves(Whole v) {
  Pair<Half> pair;
  __builtin_memcpy(&pair, &v, sizeof v);
  return pair;
}

template <class Whole, class Half>
inline Whole whole(Half low, Half high) {
  const Pair<Half> pair = {low, high};
  Whole v;
  __builtin_memcpy(&v, &pair, sizeof v);
  return v;
}

inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  const auto x = halves<__m256>(a), y = halves<__m256>(b), z = halves<__m256>(c);
  return whole<__m512>(_mm256_fmadd_ps(x.low, y.low, z.low), _mm256_fmadd_ps(x.high, y.high, z.high));
}

inline __m512 maskz_min_ps(int, __m512 a, __m512 b) {
  const auto x = halves<__m256>(a), y = halves<__m256>(b);
  return whole<__m512>(_mm256_min_ps(x.low, y.low), _mm256_min_ps(x.high, y.high));
}

inline __m512 maskz_max_ps(int, __m512 a, __m512 b) {
  const auto x = halves<__m256>(a), y = halves<__m256>(b);
  return whole<__m512>(_mm256_max_ps(x.low, y.low), _mm256_max_ps(x.high, y.high));
}

inline __m512 maskz_sqrt_ps(int, __m512 a) {
  const auto x = halves<__m256>(a);
  return whole<__m512>(_mm256_sqrt_ps(x.low), _mm256_sqrt_ps(x.high));
}

inline __m512i maskz_mul_epu32(int, __m512i a, __m512i b) {
  const auto x = halves<__m256i>(a), y = halves<__m256i>(b);
  return whole<__m512i>(_mm256_mul_epu32(x.low, y.low), _mm256_mul_epu32(x.high, y.high));
}

inline void stream_ps(float* p, __m512 a) {
  const auto x = halves<__m256>(a);
  _mm256_stream_ps(p, x.low);
  _mm256_stream_ps(p + 8, x.high);
}

inline __m256 maskz_extractf32x8_ps(int, __m512 a, int which) {
  const auto x = halves<__m256>(a);
  return which ? x.high : x.low;
}

inline __m512i set1_epi32(int x) { return (__m512i)(Ints{} + x); }

inline __m512i maskz_cvtepu16_epi32(int, __m256i a) { return (__m512i) __builtin_convertvector((Halves)a, Words); }

inline __m256i maskz_cvtepi32_epi16(int, __m512i a) { return (__m256i) __builtin_convertvector((Words)a, Halves); }

inline __m512 maskz_permutex2var_ps(int, __m512 a, __m512i from, __m512 b) {
  const Pair<__m512> table = {a, b};
  const auto at = halves<__m256i>((__m512i)((Words)from & 31));
  const float* const numbers = (const float*)&table;
  return whole<__m512>(_mm256_i32gather_ps(numbers, at.low, 4), _mm256_i32gather_ps(numbers, at.high, 4));
}

// Truncated to as many bits as the instruction promises.
inline __m512 maskz_rcp14_ps(int, __m512 a) { return (__m512)((Words)(1.0f / (Floats)a) & 0xFFFFFE00u); }

// a + b rounded down, the only rounding that is asked for.
inline __m512 maskz_add_round_ps(int, __m512 a, __m512 b, int) {
  constexpr unsigned kDown = 0x3F80;  // of MXCSR: every exception masked, round down
  const unsigned before = _mm_getcsr();
  auto x = halves<__m256>(a);
  const auto y = halves<__m256>(b);
  asm volatile(
      "vldmxcsr %2\n\tvaddps %3, %0, %0\n\tvaddps %4, %1, %1\n\tvldmxcsr %5"
      : "+&x"(x.low), "+&x"(x.high)
      : "m"(kDown), "x"(y.low), "x"(y.high), "m"(before));
  return whole<__m512>(x.low, x.high);
}

inline Floats floors(Floats a) {
  const auto x = halves<__m256>(a);
  return whole<Floats>(_mm256_floor_ps(x.low), _mm256_floor_ps(x.high));
}

// What is left of a when it is rounded down to `control >> 4` binary places; of an infinity 0.
inline __m512 maskz_reduce_ps(int, __m512 a, int control) {
  const float scale = float(1 << (control >> 4));
  const Floats x = (Floats)a, left = x - floors(x * scale) / scale;
  return (__m512)(x - x == 0.0f || x != x ? left : Floats{});
}

// a 2^floor(b), rounded once: the first factor leaves a normal number.
inline __m512 maskz_scalef_ps(int, __m512 a, __m512 b) {
  Floats power = floors((Floats)b);
  power = power > 254.0f ? Floats{} + 254.0f : power < -252.0f ? Floats{} - 252.0f : power;
  const Floats first = power > 127.0f ? Floats{} + 127.0f : power < -126.0f ? Floats{} - 126.0f : power;
  const auto two_to = [](Floats n) { return (Floats)((__builtin_convertvector(n, Ints) + 127) << 23); };
  const Floats scaled = (Floats)a * two_to(first) * two_to(power - first);
  return (__m512)((Floats)b == (Floats)b ? scaled : (Floats)b);
}

// To bf16: to nearest, ties to even; what is too small to be normal becomes 0.
inline Halves narrowed(Floats x) {
  Words bits = (Words)x;
  bits = (bits & 0x7F800000u) == 0 ? bits & 0x80000000u : bits;
  const Words rounded = (bits + ((bits >> 16 & 1) + 0x7FFF)) >> 16;
  return __builtin_convertvector(x == x ? rounded : (bits >> 16 | 0x40), Halves);
}

inline __m256i cvtneps_pbh(__m512 a) { return (__m256i)narrowed((Floats)a); }

inline __m512i cvtne2ps_pbh(__m512 high, __m512 low) { return whole<__m512i>(cvtneps_pbh(low), cvtneps_pbh(high)); }

// sum + a b of the second ones of all pairs, and then of the first ones.
inline __m512 dpbf16_ps(__m512 sum, __m512bh pairs, __m512bh others) {
  const Words a = (Words)pairs, b = (Words)others;
  const __m512 odd = fmadd_ps((__m512)(a & 0xFFFF0000u), (__m512)(b & 0xFFFF0000u), sum);
  return fmadd_ps((__m512)(a << 16), (__m512)(b << 16), odd);
}

}  // namespace emulated

#define _mm512_cvtne2ps_pbh emulated::cvtne2ps_pbh
#define _mm512_cvtneps_pbh emulated::cvtneps_pbh
#define _mm512_dpbf16_ps emulated::dpbf16_ps
#define _mm512_fmadd_ps emulated::fmadd_ps
#define _mm512_maskz_add_round_ps emulated::maskz_add_round_ps
#define _mm512_maskz_cvtepi32_epi16 emulated::maskz_cvtepi32_epi16
#define _mm512_maskz_cvtepu16_epi32 emulated::maskz_cvtepu16_epi32
#define _mm512_maskz_extractf32x8_ps emulated::maskz_extractf32x8_ps
#define _mm512_maskz_max_ps emulated::maskz_max_ps
#define _mm512_maskz_min_ps emulated::maskz_min_ps
#define _mm512_maskz_mul_epu32 emulated::maskz_mul_epu32
#define _mm512_maskz_permutex2var_ps emulated::maskz_permutex2var_ps
#define _mm512_maskz_rcp14_ps emulated::maskz_rcp14_ps
#define _mm512_maskz_reduce_ps emulated::maskz_reduce_ps
#define _mm512_maskz_scalef_ps emulated::maskz_scalef_ps
#define _mm512_maskz_sqrt_ps emulated::maskz_sqrt_ps
#define _mm512_set1_epi32 emulated::set1_epi32
#define _mm512_stream_ps emulated::stream_ps

#endif
