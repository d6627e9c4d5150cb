#pragma once
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace phi_fast::cpu {

/// The kernels in use: those that `force_isa` or PHI_FAST_ISA names, or the best that this machine can run. Throws
/// std::invalid_argument for a PHI_FAST_ISA that is unknown, was not compiled in, or that this machine cannot run.
const Kernels& kernels();

/// Makes kernels() return the named ones from now on; "" returns to the choice by PHI_FAST_ISA or the machine. Throws
/// as kernels() does.
void force_isa(const std::string& name);

/// The names of the sets that this machine can run, the best first.
std::vector<std::string> supported_isas();

/// The names of the sets that were not compiled in, because the compiler did not know them.
std::vector<std::string> omitted_isas();

}  // namespace phi_fast::cpu
