#pragma once
#include <pybind11/pybind11.h>

namespace phi_fast::tokens {
void bind(pybind11::module_& module);
}
