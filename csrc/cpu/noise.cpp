#include "noise.h"

#include <algorithm>

#include "../math.h"

namespace ddpm::cpu {
namespace {

// Counters worked on together: fixed-length loops over plain arrays, which the compiler turns into vector code.
constexpr int kLanes = 16;

struct Block {
  uint32_t w[4][kLanes];
};

Block block_of_words(const Counter& at, uint32_t first) {
  Block b;
  for (int l = 0; l < kLanes; ++l) {
    const Words w = words(at, first + uint32_t(l));
    for (int i = 0; i < 4; ++i) b.w[i][l] = w.w[i];
  }
  return b;
}

// Fills [num_samples, size] in chunks of kLanes counters; `values(block, chunk)` turns words into PerCounter numbers each.
template <int PerCounter, class Values>
void fill(float* out, int64_t num_samples, int64_t size, Counter at, Values values) {
  constexpr int64_t kChunk = int64_t{kLanes} * PerCounter;
  for (int64_t n = 0; n < num_samples; ++n, ++at.sample, out += size) {
    for (int64_t e = 0; e < size; e += kChunk) {
      float chunk[kChunk];
      values(block_of_words(at, uint32_t(e / PerCounter)), chunk);
      std::copy_n(chunk, std::min(kChunk, size - e), out + e);
    }
  }
}

}  // namespace

void noise(float* out, int64_t num_samples, int64_t size, Counter at) {
  fill<4>(out, num_samples, size, at, [](const Block& b, float* chunk) {
    for (int l = 0; l < kLanes; ++l) {
      const Pair low = box_muller(b.w[0][l], b.w[1][l]), high = box_muller(b.w[2][l], b.w[3][l]);
      chunk[4 * l + 0] = low.first;
      chunk[4 * l + 1] = low.second;
      chunk[4 * l + 2] = high.first;
      chunk[4 * l + 3] = high.second;
    }
  });
}

void timesteps(int64_t* out, int64_t num_samples, int64_t num_timesteps, Counter at) {
  for (int64_t n = 0; n < num_samples; ++n, ++at.sample) {
    out[n] = int64_t(uint64_t(words(at, 0).w[0]) * uint64_t(num_timesteps) >> 32);
  }
}

void dropout_mask(float* out, int64_t num_samples, int64_t size, uint32_t threshold, float scale, Counter at) {
  fill<8>(out, num_samples, size, at, [=](const Block& b, float* chunk) {
    for (int l = 0; l < kLanes; ++l) {
      for (int i = 0; i < 4; ++i) {
        chunk[8 * l + 2 * i] = (b.w[i][l] & 0xFFFFu) >= threshold ? scale : 0.0f;
        chunk[8 * l + 2 * i + 1] = (b.w[i][l] >> 16) >= threshold ? scale : 0.0f;
      }
    }
  });
}

}  // namespace ddpm::cpu
