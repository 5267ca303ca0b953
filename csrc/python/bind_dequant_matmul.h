// Python binding of dequant_matmul.
#pragma once

#include <pybind11/pybind11.h>

namespace klfast {

void bind_dequant_matmul(pybind11::module_& m);

}  // namespace klfast
