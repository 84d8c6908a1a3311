// What the kernel of sampler_step is told, and its launcher.
#pragma once

#include "numbers.h"

namespace ddpm::cuda {

// [N, ...], each sample dense, in its own order or with the channels of a pixel adjacent; without data there is none.
struct Array {
  void* data;
  int64_t sample;  // elements from one sample to the next
  Type type;
  bool last;
};

struct SamplerStep {
  int64_t samples;
  int32_t size, channels, pixels;  // of a sample: elements, and for places in channels_last
  Array out, x0_out, x, model_out, hist, noise, variance;  // the variance is of noise
  const void* rows;  // [S, columns]: t, c_in, p_x, p_m, c_x, c_0, c_h, c_z and, for the variance, c_v
  Type rows_type;
  int32_t columns;
  const int64_t* k;  // the row to take
  float clip;        // infinite for none
  bool drawn;        // the noise, from:
  Draws draws;
};

Error sampler_step(const SamplerStep& of, Stream stream);

}  // namespace ddpm::cuda
