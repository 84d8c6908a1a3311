#include <cstring>

#include "factors.h"
#include "kernels.h"
#include "normals.h"
#include "parallel.h"

namespace ddpm::cpu::DDPM_ISA {
namespace {

constexpr int64_t kPiece = 1 << 14;  // numbers of a task

// Fills [num_samples, size]; `make(at, first, chunk)` writes a chunk: PerCounter numbers of each of its counters. It
// must be inlined: so its keys are prepared once for all chunks.
template <int PerCounter, class Make>
void fill(float* out, int64_t num_samples, int64_t size, Counter at, int threads, Make make) {
  constexpr int64_t kChunk = int64_t{kNormals} / 4 * PerCounter;
  const int64_t pieces = (size + kPiece - 1) / kPiece;
  parallel(num_samples * pieces, worth(threads, num_samples * size, kPiece), [=](int64_t task) {
    const int64_t n = task / pieces, first = task % pieces * kPiece;
    const int64_t last = first + kPiece < size ? first + kPiece : size;
    Counter mine = at;
    mine.sample += uint64_t(n);
    float* row = out + n * size;
    float end[kChunk];
    for (int64_t e = first; e < last; e += kChunk) {
      const bool whole = e + kChunk <= last;
      make(mine, uint32_t(e / PerCounter), whole ? row + e : end);
      if (!whole) std::memcpy(row + e, end, size_t(last - e) * sizeof(float));
    }
  });
}

}  // namespace

void noise(float* out, int64_t num_samples, int64_t size, Counter at, int threads) {
  const auto make = [](const Counter& mine, uint32_t first, float* chunk) __attribute__((always_inline)) {
    normals(mine, first, chunk);
  };
  fill<4>(out, num_samples, size, at, threads, make);
}

void timesteps(int64_t* out, int64_t num_samples, int64_t num_timesteps, Counter at) {
  for (int64_t n = 0; n < num_samples; ++n, ++at.sample) {
    out[n] = int64_t(uint64_t(words(at, 0).w[0]) * uint64_t(num_timesteps) >> 32);
  }
}

void dropout_mask(float* out, int64_t num_samples, int64_t size, uint32_t threshold, float scale, Counter at,
                  int threads) {
  const auto make = [=](const Counter& mine, uint32_t first, float* chunk) __attribute__((always_inline)) {
    factor_batch(mine, first, threshold, scale, chunk);
  };
  fill<8>(out, num_samples, size, at, threads, make);
}

}  // namespace ddpm::cpu::DDPM_ISA
