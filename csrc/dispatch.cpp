#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace ddpm::cpu {

// CMake defines DDPM_HAS_<set> for each set that it builds, and DDPM_EMULATED where the last one is made of AVX2.
#define DDPM_SET(set)            \
  namespace set {                \
  extern const Kernels kernels;  \
  }
DDPM_SET(baseline)
DDPM_SET(avx2)
DDPM_SET(avx512)
DDPM_SET(avx512bf16)
#undef DDPM_SET

namespace {

#if defined(DDPM_EMULATED)
constexpr bool kEmulated = true;
#else
constexpr bool kEmulated = false;
#endif

std::vector<const Kernels*> tables() {
  std::vector<const Kernels*> found = {&baseline::kernels};
#if defined(DDPM_HAS_avx2)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx2) found.push_back(&avx2::kernels);
  [[maybe_unused]] const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                                           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
#if defined(DDPM_HAS_avx512)
  if (has_avx512) found.push_back(&avx512::kernels);
#endif
#if defined(DDPM_HAS_avx512bf16)
  const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
  if (kEmulated ? has_avx2 : has_bf16) found.push_back(&avx512bf16::kernels);
#endif
#endif
  return found;
}

const Kernels* chosen = nullptr;  // under the interpreter's lock

}  // namespace

std::vector<std::string> available() {
  std::vector<std::string> names;
  for (const Kernels* each : tables()) names.push_back(each->isa);
  return names;
}

void force_isa(const std::string& name) {
  for (const Kernels* each : tables()) {
    if (name == each->isa) {
      chosen = each;
      return;
    }
  }
  std::string known;
  for (const std::string& each : available()) known += (known.empty() ? "" : ", ") + each;
  throw std::invalid_argument("DDPM_FAST_ISA=" + name + ": this build and processor have " + known);
}

const Kernels& kernels() {
  if (chosen == nullptr) {
    const char* name = std::getenv("DDPM_FAST_ISA");
    if (name != nullptr && *name != '\0') {
      force_isa(name);
    } else {
      chosen = tables().back();
    }
  }
  return *chosen;
}

}  // namespace ddpm::cpu
