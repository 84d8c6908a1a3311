// Which instruction set's kernels run. All of it is called under the interpreter's lock.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace ddpm::cpu {

// Those of the best instruction set of this processor, or of the one that the environment's DDPM_FAST_ISA names.
// Throws std::invalid_argument where that one isn't here.
const Kernels& kernels();

// The instruction sets that this build and this processor have, the best one last.
std::vector<std::string> available();

// From now on the named one's.
void force_isa(const std::string& name);

}  // namespace ddpm::cpu
