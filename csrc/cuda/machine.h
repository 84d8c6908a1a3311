// What the kernels use of a GPU, by names of our own. With DDPM_HOST host/machine.h stands in: the same kernels then run on a
// CPU, thread by thread, for tests.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ddpm::cuda {

// How a kernel is launched.
struct Grid {
  int64_t blocks;
  int cluster;  // neighbouring blocks that reach each other's shared memory; 1 for none
  int threads;
  size_t shared;  // bytes
};

// What launches are cut for: compute capability, processors, and the shared memory that a block may ask for.
struct Limits {
  int major, processors, shared;
};

}  // namespace ddpm::cuda

#if defined(DDPM_HOST)
#include "host/machine.h"
#else

#include <cuda_runtime_api.h>

namespace ddpm::cuda {

using Stream = cudaStream_t;
using Error = cudaError_t;
constexpr const char* kDeviceType = "cuda";

inline Error limits(int device, Limits& to) {
  Error error = cudaDeviceGetAttribute(&to.major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&to.processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(&to.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

// Where this thread's next launches go.
inline Error use(int device) { return cudaSetDevice(device); }
inline const char* text(Error error) { return cudaGetErrorString(error); }

}  // namespace ddpm::cuda

#if defined(__CUDACC__)

#define DDPM_DEVICE __device__ __forceinline__
#define DDPM_BOTH __host__ __device__ __forceinline__
#define DDPM_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define DDPM_ARGUMENT const __grid_constant__

namespace ddpm::cuda {

DDPM_DEVICE int thread() { return int(threadIdx.x); }
DDPM_DEVICE int threads() { return int(blockDim.x); }
DDPM_DEVICE int block() { return int(blockIdx.x); }

// The block's shared memory.
DDPM_DEVICE unsigned char* shared() {
  extern __shared__ __align__(16) unsigned char room[];
  return room;
}

// The compiler is told that an address is one of global memory: the instructions for any kind of memory are slower.
template <class T>
DDPM_DEVICE T* global(T* at) {
  __builtin_assume(__isGlobal(at));
  return at;
}

DDPM_DEVICE void sync() { __syncthreads(); }
DDPM_DEVICE float shuffle_xor(float v, int lanes) { return __shfl_xor_sync(0xFFFFFFFFu, v, lanes); }

// All threads of a cluster have arrived before one goes on from the wait. Older GPUs have no clusters.
DDPM_DEVICE void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}

DDPM_DEVICE void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// The same place in the shared memory of another block of the cluster.
DDPM_DEVICE const float* of_peer(const float* mine, int rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t theirs;
  asm("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(mine), "r"(rank));
  return reinterpret_cast<const float*>(theirs);
#else
  return mine;
#endif
}

// 16 bytes from global to shared memory, there after `wait_for_copies`.
DDPM_DEVICE void copy_16(void* to, const void* from) {
  const auto at = uint32_t(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
}

DDPM_DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

DDPM_DEVICE float power_of_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Within 2 ulp; 0 for divisors above 2^126.
DDPM_DEVICE float quotient(float a, float b) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(b));
  return a * r;
}

DDPM_DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }

// Two numbers as they are stored, the first one in the low half.
DDPM_DEVICE uint32_t to_bf16(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

DDPM_DEVICE uint32_t to_float16(float low, float high) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

DDPM_DEVICE float from_float16(uint16_t bits) {
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
  return v;
}

template <class Arguments>
Error launch(void (*kernel)(Arguments), const Grid& grid, const Arguments& arguments, Stream stream) {
  constexpr size_t kUnasked = 48 << 10;  // more shared memory has to be asked for
  if (grid.shared > kUnasked) {
    const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(grid.shared));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {unsigned(grid.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(grid.blocks));
  config.blockDim = dim3(unsigned(grid.threads));
  config.dynamicSmemBytes = grid.shared;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments);
}

}  // namespace ddpm::cuda

#endif
#endif
