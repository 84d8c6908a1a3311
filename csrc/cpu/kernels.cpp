// The table of one instruction set.
#include "kernels.h"

#include <cstdlib>

#include "memory.h"

#if defined(__unix__)
#include <sys/mman.h>
#endif

#define DDPM_TEXT_OF(x) #x
#define DDPM_TEXT(x) DDPM_TEXT_OF(x)

namespace ddpm::cpu::DDPM_ISA {
namespace {

struct Room {
  float* data = nullptr;
  int64_t bytes = 0;
  ~Room() { std::free(data); }
};

}  // namespace

float* kept(int64_t count) {
  thread_local Room room;
  constexpr int64_t kLarge = int64_t{1} << 21;
  const int64_t bytes = (count * int64_t(sizeof(float)) + kLarge - 1) / kLarge * kLarge;
  if (bytes > room.bytes) {
    std::free(room.data);
    room.data = static_cast<float*>(std::aligned_alloc(kLarge, size_t(bytes)));
    if (room.data == nullptr) std::abort();
    room.bytes = bytes;
#if defined(MADV_HUGEPAGE)
    madvise(room.data, size_t(bytes), MADV_HUGEPAGE);
#endif
  }
  return room.data;
}

#define DDPM_ENTRY(name, arguments) name,
const Kernels kernels = {DDPM_TEXT(DDPM_ISA), DDPM_KERNELS(DDPM_ENTRY)};
#undef DDPM_ENTRY

}  // namespace ddpm::cpu::DDPM_ISA
