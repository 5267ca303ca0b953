// What each bind_*.cpp adds to the module, and how addresses come from Python.
#pragma once

#include <cstdint>

#include <pybind11/pybind11.h>

namespace klfast {

void bind_attention(pybind11::module_& m);
void bind_dequant_matmul(pybind11::module_& m);
void bind_divergence(pybind11::module_& m);
void bind_elementwise(pybind11::module_& m);
void bind_engine(pybind11::module_& m);
void bind_linear(pybind11::module_& m);
void bind_prepared(pybind11::module_& m);
void bind_ssm(pybind11::module_& m);

using Int = std::int64_t;
using Address = std::uintptr_t;  // 0 stands for an absent tensor

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace klfast
