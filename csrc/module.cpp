// phi_fast._C: the token store and the CPU kernels. Torch is neither included nor linked: tensors arrive as addresses.
#include <pybind11/pybind11.h>

#include "cpu/bindings.h"
#include "tokens/bindings.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "C++ parts of phi_fast: the memory-mapped token store and the CPU kernels";
  auto tokens = module.def_submodule("tokens", "memory-mapped token store and sample order");
  phi_fast::tokens::bind(tokens);
  auto cpu = module.def_submodule("cpu", "CPU kernels");
  phi_fast::cpu::bind(cpu);
}
