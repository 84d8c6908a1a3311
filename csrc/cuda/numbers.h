// What the kernels' arguments have in common.
#pragma once

#include "machine.h"

namespace ddpm::cuda {

constexpr float kLog2E = 1.4426950408889634f;

enum class Type : int { float32, bf16, float16, float64 };

// Where random numbers come from; seed, draw and maybe the first sample are read on the device.
struct Draws {
  const int64_t *seed, *draw, *first_sample;
  int64_t first;  // sample, where it is no pointer
  uint32_t stream;
};

}  // namespace ddpm::cuda
