// Python binding of linear.
#pragma once

#include <pybind11/pybind11.h>

namespace klfast {

void bind_linear(pybind11::module_& m);

}  // namespace klfast
