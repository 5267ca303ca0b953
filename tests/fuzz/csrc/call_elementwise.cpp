#include <vector>

#include "calls.h"
#include "elementwise/combine.h"
#include "elementwise/largest.h"
#include "elementwise/weighted_sum.h"
#include "operand.h"

namespace klfast::fuzz {

void call_combine(Input& input, How how) {
    const Int width = input.size(1200), rows = input.size(9);
    const Operand a = Operand::written(input, {rows, width}, Strides::rows),
                  b = Operand::read(input, {rows, width}, Strides::rows),
                  out = Operand::written(input, {rows, width}, Strides::rows),
                  narrow = Operand::written(input, {rows, width}, Strides::rows);
    combine(
        {
            .a = a.view(),
            .b = b.view(),
            .out = input.flag() ? a.view() : out.view(),
            .narrow = narrow.maybe(input),
            .rows = rows,
            .width = width,
            .how = static_cast<Combination>(input.index(static_cast<Int>(Combination::softplus_gate) + 1)),
            .factor = input.one_of({1.0f, 0.75f}),
            .n_threads = how.n_threads,
        },
        how.limit);
}

void call_largest(Input& input, How how) {
    const Int width = input.size(3000, 1), rows = input.size(9);
    const Operand x = Operand::read(input, {rows, width}, DType::f32, Strides::rows);
    std::vector<float> value(rows);
    std::vector<Int> index(rows);
    largest(
        {
            .x = static_cast<const float*>(x.data()),
            .rows = rows,
            .width = width,
            .stride = x.view().stride[0],
            .value = value.data(),
            .index = index.data(),
            .n_threads = how.n_threads,
        },
        how.limit);
    for (const Int column : index) require(0 <= column && column < width, "a largest value lies in its row");
}

void call_weighted_sum(Input& input, How how) {
    const Int width = input.size(1200), rows = input.size(9), each = input.size(5), sources = input.size(9, 1);
    const Operand x = Operand::read(input, {sources, width}, Strides::rows),
                  weights = Operand::read(input, {rows, each}, Strides::rows),
                  out = Operand::written(input, {rows, width}, Strides::rows);
    std::vector<Int> place(rows * each);
    for (Int& row : place) row = input.index(sources);
    weighted_sum(
        {
            .x = x.view(),
            .weights = weights.view(),
            .out = out.view(),
            .place = place.data(),
            .rows = rows,
            .each = each,
            .width = width,
            .n_threads = how.n_threads,
        },
        how.limit);
}

}  // namespace klfast::fuzz
