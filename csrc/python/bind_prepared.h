// Python bindings of prepared layers.
#pragma once

#include <pybind11/pybind11.h>

namespace klfast {

void bind_step(pybind11::module_& m);

}  // namespace klfast
