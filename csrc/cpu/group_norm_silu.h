// What the kernels of group_norm_silu are told. Strides are in elements; parameters are float32; what is absent is null.
#pragma once

#include <cstdint>

#include "../philox.h"

namespace ddpm::cpu {

enum class Activation : int { none, silu, relu, mish };

// An image tensor [N, C, H, W]; in channels_last its channels are adjacent, else its pixels.
struct Image {
  void* data;
  int64_t image, channel, pixel;
};

struct GroupNorm {
  int64_t images, pixels, channels, channels_1;  // channels_1 of them are in x, the rest in x2
  int64_t groups;
  double eps;
  Activation activation;
  bool half, channels_last;    // bf16 storage, or float32
  Image x, x2;                 // in the backward x is h, where there is a residual
  const float *weight, *bias;  // [C]
  const float* add;            // [N, C] with add_stride = C, or [C] with add_stride = 0
  int64_t add_stride;
  const float *scale, *shift;  // [N, C]
  double* statistics;          // [N, groups, 2], mean and 1 / deviation: a float32 mean would lose what an offset hides
  uint32_t threshold;          // of dropout; 0 for none
  float factor;
  Counter at;
};

struct GroupNormForward {
  Image residual, y, h;  // h = x + residual, where there is one; both have x's channels
};

struct GroupNormBackward {
  Image dy, dh, dx, dx2;                                // dh: gradient of h, where that was an output
  float *dweight, *dbias, *dadd, *dscale, *dshift;      // [C], [C], like add, [N, C], [N, C]; null where not wanted
};

// A norm of images of which only the moments of each channel are needed, as a scale and a shift; all [N, C] but for the
// parameters, which are as in GroupNorm.
struct NormOfMoments {
  int64_t images, channels, groups;
  double pixels, eps;
  const float *mean, *squares;  // and the sum of squares around it
  const float *weight, *bias, *add;
  int64_t add_stride;
  float *scale, *shift;
};

}  // namespace ddpm::cpu
