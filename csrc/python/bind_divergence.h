// Python bindings of the divergence kernels.
#pragma once

#include <pybind11/pybind11.h>

namespace klfast {

void bind_divergence(pybind11::module_& m);

}  // namespace klfast
