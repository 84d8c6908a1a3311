// What the kernels of conv3x3 and conv1x1 are told. Images are channels_last, with rows as far apart as their pixels;
// strides are in elements; what is absent is null.
#pragma once

#include <cstdint>

#include "group_norm_silu.h"

namespace ddpm::cpu {

struct Convolution {
  int64_t images, height, width, channels, channels_1, out_channels;  // channels_1 of them are in x, the rest in x2
  bool half;  // bf16 storage and products, or float32
  Image x, x2;
  const void* weights;  // as convolution_weights left them
  const float* bias;    // [K]
  Image residual, y;
  float *mean, *squares;  // [N, K], of y: the mean and the sum of squares around it
};

struct Conv3x3 : Convolution {
  int tile;          // columns of a tile of the result, 2 or 4, and its rows, which in bf16 are 2
  bool transformed;  // the weights; else they are in the kernel, which takes longer but reads less
  const float *scale, *shift;  // [N, C], of what goes in, before its activation
  Activation activation;
};

// A weight [K, C, 3, 3], or [K, C, 1, 1], to be laid out by panels of output channels: [panels][C][taps][panel]; or
// transformed for conv3x3, [groups of panels][positions of a tile][panels of the group][C][panel]. In bf16 two channels lie
// side by side. What is missing to whole panels and pairs is 0.
struct ConvolutionWeights {
  int64_t channels, out_channels;
  int taps;              // 9 or 1
  int tile;              // for which they are transformed; 0 if they are not
  bool half, from_half;  // bf16 laid out; bf16 given
  const void* data;      // of the first row and column
  int64_t out_stride, in_stride, row_stride, column_stride;
  void* to;
};

// The gradient of the weight, in float32, [K, C, 3, 3].
struct Conv3x3Gradient {
  int64_t images, height, width, channels, out_channels;
  int tile;
  Image x, dy;
  float* to;
};

}  // namespace ddpm::cpu
