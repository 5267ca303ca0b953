// Bindings of the kernels, GIL released; no arithmetic. Tensors come as addresses with shapes and strides in
// elements; klfast/backends/cpu.py has checked them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "dequant_matmul/bindings.h"
#include "dispatch.h"
#include "divergence/bindings.h"
#include "scan/bindings.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    using namespace klfast;
    m.attr("tiers") = py::cast(std::vector<std::string>(kTierNames.begin(), kTierNames.end()));
    m.def("why_not", [](int tier) { return why_not(static_cast<Tier>(tier)); }, "Why a tier cannot run here; empty if it can.");
    bind_dequant_matmul(m);
    bind_divergence(m);
    bind_ssm(m);
    m.def("kernel_tiers", &Announce::announced, "Op -> the tiers that it has kernels for.");
}
