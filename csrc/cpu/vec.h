// Vectors of the instruction set that a file is compiled for, on the compiler's own vector types.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace ddpm::cpu {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif
constexpr int kVec = kVecBytes / 4;  // floats in a vector

typedef float Floats __attribute__((vector_size(kVecBytes)));
typedef int32_t Ints __attribute__((vector_size(kVecBytes)));
typedef uint32_t Words32 __attribute__((vector_size(kVecBytes)));
typedef uint16_t Halves __attribute__((vector_size(kVecBytes / 2)));

// bfloat16 in memory; arithmetic is float's.
struct bf16 {
  uint16_t bits;
};

static inline Floats broadcast(float x) { return x - Floats{}; }

static inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// By intrinsics: gcc makes the conversions of a whole vector out of those of its halves.
static inline Floats load(const bf16* p) {
#if defined(__AVX512VBMI__)
  // In one operation: the bytes of number i to the high half of its place, bytes 4 i + 2 and 4 i + 3.
  typedef char Bytes __attribute__((vector_size(64)));
  Bytes from;
  for (int i = 0; i < 64; ++i) from[i] = char(i / 4 * 2 + i % 2);
  const __m512i narrow = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p));
  return (Floats)_mm512_maskz_permutexvar_epi8(0xCCCCCCCCCCCCCCCC, (__m512i)from, narrow);
#elif defined(__AVX512F__)
  return (Floats)((Words32)_mm512_maskz_cvtepu16_epi32(0xFFFF, _mm256_loadu_si256((const __m256i*)p)) << 16);
#elif defined(__AVX2__)
  return (Floats)((Words32)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)) << 16);
#elif defined(__SSE2__)
  return (Floats)_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64((const __m128i*)p));
#else
  Halves h;
  std::memcpy(&h, p, sizeof h);
  return (Floats)(__builtin_convertvector(h, Words32) << 16);
#endif
}

// The low halves.
static inline Halves narrowed(Words32 x) {
#if defined(__AVX512F__)
  return (Halves)_mm512_maskz_cvtepi32_epi16(0xFFFF, (__m512i)x);
#elif defined(__AVX2__)
  const __m256i low = _mm256_and_si256((__m256i)x, _mm256_set1_epi32(0xFFFF));
  const __m256i pairs = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
  return (Halves)_mm256_castsi256_si128(pairs);
#else
  return __builtin_convertvector(x, Halves);
#endif
}

static inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

static inline void store(bf16* p, Floats v) {
#if defined(__AVX512BF16__)
  const auto h = _mm512_cvtneps_pbh((__m512)v);
#else
  const Words32 bits = (Words32)v;
  const Words32 rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16;  // to nearest, ties to even
  const Words32 quiet = (bits >> 16) | 0x40;
  const Halves h = narrowed(v == v ? rounded : quiet);
#endif
  std::memcpy(p, &h, sizeof h);
}

// Two vectors: the instruction for both takes hardly longer than that for one.
static inline void store(float* p, Floats low, Floats high) {
  store(p, low);
  store(p + kVec, high);
}

static inline void store(bf16* p, Floats low, Floats high) {
#if defined(__AVX512BF16__)
  const auto h = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  std::memcpy(p, &h, sizeof h);
#else
  store(p, low);
  store(p + kVec, high);
#endif
}

// Past the caches, to an address of whole vectors. Other threads may see it late; see `streamed`.
static inline void stream(float* p, Floats v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)v);
#elif defined(__SSE2__)
  _mm_stream_ps(p, (__m128)v);
#else
  store(p, v);
#endif
}

// Ends a thread's streaming.
static inline void streamed() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// The first `count` of a vector, the rest 0; and back.
template <class T>
static inline Floats load_part(const T* p, int64_t count) {
  T part[kVec] = {};
  std::memcpy(part, p, size_t(count) * sizeof(T));
  return load(part);
}

template <class T>
static inline void store_part(T* p, Floats v, int64_t count) {
  T part[kVec];
  store(part, v);
  std::memcpy(p, part, size_t(count) * sizeof(T));
}

