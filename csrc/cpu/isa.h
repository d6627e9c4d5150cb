#pragma once
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace phi_fast::cpu {

/// The kernels in use: the best this machine runs, or what PHI_FAST_ISA or
/// `force_isa` names. Throws std::invalid_argument for a PHI_FAST_ISA that is
/// unknown, was not compiled in, or that this machine cannot run.
const Kernels& kernels();

/// Makes kernels() the named ones from now on; "" returns to the choice that
/// PHI_FAST_ISA or the machine makes. Throws as it does.
void force_isa(const std::string& name);

/// The names this machine can run, the best first.
std::vector<std::string> supported_isas();

/// The names that were not compiled in, since the compiler did not know them.
std::vector<std::string> omitted_isas();

}  // namespace phi_fast::cpu
