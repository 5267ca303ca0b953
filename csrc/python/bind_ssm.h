// Python bindings of the state-space kernels.
#pragma once

#include <pybind11/pybind11.h>

namespace klfast {

void bind_ssm(pybind11::module_& m);

}  // namespace klfast
