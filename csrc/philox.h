// Philox4x32-10 (Salmon et al. 2011), shared by host and device code.
// Counter: (element block, draw, sample, stream | high bits of sample << 8); key: the two words of a 64-bit seed.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define DDPM_INLINE __host__ __device__ __forceinline__
#else
// Never a function of its own: the linker would give one instruction set's copy to another.
#define DDPM_INLINE inline __attribute__((always_inline))
#endif

#if defined(__CUDA_ARCH__)
#define DDPM_UNROLL_10 _Pragma("unroll")
#elif defined(__CUDACC__)  // whose compiler for the host knows neither
#define DDPM_UNROLL_10
#else
#define DDPM_UNROLL_10 _Pragma("GCC unroll 10")
#endif

namespace ddpm {

// The formulas are written for any `V` with these members: here one number, in cpu/normals.h a vector of them.
struct Scalar {
  using Float = float;
  using Int = int32_t;
  using Word = uint32_t;
  using Wide = uint64_t;
  static DDPM_INLINE Wide product(Wide a, uint32_t factor) { return uint64_t(uint32_t(a)) * factor; }  // a's low half
  template <class T>
  static DDPM_INLINE Float to_float(T x) {
    return float(x);
  }
  static DDPM_INLINE Float root(Float x) { return __builtin_sqrtf(x); }
};

// What a block of random numbers is drawn for: everything of a counter but the element block.
struct Counter {
  uint64_t seed;
  uint64_t sample;
  uint32_t draw;
  uint32_t stream;
};

struct Words {
  uint32_t w[4];
};

// Words as the products take and leave them: each the low half of 64 bits, with no meaning in the high half.
template <class V>
struct WideWords {
  typename V::Wide w[4];
};

template <class V>
DDPM_INLINE WideWords<V> philox4x32(WideWords<V> c, uint32_t k0, uint32_t k1) {
DDPM_UNROLL_10
  for (int round = 0; round < 10; ++round) {
    const auto p0 = V::product(c.w[0], 0xD2511F53u), p1 = V::product(c.w[2], 0xCD9E8D57u);
    c = {{p1 >> 32 ^ c.w[1] ^ uint64_t{k0}, p1, p0 >> 32 ^ c.w[3] ^ uint64_t{k1}, p0}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

template <class V>
DDPM_INLINE WideWords<V> wide_words(const Counter& at, typename V::Wide block) {
  const typename V::Wide zero = {};
  const uint64_t last = at.stream | at.sample >> 32 << 8;
  return philox4x32<V>({{block, zero + at.draw, zero + at.sample, zero + last}}, uint32_t(at.seed),
                       uint32_t(at.seed >> 32));
}

DDPM_INLINE Words words(const Counter& at, uint32_t block) {
  const auto c = wide_words<Scalar>(at, block);
  return {{uint32_t(c.w[0]), uint32_t(c.w[1]), uint32_t(c.w[2]), uint32_t(c.w[3])}};
}

}  // namespace ddpm
