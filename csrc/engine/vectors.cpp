#include "engine/instructions.h"
#include "norm/rms_norm.h"

namespace klfast::engine {

Work normalise(Norm norm, std::int64_t heads, Columns in, Columns gate, Columns out) {
    return [=](const Input& input, const Buffers& buffers) {
        const auto parts = [&](const Columns& columns) {  // [rows, heads, channels]
            View view = columns.width ? buffers[columns] : View{};
            view.stride[1] = columns.width / heads, view.stride[2] = 1;
            return view;
        };
        const std::int64_t channels = in.width / heads;
        const RmsNormArgs args{
            .x = parts(in),
            .gate = parts(gate),
            .out = parts(out),
            .weight = norm.weight,
            .rows = input.rows(),
            .rows_inner = heads,
            .channels = channels,
            .group_size = norm.group_size ? norm.group_size : channels,
            .eps = norm.eps,
            .weight_offset = norm.weight_offset,
            .norm_before_gate = norm.norm_before_gate,
            .sigmoid_gate = norm.sigmoid_gate,
            .n_threads = input.n_threads,
        };
        rms_norm(args, input.limit);
    };
}

Work combine_two(Combination how, float factor, std::int64_t each, Columns a, Columns b, Columns out, Columns narrow) {
    return [=](const Input& input, const Buffers& buffers) {
        const CombineArgs args{
            .a = buffers[a],
            .b = buffers[b],
            .out = buffers[out],
            .narrow = narrow.width ? buffers[narrow] : View{},
            .rows = input.rows() * each,
            .width = out.width,
            .how = how,
            .factor = factor,
            .n_threads = input.n_threads,
        };
        combine(args, input.limit);
    };
}

Work combine_row(Combination how, View row, Columns in, Columns out) {
    row.stride[0] = 0;
    return [=](const Input& input, const Buffers& buffers) {
        const CombineArgs args{
            .a = buffers[in],
            .b = row,
            .out = buffers[out],
            .narrow = {},
            .rows = input.rows(),
            .width = out.width,
            .how = how,
            .n_threads = input.n_threads,
        };
        combine(args, input.limit);
    };
}

}  // namespace klfast::engine
