// What the kernels of group_norm_silu are told, and their launchers. Strides are in elements; what is absent is null.
#pragma once

#include "numbers.h"

namespace ddpm::cuda {

enum class Activation : int { none, silu, relu, mish };

// An image tensor [N, C, H, W], the channels of a pixel adjacent, its rows as far apart as their pixels.
struct Image {
  void* data;
  int64_t image;
  int32_t pixel;
};

// A parameter [C], or with a step from image to image [N, C].
struct Row {
  const void* data;
  Type type;
  int32_t image;
};

// How a call is cut: a block has `slab` channels, whole groups, of `pixels` pixels of an image.
struct Cut {
  int32_t slab, pixels, chunks, threads;
  bool vectors;   // of 16 bytes; else elements
  bool one_pass;  // the blocks of a slab are a cluster, or a single one, and hold it in shared memory
};

struct GroupNorm {
  int64_t images;
  int32_t pixels, channels, channels_1;  // channels_1 of them are in x, the rest in x2
  int32_t groups;
  float eps;
  Activation activation;
  Type type;
  Image x, x2;  // in the backward x is h, where there is a residual
  Row weight, bias, add, scale, shift;
  double* statistics;  // [N, groups, 2], mean and 1 / deviation: a float32 mean would lose what an offset hides
  float* table;        // [N, chunks, 3, C], what blocks leave to each other where they are no cluster
  Draws draws;
  uint32_t threshold;  // of dropout; 0 for none
  float factor;
  Cut cut;
};

struct Forward : GroupNorm {
  Image residual, h, y;  // h = x + residual, where there is one; both have x's channels
};

struct Backward : GroupNorm {
  Image dy, dh, dx, dx2;  // dh: gradient of h, where that was an output
  float* rows;            // [5, N, C]: each image's gradients of weight, bias, add, scale and shift
};

Error group_norm_silu(const Forward& f, Stream stream);
Error group_norm_silu_backward(const Backward& b, Stream stream);

}  // namespace ddpm::cuda
