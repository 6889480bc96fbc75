// Which instruction set's kernels run.
#pragma once

#include <string>
#include <vector>

#include "ops.hpp"

namespace fused_dni {

// The kernels in use: the widest that this machine can run, unless set_isa chose others.
const Kernels& kernels();

// "portable", "avx2" or "avx512".
std::string isa();

// The names that this machine can run and this build has, narrowest first.
std::vector<std::string> isas();

// What this machine can run and this build has not, if that is wider; else "".
std::string wider();

// False, and nothing changed, if this machine (or this build) cannot run `name`.
bool set_isa(const std::string& name);

}  // namespace fused_dni
