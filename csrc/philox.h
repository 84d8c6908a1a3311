// Philox4x32-10 (Salmon et al. 2011), shared by host and device code.
// Counter: (element block, draw, sample, stream | high bits of sample << 8); key: the two words of a 64-bit seed.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define DDPM_INLINE __host__ __device__ __forceinline__
#else
// Never a function of its own: the linker would give one instruction set's copy to another.
#define DDPM_INLINE inline __attribute__((always_inline))
#endif

namespace ddpm {

// The numbers that the formulas are written for: one of each kind. cpu/vec.h has vectors of them.
struct Scalar {
  using Float = float;
  using Int = int32_t;
  using Word = uint32_t;
  using Wide = uint64_t;
  static DDPM_INLINE Wide product(Wide a, uint32_t b) { return uint64_t(uint32_t(a)) * b; }  // of a's low half
  static DDPM_INLINE Float to_float(Int x) { return float(x); }
  static DDPM_INLINE Float to_float(Word x) { return float(x); }
  static DDPM_INLINE Float root(Float x) { return __builtin_sqrtf(x); }
};

// What a block of random numbers is drawn for: everything of a counter but the element block.
struct Counter {
  uint64_t seed;
  uint64_t sample;
  uint32_t draw;
  uint32_t stream;
};

// Four words, each the low half of a number; the high half holds whatever the products left there.
template <class V>
struct Words {
  typename V::Wide w[4];
};

template <class V>
DDPM_INLINE Words<V> philox4x32(Words<V> c, uint32_t k0, uint32_t k1) {
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const auto p0 = V::product(c.w[0], 0xD2511F53u), p1 = V::product(c.w[2], 0xCD9E8D57u);
    c = {{p1 >> 32 ^ c.w[1] ^ uint64_t{k0}, p1, p0 >> 32 ^ c.w[3] ^ uint64_t{k1}, p0}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

template <class V = Scalar>
DDPM_INLINE Words<V> words(const Counter& at, typename V::Wide block) {
  const typename V::Wide zero = {};
  const uint64_t last = at.stream | at.sample >> 32 << 8;
  return philox4x32<V>({{block, zero + at.draw, zero + at.sample, zero + last}}, uint32_t(at.seed), uint32_t(at.seed >> 32));
}

}  // namespace ddpm
