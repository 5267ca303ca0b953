// The extension module: each folder binds its own kernels (bindings.cpp), GIL released; no arithmetic.
#include <string>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "attention/bindings.h"
#include "dequant_matmul/bindings.h"
#include "dispatch.h"
#include "divergence/bindings.h"
#include "linear/bindings.h"
#include "product/product.h"
#include "scan/bindings.h"
#include "step/bindings.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
    using namespace klfast;
    m.attr("tiers") = py::cast(std::vector<std::string>(kTierNames.begin(), kTierNames.end()));
    m.attr("few_rows") = kFewRows;
    m.def("why_not", [](int tier) { return why_not(static_cast<Tier>(tier)); }, "Why a tier cannot run here; empty if it can.");
    bind_attention(m);
    bind_dequant_matmul(m);
    bind_divergence(m);
    bind_linear(m);
    bind_ssm(m);
    bind_step(m);
    m.def("best_tier", [](const std::string& op, int limit) { return static_cast<int>(Announce::best().at(op)(static_cast<Tier>(limit))); },
          "The tier whose kernel runs an op under a limit, both as indices.");
    m.def("kernel_tiers", &Announce::announced, "Op -> the tiers that it has kernels for.");
}