// a * b + c, fused where the instruction set fuses. Never in what must have the same bits everywhere.
static inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// The smaller and the larger one; b where one of them is NaN.
static inline Floats smaller(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_min_ps(0xFFFF, (__m512)a, (__m512)b);  // the plain forms warn in gcc 12
#elif defined(__AVX2__)
  return (Floats)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

static inline Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_max_ps(0xFFFF, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// The sum of a vector's numbers, by halves.
static inline float sum(Floats v) {
#if defined(__SSE2__)
#if defined(__AVX512F__)
  const __m256 half = _mm512_maskz_extractf32x8_ps(0xFF, (__m512)v, 0) +
                      _mm512_maskz_extractf32x8_ps(0xFF, (__m512)v, 1);
#elif defined(__AVX2__)
  const __m256 half = (__m256)v;
#endif
#if defined(__AVX2__)
  const __m128 quarter = _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
#else
  const __m128 quarter = (__m128)v;
#endif
  const __m128 pair = quarter + _mm_movehl_ps(quarter, quarter);
  return pair[0] + pair[1];
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

// How exactly a function is computed: to 3 ulp of float32, or to a twentieth of an ulp of bf16.
enum class Precision { fine, coarse };

// 1 / x for x in [1, inf].
template <Precision P>
static inline Floats reciprocal(Floats x) {
#if defined(__AVX512F__)
  const Floats r = (Floats)_mm512_maskz_rcp14_ps(0xFFFF, (__m512)x);
  if (P == Precision::coarse) return r;
  return fma(r, fma(-smaller(broadcast(0x1p126f), x), r, broadcast(1.0f)), r);  // without inf * 0; NaN stays
#else
  return 1.0f / x;
#endif
}

// a / x, x as there. The divider works beside the other units; where it is asked as often as here, that is faster.
template <Precision P>
static inline Floats quotient(Floats a, Floats x) {
  return P == Precision::coarse ? a * reciprocal<P>(x) : a / x;
}

// 2^u = scale * part, with part in [1, 2], and scale 0 or inf beyond the ends. In two parts it is used sooner: 1 + 2^u is
// one fma, and both are computed side by side.
struct Power {
  Floats scale, part;
};

#if defined(__AVX512F__)
// 2^(k / 32)
alignas(64) static constexpr float kPowers[32] = {
    0x1.0p+0f, 0x1.059b0ep+0f, 0x1.0b5586p+0f, 0x1.11301ep+0f, 0x1.172b84p+0f, 0x1.1d4874p+0f, 0x1.2387a6p+0f, 0x1.29e9ep+0f,
    0x1.306fep+0f, 0x1.371a74p+0f, 0x1.3dea64p+0f, 0x1.44e086p+0f, 0x1.4bfdaep+0f, 0x1.5342b6p+0f, 0x1.5ab07ep+0f, 0x1.6247ecp+0f,
    0x1.6a09e6p+0f, 0x1.71f75ep+0f, 0x1.7a1148p+0f, 0x1.82589ap+0f, 0x1.8ace54p+0f, 0x1.93737cp+0f, 0x1.9c4918p+0f, 0x1.a5503cp+0f,
    0x1.ae89fap+0f, 0x1.b7f77p+0f, 0x1.c199bep+0f, 0x1.cb720ep+0f, 0x1.d5818ep+0f, 0x1.dfc974p+0f, 0x1.ea4afap+0f, 0x1.f50766p+0f,
};
#endif

// The polynomials have the least relative error on [0, 1/32] with the table, on [0, 1] without it.
template <Precision P>
static inline Power power(Floats u) {
#if defined(__AVX512F__)
  constexpr int kDown = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  if constexpr (P == Precision::fine) {
    const Floats f = (Floats)_mm512_maskz_reduce_ps(0xFFFF, (__m512)u, 5 << 4 | kDown);  // less than 1/32
    // The lowest bits of the sum are those of u in 32nds; the table's index is five of them.
    const __m512 shifted = _mm512_maskz_add_round_ps(0xFFFF, (__m512)u, (__m512)broadcast(0x1.8p18f), kDown);
    const __m512 low = (__m512)load(kPowers), high = (__m512)load(kPowers + 16);
    const __m512 power = _mm512_maskz_permutex2var_ps(0xFFFF, low, (__m512i)shifted, high);
    const Floats q = fma(broadcast(0x1.f0f3e6p-3f), f, broadcast(0x1.62e11ep-1f));
    return {(Floats)_mm512_maskz_scalef_ps(0xFFFF, power, (__m512)u), fma(f, q, broadcast(1.0f))};
  }
  const Floats f = (Floats)_mm512_maskz_reduce_ps(0xFFFF, (__m512)u, kDown);
#else
  const Floats held = larger(broadcast(-126.0f), smaller(broadcast(126.0f), u));  // NaN stays
  const Floats magic = broadcast(0x1.8p23f);
  const Floats shifted = (held - 0.5f) + magic;  // the floor of it is in the low bits
  const Floats f = held - (shifted - magic);
#endif
  Floats p;
  if constexpr (P == Precision::fine) {
    p = fma(broadcast(0x1.e96912p-10f), f, broadcast(0x1.277c1cp-7f));
    p = fma(p, f, broadcast(0x1.c91c10p-5f));
    p = fma(p, f, broadcast(0x1.ebdb6ap-3f));
    p = fma(p, f, broadcast(0x1.62e4bap-1f));
    p = fma(p, f, broadcast(1.0f));
  } else {
    p = fma(broadcast(0x1.3f96a4p-4f), f, broadcast(0x1.cefc4cp-3f));
    p = fma(p, f, broadcast(0x1.64444cp-1f));
    p = fma(p, f, broadcast(0x1.fff632p-1f));
  }
#if defined(__AVX512F__)
  return {(Floats)_mm512_maskz_scalef_ps(0xFFFF, (__m512)broadcast(1.0f), (__m512)u), p};
#else
  Floats scale = (Floats)(0x3F800000 + ((Ints)shifted << 23));
  scale = u > 126.0f ? broadcast(__builtin_inff()) : scale;
  return {u < -126.0f ? Floats{} : scale, p};
#endif
}

constexpr float kLog2E = 0x1.715476p+0f;

}  // namespace ddpm::cpu
