// The native kernels, once per instruction set. Every csrc/cpu/<op>.cpp is compiled several times, each time into the
// namespace of its instruction set; a new kernel is one line in the list below, and its file.
#pragma once

#include <cstdint>

#include "../philox.h"
#include "group_norm_silu.h"

// Outputs are dense arrays of num_samples rows; `at.sample` is the first row's sample; `threads` is the most to use.
//   noise          standard normals, [num_samples, size]
//   timesteps      uniform in [0, num_timesteps), [num_samples]
//   dropout_mask   sixteen random bits each: below `threshold` 0, else `scale`; [num_samples, size]
#define DDPM_KERNELS(KERNEL)                                                                              \
  KERNEL(noise, (float* out, int64_t num_samples, int64_t size, Counter at, int threads))                 \
  KERNEL(timesteps, (int64_t* out, int64_t num_samples, int64_t num_timesteps, Counter at))               \
  KERNEL(dropout_mask, (float* out, int64_t num_samples, int64_t size, uint32_t threshold, float scale,   \
                        Counter at, int threads))                                                         \
  KERNEL(group_norm_silu, (const GroupNorm& g, const GroupNormForward& f, int threads))                   \
  KERNEL(group_norm_silu_backward, (const GroupNorm& g, const GroupNormBackward& b, int threads))

namespace ddpm::cpu {

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
