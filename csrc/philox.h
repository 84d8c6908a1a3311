// Philox4x32-10 (Salmon et al. 2011), shared by host and device code.
// Counter: (element block, draw, sample, stream | high bits of sample << 8); key: the two words of a 64-bit seed.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define DDPM_INLINE __host__ __device__ __forceinline__
#else
// Internal to each object: the linker must not give one instruction set's copy to another.
#define DDPM_INLINE static inline
#endif

namespace ddpm {

struct Words {
  uint32_t w[4];
};

// What a block of random numbers is drawn for: everything of a counter but the element block.
struct Counter {
  uint64_t seed;
  uint64_t sample;
  uint32_t draw;
  uint32_t stream;
};

DDPM_INLINE Words philox4x32(Words c, uint32_t k0, uint32_t k1) {
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c.w[0];
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * c.w[2];
    c = {{uint32_t(p1 >> 32) ^ c.w[1] ^ k0, uint32_t(p1), uint32_t(p0 >> 32) ^ c.w[3] ^ k1, uint32_t(p0)}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

DDPM_INLINE Words words(const Counter& at, uint32_t block) {
  const uint32_t last = at.stream | uint32_t(at.sample >> 32) << 8;
  return philox4x32({{block, at.draw, uint32_t(at.sample), last}}, uint32_t(at.seed), uint32_t(at.seed >> 32));
}

}  // namespace ddpm
