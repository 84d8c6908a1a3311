// Factors of dropout: sixteen random bits each, below the threshold 0, else the factor that keeps the mean.
#pragma once

#include <cstring>

#include "normals.h"

namespace ddpm::cpu {

constexpr int64_t kFactors = 2 * kNormals;  // of a batch of counters, eight of each

DDPM_INLINE void factor_batch(const Counter& at, uint32_t first, uint32_t threshold, float factor, float* out) {
  uint16_t halves[kFactors];
  random_halves(at, first, halves);
  const float kept = factor;  // a copy, which no store can change
  for (int i = 0; i < kFactors; ++i) out[i] = halves[i] >= threshold ? kept : 0.0f;
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
