// Vectors of the instruction set that a file is compiled for, on the compiler's own vector types.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
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

static inline Floats load(const bf16* p) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  return (Floats)(__builtin_convertvector(h, Words32) << 16);
}

static inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

static inline void store(bf16* p, Floats v) {
#if defined(__AVX512BF16__)
  const auto h = _mm512_cvtneps_pbh((__m512)v);
#else
  const Words32 bits = (Words32)v;
  const Words32 rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16;  // to nearest, ties to even
  const Words32 quiet = (bits >> 16) | 0x40;
  const Halves h = __builtin_convertvector(v == v ? rounded : quiet, Halves);
#endif
  std::memcpy(p, &h, sizeof h);
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
static inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
static inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// 1 / x to 2 ulp, for x in [1, inf].
static inline Floats reciprocal(Floats x) {
#if defined(__AVX512F__)
  const Floats r = (Floats)_mm512_maskz_rcp14_ps(0xFFFF, (__m512)x);  // the plain form warns in gcc 12
  const Floats error = fma(-x, r, broadcast(1.0f));
  return error == error ? fma(r, error, r) : r;  // inf: inf * 0
#else
  return 1.0f / x;
#endif
}

// e^x to 2 ulp; inf above 88.4, 0 below -87.3.
static inline Floats exp(Floats x) {
  const Floats low = broadcast(-87.33654f), high = broadcast(89.0f);
  x = x > high ? high : x;  // NaN stays
  const Floats clamped = x < low ? low : x;
  const Floats magic = broadcast(0x1.8p23f);
  const Floats shifted = fma(clamped, broadcast(0x1.715476p+0f), magic);
  const Floats n = shifted - magic;
  Floats r = fma(n, broadcast(-0x1.62e400p-1f), clamped);
  r = fma(n, broadcast(-0x1.7f7d1cp-20f), r);
  Floats p = broadcast(0x1.6a1f38p-10f);
  p = fma(p, r, broadcast(0x1.1239e0p-7f));
  p = fma(p, r, broadcast(0x1.5555f0p-5f));
  p = fma(p, r, broadcast(0x1.55547ap-3f));
  p = fma(p, r, broadcast(0x1.fffffep-2f));
  p = fma(p * r, r, r) + 1.0f;
  const Ints power = ((Ints)shifted - (Ints)magic + 127) << 23;
  const Floats result = p * (Floats)power;
  return x < low ? Floats{} : result;
}

static inline Floats silu(Floats z) { return z * reciprocal(1.0f + exp(-z)); }

// z tanh(log(1 + e^z)) = z (u - 1) / (u + 1) with u = (1 + e^z)^2, and z itself where e^z is beyond float.
static inline Floats mish(Floats z) {
  const Floats e = exp(z > 20.0f ? broadcast(20.0f) : z);
  const Floats u = e * (e + 2.0f);  // (1 + e^z)^2 - 1
  return z * (u / (u + 2.0f));
}

}  // namespace ddpm::cpu
