// Tensors come as addresses, logits as (address, element type, row stride, column stride);
// klfast/backends/cpu/divergence.py has checked them and allocates. No arithmetic.
#include "python/bind_divergence.h"

#include <cstdint>
#include <tuple>

#include "divergence/divergence.h"

namespace py = pybind11;

namespace klfast {
namespace {

using Int = std::int64_t;
using Address = std::uintptr_t;
using MatrixArg = std::tuple<Address, int, Int, Int>;

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

divergence::Matrix matrix(const MatrixArg& m) {
    return {pointer<const void>(std::get<0>(m)), static_cast<DType>(std::get<1>(m)), std::get<2>(m), std::get<3>(m)};
}

}  // namespace

void bind_divergence(py::module_& m) {
    using Release = py::call_guard<py::gil_scoped_release>;
    m.attr("divergence_state_bytes") = sizeof(divergence::State);
    m.def(
        "divergence_accumulate",
        [](const MatrixArg& teacher, const MatrixArg& student, Int tokens, Int columns, Int first_column,
           Address targets, Address states, int n_threads, int limit) {
            divergence::accumulate({matrix(teacher), matrix(student), tokens, columns, first_column,
                                    pointer<const Int>(targets), pointer<divergence::State>(states), n_threads},
                                   static_cast<Tier>(limit));
        },
        Release());
    m.def(
        "divergence_finish",
        [](Address states, Int tokens, Int vocab, Address out, Address fault, Address rerun) {
            return divergence::finish(pointer<divergence::State>(states), tokens, vocab, pointer<float>(out),
                                      pointer<Int>(fault), pointer<bool>(rerun));
        },
        Release());
    m.attr("divergence_part_floats") = sizeof(divergence::Part) / sizeof(float);
    m.def(
        "divergence_from_parts",
        [](Address parts, Address index, Int tokens, Int n_parts, Int vocab, Address targets, Address anchor,
           Address runs, Address out, Address verdict, int n_threads) {
            divergence::from_parts(
                {pointer<const divergence::Part>(parts), pointer<const divergence::PartIndex>(index), tokens, n_parts,
                 vocab, pointer<const double>(targets), pointer<float>(anchor), pointer<Int>(runs), n_threads},
                pointer<float>(out), pointer<divergence::Verdict>(verdict));
        },
        Release());
    m.attr("divergence_again") = static_cast<int>(divergence::Verdict::again);
    m.attr("divergence_wide") = static_cast<int>(divergence::Verdict::wide);
    m.def(
        "logit_divergence",
        [](const MatrixArg& teacher, const MatrixArg& student, Int tokens, Int columns, Address targets, Address out,
           Address fault, int n_threads, int limit) {
            divergence::logit_divergence(
                {matrix(teacher), matrix(student), tokens, columns, 0, pointer<const Int>(targets), nullptr, n_threads},
                pointer<float>(out), pointer<Int>(fault), static_cast<Tier>(limit));
        },
        Release());
}

}  // namespace klfast
