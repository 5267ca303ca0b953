// The extension module: bind_*.cpp bind the kernels of a family each, GIL released; no arithmetic. Nothing outside
// csrc/python knows of Python.
#include <string>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "python/bind_attention.h"
#include "python/bind_dequant_matmul.h"
#include "core/tiers.h"
#include "python/bind_divergence.h"
#include "python/bind_linear.h"
#include "gemm/args.h"
#include "python/bind_ssm.h"
#include "python/bind_prepared.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
    using namespace klfast;
    m.attr("tiers") = py::cast(std::vector<std::string>(kTierNames.begin(), kTierNames.end()));
    m.attr("few_rows") = kFewRows;
    m.def(
        "why_not", [](int tier) { return why_not(static_cast<Tier>(tier)); },
        "Why a tier cannot run here; empty if it can.");
    bind_attention(m);
    bind_dequant_matmul(m);
    bind_divergence(m);
    bind_linear(m);
    bind_ssm(m);
    bind_step(m);
    m.def(
        "best_tier",
        [](const std::string& op, int limit) {
            return static_cast<int>(Announce::best().at(op)(static_cast<Tier>(limit)));
        },
        "The tier whose kernel runs an op under a limit, both as indices.");
    m.def("kernel_tiers", &Announce::announced, "Op -> the tiers that it has kernels for.");
}
