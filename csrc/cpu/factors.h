// Factors of dropout: sixteen random bits each, below the threshold 0, else the factor that keeps the mean.
#pragma once

#include <cstring>

#include "normals.h"

namespace ddpm::cpu {

constexpr int64_t kFactors = 8 * kLanes;  // of a batch of counters

static inline void factor_batch(const Counter& at, uint32_t first, uint32_t threshold, float factor, float* out) {
  const Block b = block_of_words(at, first);
  for (int l = 0; l < kLanes; ++l) {
    for (int i = 0; i < 4; ++i) {
      out[8 * l + 2 * i] = (b.w[i][l] & 0xFFFFu) >= threshold ? factor : 0.0f;
      out[8 * l + 2 * i + 1] = (b.w[i][l] >> 16) >= threshold ? factor : 0.0f;
    }
  }
}

// out[i] = factor of the sample's element first + i, in H, W, C order, for i < count.
static inline void dropout_factors(const Counter& at, int64_t first, int64_t count, uint32_t threshold, float factor,
                                   float* out) {
  float batch[kFactors];
  for (int64_t skip = first % 8, e = first - skip; e < first + count; e += kFactors, skip = 0) {
    const int64_t done = e + skip - first, left = count - done;
    if (skip == 0 && left >= kFactors) {
      factor_batch(at, uint32_t(e / 8), threshold, factor, out + done);
    } else {
      factor_batch(at, uint32_t(e / 8), threshold, factor, batch);
      const int64_t made = kFactors - skip < left ? kFactors - skip : left;
      std::memcpy(out + done, batch + skip, size_t(made) * sizeof(float));
    }
  }
}

}  // namespace ddpm::cpu
