// Standard normals of a sample, a batch of counters at a time.
#pragma once

#include "../math.h"

namespace ddpm::cpu {

// Counters worked on together: fixed-length loops over plain arrays, which the compiler turns into vector code.
constexpr int kLanes = 16;
constexpr int kNormals = 4 * kLanes;  // normals of a batch

struct Block {
  uint32_t w[4][kLanes];
};

static inline Block block_of_words(const Counter& at, uint32_t first) {
  Block b;
  for (int l = 0; l < kLanes; ++l) {
    const Words w = words(at, first + uint32_t(l));
    for (int i = 0; i < 4; ++i) b.w[i][l] = w.w[i];
  }
  return b;
}

// out[i] = normal number 4 first + i of the sample, for i < kNormals.
static inline void normals(const Counter& at, uint32_t first, float* out) {
  const Block b = block_of_words(at, first);
  for (int l = 0; l < kLanes; ++l) {
    const Pair low = box_muller(b.w[0][l], b.w[1][l]), high = box_muller(b.w[2][l], b.w[3][l]);
    out[4 * l + 0] = low.first;
    out[4 * l + 1] = low.second;
    out[4 * l + 2] = high.first;
    out[4 * l + 3] = high.second;
  }
}

}  // namespace ddpm::cpu
