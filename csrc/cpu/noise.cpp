#include <cstring>

#include "../math.h"
#include "kernels.h"
#include "parallel.h"

namespace ddpm::cpu::DDPM_ISA {
namespace {

// Counters worked on together: fixed-length loops over plain arrays, which the compiler turns into vector code.
constexpr int kLanes = 16;
constexpr int64_t kPiece = 1 << 14;  // numbers of a task

struct Block {
  uint32_t w[4][kLanes];
};

inline Block block_of_words(const Counter& at, uint32_t first) {
  Block b;
  for (int l = 0; l < kLanes; ++l) {
    const Words w = words(at, first + uint32_t(l));
    for (int i = 0; i < 4; ++i) b.w[i][l] = w.w[i];
  }
  return b;
}

// Fills [num_samples, size] in chunks of kLanes counters; `values(block, chunk)` turns words into PerCounter numbers each.
template <int PerCounter, class Values>
void fill(float* out, int64_t num_samples, int64_t size, Counter at, int threads, Values values) {
  constexpr int64_t kChunk = int64_t{kLanes} * PerCounter;
  const int64_t pieces = (size + kPiece - 1) / kPiece;
  parallel(num_samples * pieces, worth(threads, num_samples * size, kPiece), [=](int64_t task) {
    const int64_t n = task / pieces, first = task % pieces * kPiece;
    const int64_t last = first + kPiece < size ? first + kPiece : size;
    Counter mine = at;
    mine.sample += uint64_t(n);
    float* row = out + n * size;
    int64_t e = first;
    for (; e + kChunk <= last; e += kChunk) values(block_of_words(mine, uint32_t(e / PerCounter)), row + e);
    if (e < last) {
      float chunk[kChunk];
      values(block_of_words(mine, uint32_t(e / PerCounter)), chunk);
      std::memcpy(row + e, chunk, size_t(last - e) * sizeof(float));
    }
  });
}

}  // namespace

void noise(float* out, int64_t num_samples, int64_t size, Counter at, int threads) {
  fill<4>(out, num_samples, size, at, threads, [](const Block& b, float* chunk) {
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

void dropout_mask(float* out, int64_t num_samples, int64_t size, uint32_t threshold, float scale, Counter at,
                  int threads) {
  fill<8>(out, num_samples, size, at, threads, [=](const Block& b, float* chunk) {
    for (int l = 0; l < kLanes; ++l) {
      for (int i = 0; i < 4; ++i) {
        chunk[8 * l + 2 * i] = (b.w[i][l] & 0xFFFFu) >= threshold ? scale : 0.0f;
        chunk[8 * l + 2 * i + 1] = (b.w[i][l] >> 16) >= threshold ? scale : 0.0f;
      }
    }
  });
}

}  // namespace ddpm::cpu::DDPM_ISA
