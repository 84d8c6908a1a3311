// Random numbers on the CPU. Outputs are dense arrays of num_samples rows; `at.sample` is the first row's sample.
#pragma once

#include <cstdint>

#include "../philox.h"

namespace ddpm::cpu {

// Standard normals, [num_samples, size].
void noise(float* out, int64_t num_samples, int64_t size, Counter at);

// Uniform in [0, num_timesteps), [num_samples].
void timesteps(int64_t* out, int64_t num_samples, int64_t num_timesteps, Counter at);

// Sixteen random bits each below `threshold` -> 0, others -> scale; [num_samples, size].
void dropout_mask(float* out, int64_t num_samples, int64_t size, uint32_t threshold, float scale, Counter at);

}  // namespace ddpm::cpu
