// Tensors come as addresses, logits as (address, element type, row stride, column stride);
// klfast/backends/cpu/divergence.py has checked them and allocates. No arithmetic.
#include <tuple>

#include "divergence/divergence.h"
#include "divergence/gathered/gathered_logits.h"
#include "python/bindings.h"
#include "python/view_caster.h"

namespace py = pybind11;

namespace klfast {
namespace {

using MatrixArg = std::tuple<Address, int, Int, Int>;

divergence::Matrix matrix(const MatrixArg& m) {
    const auto [address, type, row_stride, column_stride] = m;
    return {
        .data = pointer<const void>(address),
        .dtype = static_cast<DType>(type),
        .row_stride = row_stride,
        .column_stride = column_stride,
    };
}

}  // namespace

void bind_divergence(py::module_& m) {
    using Release = py::call_guard<py::gil_scoped_release>;
    m.attr("divergence_state_bytes") = sizeof(divergence::State);
    m.def(
        "divergence_accumulate",
        [](const MatrixArg& teacher, const MatrixArg& student, Int tokens, Int columns, Int first_column,
           Address targets, Address states, int n_threads, int limit) {
            const divergence::BlockArgs args{
                .teacher = matrix(teacher),
                .student = matrix(student),
                .tokens = tokens,
                .columns = columns,
                .first_column = first_column,
                .targets = pointer<const Int>(targets),
                .states = pointer<divergence::State>(states),
                .n_threads = n_threads,
            };
            divergence::accumulate(args, static_cast<Tier>(limit));
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
            const divergence::PartsArgs args{
                .parts = pointer<const divergence::Part>(parts),
                .index = pointer<const divergence::PartIndex>(index),
                .tokens = tokens,
                .n_parts = n_parts,
                .vocab = vocab,
                .targets = pointer<const double>(targets),
                .anchor = pointer<float>(anchor),
                .runs = pointer<Int>(runs),
                .n_threads = n_threads,
            };
            divergence::from_parts(args, pointer<float>(out), pointer<divergence::Verdict>(verdict));
        },
        Release());
    m.attr("divergence_again") = static_cast<int>(divergence::Verdict::again);
    m.attr("divergence_wide") = static_cast<int>(divergence::Verdict::wide);
    m.def(
        "logit_divergence",
        [](const MatrixArg& teacher, const MatrixArg& student, Int tokens, Int columns, Address targets, Address out,
           Address fault, int n_threads, int limit) {
            const divergence::BlockArgs args{
                .teacher = matrix(teacher),
                .student = matrix(student),
                .tokens = tokens,
                .columns = columns,
                .first_column = 0,
                .targets = pointer<const Int>(targets),
                .states = nullptr,
                .n_threads = n_threads,
            };
            divergence::logit_divergence(args, pointer<float>(out), pointer<Int>(fault), static_cast<Tier>(limit));
        },
        Release());
    m.def("gathered_logits", [](View hidden, View head, Address index, Address out, Int students, Int tokens,
                                Int entries, Int features, int n_threads, int limit) {
        const py::gil_scoped_release release;
        const GatheredLogitsArgs args{
            .hidden = hidden,
            .head = head,
            .index = pointer<const Int>(index),
            .out = pointer<float>(out),
            .students = students,
            .tokens = tokens,
            .entries = entries,
            .features = features,
            .n_threads = n_threads,
        };
        gathered_logits(args, static_cast<Tier>(limit));
    });
}

}  // namespace klfast
