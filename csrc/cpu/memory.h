// How much the caches hold, and memory for the length of a call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <initializer_list>

#if defined(__unix__)
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace ddpm::cpu::DDPM_ISA {

// Room for so many numbers, which the calling thread keeps for its next call, whichever kernel's: from large allocations
// the system takes every page back, and a first touch costs more than a convolution's work on it. In large pages, where the
// system has them. In kernels.cpp.
float* kept(int64_t count);

namespace {

// Bytes of a core's first and second cache, as the system tells, else what is usual.
#if defined(_SC_LEVEL1_DCACHE_SIZE) && defined(_SC_LEVEL2_CACHE_SIZE)
inline int64_t told(int name, int64_t usual) {
  const long size = sysconf(name);
  return size > 0 ? size : usual;
}
inline int64_t first_cache() {
  static const int64_t size = told(_SC_LEVEL1_DCACHE_SIZE, 1 << 15);
  return size;
}
inline int64_t second_cache() {
  static const int64_t size = told(_SC_LEVEL2_CACHE_SIZE, 1 << 20);
  return size;
}
#else
inline int64_t first_cache() { return 1 << 15; }
inline int64_t second_cache() { return 1 << 20; }
#endif

// Bytes of the third cache, as the processor tells; 0 if it doesn't. The system adds up those of all its processors.
inline int64_t third_cache() {
  int64_t size = 0;
#if defined(__x86_64__)
  for (const unsigned leaf : {0x4u, 0x8000001Du}) {  // Intel's, AMD's
    unsigned a, b, c, d;
    for (unsigned i = 0; __get_cpuid_count(leaf, i, &a, &b, &c, &d) && (a & 31) != 0; ++i) {
      const int64_t ways = (b >> 22) + 1, partitions = (b >> 12 & 1023) + 1, line = (b & 4095) + 1;
      if ((a >> 5 & 7) == 3) size = ways * partitions * line * (int64_t{c} + 1);
    }
  }
#endif
  return size;
}

// Whether a call on so many bytes goes to memory: a quarter of the third cache is theirs, the rest is other cores'.
inline bool in_memory(int64_t bytes) {
  static const int64_t size = third_cache();
  return size > 0 && bytes > size / 4;
}

// Numbers for the length of a call, in whole pages: what one thread writes is no neighbour of another's, where the
// processor would fetch it ahead. The memory is the allocator's; what doesn't fit it ends the process, as elsewhere.
constexpr int64_t kPage = 4096 / sizeof(float);

inline int64_t whole_pages(int64_t count) { return (count + kPage - 1) / kPage * kPage; }

class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<float*>(std::aligned_alloc(kPage * sizeof(float), whole_pages(count) * sizeof(float)))) {
    if (data_ == nullptr) std::abort();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* get() const { return data_; }

 private:
  float* data_;
};

}  // namespace
}  // namespace ddpm::cpu::DDPM_ISA
