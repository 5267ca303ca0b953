#include "calls.h"
#include "norm/rms_norm.h"
#include "operand.h"

namespace klfast::fuzz {

void call_rms_norm(Input& input, How how) {
    const Int rows = input.size(20), inner = input.size(4), size = input.size(300, 1), channels = size * input.size(5);
    const Operand x = Operand::written(input, {rows, inner, channels}),
                  gate = Operand::read(input, {rows, inner, channels}), weight = Operand::read(input, {channels}),
                  out = Operand::written(input, {rows, inner, channels});
    rms_norm(
        {
            .x = x.view(),
            .gate = gate.maybe(input),
            .out = input.flag() ? x.view() : out.view(),
            .weight = weight.maybe(input),
            .rows = rows,
            .rows_inner = inner,
            .channels = channels,
            .group_size = size,
            .eps = input.one_of({1e-6f, 1e-5f, 0.5f}),
            .weight_offset = input.one_of({0.0f, 1.0f}),
            .norm_before_gate = input.flag(),
            .sigmoid_gate = input.flag(),
            .n_threads = how.n_threads,
        },
        how.limit);
}

}  // namespace klfast::fuzz
