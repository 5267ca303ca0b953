// The extension module: bind_*.cpp bind the kernels of a family each, GIL released; no arithmetic. Nothing outside
// csrc/python knows of Python.
#include <map>
#include <set>
#include <string>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/kernel_table.h"
#include "gemm/args.h"
#include "python/bindings.h"

namespace py = pybind11;

namespace klfast {
namespace {

std::map<std::string, std::set<std::string>> kernel_tiers() {
    std::map<std::string, std::set<std::string>> names;
    for (const auto& [op, tiers] : op_tiers())
        for (std::size_t t = 0; t < kTiers; ++t)
            if (tiers[t]) names[op].insert(kTierNames[t]);
    return names;
}

}  // namespace
}  // namespace klfast

PYBIND11_MODULE(_C, m) {
    using namespace klfast;
    m.attr("tiers") = py::tuple(py::cast(kTierNames));
    m.attr("any_tier") = static_cast<int>(Tier::any);
    m.attr("few_rows") = kFewRows;
    m.def(
        "why_not", [](int tier) { return why_not(static_cast<Tier>(tier)); },
        "Why a tier cannot run here; empty if it can.");
    m.def(
        "allows", [](int limit, int tier) { return allows(static_cast<Tier>(limit), static_cast<Tier>(tier)); },
        "Whether a limit is a tier, falls back to it, or is any_tier.");
    bind_attention(m);
    bind_dequant_matmul(m);
    bind_divergence(m);
    bind_elementwise(m);
    bind_engine(m);
    bind_linear(m);
    bind_ssm(m);
    bind_prepared(m);
    m.def(
        "best_tier",
        [](const std::string& op, int limit) {
            return static_cast<int>(best_tier(op_tiers().at(op), static_cast<Tier>(limit)));
        },
        "The tier whose kernel runs an op under a limit, both as indices.");
    m.def("kernel_tiers", kernel_tiers, "Op -> the tiers that it has kernels for.");
}
