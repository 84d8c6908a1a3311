// The native kernels, once per instruction set. Every csrc/cpu/<op>.cpp is compiled several times, each time into the
// namespace of its instruction set; a new kernel is one line in the list below, and its file.
#pragma once

#include <cstdint>

#include "../philox.h"
#include "convolution.h"
#include "group_norm_silu.h"

namespace ddpm::cpu {

enum class Type { float32, bf16 };
constexpr int kDims = 7;  // of a sample, at most

// A tensor of any layout: samples by one stride, a sample's elements by those of its dimensions, the innermost last.
// The bindings merge dimensions that lie like one. Without data there is no tensor.
struct Array {
  char* data;
  Type type;
  int dims;
  int64_t sample_stride, size[kDims], stride[kDims];
};

struct Batch {
  int64_t num_samples, size;  // elements of a sample
};

// A tensor, or numbers to be drawn, or neither.
struct Noise {
  Array given;
  bool drawn;
  Counter at;
};

struct SamplerStep {
  Batch batch;
  Array out, x0_out, x, model_out, hist, variance;
  Noise noise;
  float p_x, p_m, c_x, c_0, c_h, c_z, c_v, clip;
};

struct QSample {
  Batch batch;
  Array out, x_start;
  Noise noise;
  const int64_t* t;
  const float *signal, *sigma;
};

// [images][tokens][channels], channels adjacent.
struct Rows3 {
  const float* data;
  int64_t image, token;
};

struct Attention {
  int64_t images, tokens, channels;
  float scale;
  Rows3 q, k, v;
  float* out;
  int64_t out_image, out_token;
};

// Numbers of an average, and as many of what goes into it.
struct Stretch {
  float* average;
  const float* value;
  int64_t count;
};

struct Bytes {
  const char* data;
  int64_t count;
};

enum class Loss { l1, l2, huber };

// Without coefficients the target is the noise.
struct DiffusionLoss {
  Batch batch;
  Array model_out;
  Noise noise;
  const float *noise_coef, *x_coef;
  Array x_start;
  Loss loss;
};

}  // namespace ddpm::cpu

// Outputs are dense arrays of num_samples rows, but for an Array; `at.sample` is the first row's sample; `threads` is
// the most to use.
//   noise          standard normals, [num_samples, size]
//   timesteps      uniform in [0, num_timesteps), [num_samples]
//   dropout_mask   sixteen random bits each: below `threshold` 0, else `scale`; [num_samples, size]
//   sampler_step, q_sample   as in ddpm_fast/reference
//   timestep_embedding       sines and cosines of t times the frequencies; [num_samples, 2 half]
//   ema_update               average += weight (value - average), for each stretch
//   digests                  a number for each of the pieces, which a change of its bits or of their order changes
//   attention                softmax(q k' scale) v
//   conv3x3                  as in ddpm_fast/reference, of weights that convolution_weights laid out; convolution_room
//                            tells how many numbers these are; conv3x3_gradient is that of the weight
//   conv1x1                  a product of pixels and weights, of what convolution_weights laid out, too
//   diffusion_loss           a sum for each piece of the batch; and the gradient of means of `count` elements, given
//                            theirs: grad[step n] is that of the mean that sample n is in
#define DDPM_KERNELS(KERNEL)                                                                              \
  KERNEL(noise, (float* out, int64_t num_samples, int64_t size, Counter at, int threads))                 \
  KERNEL(timesteps, (int64_t* out, int64_t num_samples, int64_t num_timesteps, Counter at))               \
  KERNEL(dropout_mask, (float* out, int64_t num_samples, int64_t size, uint32_t threshold, float scale,   \
                        Counter at, int threads))                                                         \
  KERNEL(group_norm_silu, (const GroupNorm& g, const GroupNormForward& f, int threads))                   \
  KERNEL(group_norm_silu_backward, (const GroupNorm& g, const GroupNormBackward& b, int threads))        \
  KERNEL(norm_of_moments, (const NormOfMoments& of, int threads))                                         \
  KERNEL(sampler_step, (const SamplerStep& of, int threads))                                              \
  KERNEL(q_sample, (const QSample& of, int threads))                                                      \
  KERNEL(timestep_embedding, (float* out, const double* t, int64_t num_samples, const double* frequencies, \
                              int64_t half, int threads))                                                 \
  KERNEL(attention, (const Attention& of, int threads))                                                     \
  KERNEL(conv3x3, (const Conv3x3& of, int threads))                                                         \
  KERNEL(conv1x1, (const Convolution& of, int threads))                                                     \
  KERNEL(conv3x3_gradient, (const Conv3x3Gradient& of, int threads))                                        \
  KERNEL(convolution_room, (const ConvolutionWeights& of, int64_t* numbers))                                       \
  KERNEL(convolution_weights, (const ConvolutionWeights& of, int threads))                                          \
  KERNEL(ema_update, (const Stretch* stretches, int64_t count, float weight, int threads))                \
  KERNEL(digests, (const Bytes* pieces, int64_t count, uint64_t* digests, int threads))                   \
  KERNEL(diffusion_loss, (const DiffusionLoss& of, double* sums, int threads))                            \
  KERNEL(diffusion_loss_backward, (const DiffusionLoss& of, const float* grad, int64_t step, double count,  \
                                   const Array& out, int threads))

namespace ddpm::cpu {

// How many sums diffusion_loss writes: one for each piece of each sample.
constexpr int64_t kPiece = 1024;
static constexpr int64_t pieces_of(int64_t size) { return (size + kPiece - 1) / kPiece; }

struct Kernels {
  const char* isa;
#define DDPM_FIELD(name, arguments) void(*name) arguments;
  DDPM_KERNELS(DDPM_FIELD)
#undef DDPM_FIELD
};

#if defined(DDPM_ISA)
namespace DDPM_ISA {
extern const Kernels kernels;
#define DDPM_DECLARE(name, arguments) void name arguments;
DDPM_KERNELS(DDPM_DECLARE)
#undef DDPM_DECLARE
}  // namespace DDPM_ISA
#endif

}  // namespace ddpm::cpu
