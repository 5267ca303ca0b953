// Python binding of decode attention.
#pragma once

#include <pybind11/pybind11.h>

namespace klfast {

void bind_attention(pybind11::module_& m);

}  // namespace klfast
