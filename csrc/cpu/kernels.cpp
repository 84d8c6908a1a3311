// The table of one instruction set.
#include "kernels.h"

#define DDPM_TEXT_OF(x) #x
#define DDPM_TEXT(x) DDPM_TEXT_OF(x)

namespace ddpm::cpu::DDPM_ISA {

#define DDPM_ENTRY(name, arguments) name,
const Kernels kernels = {DDPM_TEXT(DDPM_ISA), DDPM_KERNELS(DDPM_ENTRY)};
#undef DDPM_ENTRY

}  // namespace ddpm::cpu::DDPM_ISA
