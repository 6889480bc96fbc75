// Training steps of linear layers without the interpreter; fused_dni/backends/cpu.py makes them.
#pragma once

#include <pybind11/pybind11.h>

namespace fused_dni {

void bind_quick(pybind11::module_& m);

}  // namespace fused_dni
