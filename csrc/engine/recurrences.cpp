#include <limits>
#include <utility>

#include "engine/instructions.h"
#include "ssm/conv/causal_conv1d.h"
#include "ssm/scan/scan.h"

namespace klfast::engine {
namespace {

// With a dimension and the next one exchanged.
View transposed(View view, int dimension) {
    std::swap(view.stride[dimension], view.stride[dimension + 1]);
    return view;
}

// [sequences, length, width] as [sequences, width, length].
View channels_first(const Buffers& buffers, const Columns& columns, const Input& input) {
    return transposed(buffers.by_sequence(columns, input.length), 1);
}

// [sequences, length, heads, dim]; absent where the columns are.
View by_head(const Buffers& buffers, const Columns& columns, const Input& input, std::int64_t heads) {
    return columns.width == 0 ? View{} : buffers.by_head(columns, input.length, heads);
}

View without_length(View view) {
    view.stride[1] = view.stride[2], view.stride[2] = view.stride[3], view.stride[3] = 0;
    return view;
}

View with_strides(View view, std::int64_t first, std::int64_t second, std::int64_t third) {
    view.stride[0] = first, view.stride[1] = second, view.stride[2] = third;
    return view;
}

}  // namespace

Work convolve(Convolution layer, Columns in, Columns out) {
    return [=](const Input& input, const Buffers& buffers) {
        const View state = transposed(input.states[layer.state], 1);
        const ConvArgs args{
            .x = channels_first(buffers, in, input),
            .out = channels_first(buffers, out, input),
            .weight = transposed(layer.weight, 0),
            .bias = layer.bias,
            .initial = state,
            .final = state,
            .batch = input.sequences,
            .channels = layer.channels,
            .length = input.length,
            .width = layer.width,
            .initial_length = layer.width - 1,
            .final_length = layer.width - 1,
            .silu = layer.silu,
            .n_threads = input.n_threads,
        };
        causal_conv1d(args, input.limit);
    };
}

Work selective_scan(SelectiveScan layer, Columns x, Columns dt, Columns b, Columns c, Columns z, Columns out) {
    return [=](const Input& input, const Buffers& buffers) {
        const View state = input.states[layer.state];
        if (input.length > 1) {
            const auto grouped = [&](const Columns& columns) {  // [sequences, 1, states, length]
                View view = channels_first(buffers, columns, input);
                view.stride[3] = view.stride[2], view.stride[2] = view.stride[1], view.stride[1] = 0;
                return view;
            };
            const SelectiveScanArgs args{
                .u = channels_first(buffers, x, input),
                .delta = channels_first(buffers, dt, input),
                .z = channels_first(buffers, z, input),
                .out = channels_first(buffers, out, input),
                .a = layer.a,
                .b = grouped(b),
                .c = grouped(c),
                .d = layer.d,
                .delta_bias = layer.dt_bias,
                .initial = state,
                .state = state,
                .batch = input.sequences,
                .channels = layer.channels,
                .length = input.length,
                .groups = 1,
                .states = layer.states,
                .constant_b = false,
                .constant_c = false,
                .softplus = true,
                .n_threads = input.n_threads,
            };
            return klfast::selective_scan(args, input.limit);
        }
        const auto one_head = [&](const Columns& columns) { return by_head(buffers, columns, input, 1); };
        View of_head = state;
        of_head.stride[3] = state.stride[2], of_head.stride[2] = state.stride[1], of_head.stride[1] = 0;
        const StateUpdateArgs args{
            .state = of_head,
            .x = without_length(one_head(x)),
            .dt = without_length(one_head(dt)),
            .z = without_length(one_head(z)),
            .out = without_length(one_head(out)),
            .a = with_strides(layer.a, 0, layer.a.stride[0], layer.a.stride[1]),
            .b = without_length(one_head(b)),
            .c = without_length(one_head(c)),
            .d = with_strides(layer.d, 0, 1, 0),
            .dt_bias = with_strides(layer.dt_bias, 0, 1, 0),
            .batch = input.sequences,
            .heads = 1,
            .dim = layer.channels,
            .groups = 1,
            .states = layer.states,
            .softplus = true,
            .a_is_log = false,
            .n_threads = input.n_threads,
        };
        selective_state_update(args, input.limit);
    };
}

Work head_scan(HeadScan layer, Columns x, Columns dt, Columns b, Columns c, Columns z, Columns out) {
    return [=](const Input& input, const Buffers& buffers) {
        const View state = input.states[layer.state];
        const auto heads = [&](const Columns& columns) { return by_head(buffers, columns, input, layer.heads); };
        const auto groups = [&](const Columns& columns) { return by_head(buffers, columns, input, layer.groups); };
        const bool constant = dt.width == 0;
        const View steps = constant ? with_strides(layer.dt_bias, 0, 0, 1) : buffers.by_sequence(dt, input.length);
        const View bias = constant ? View{} : layer.dt_bias;
        // Steps have limits in prompts alone, be it of one token: transformers' decoding step knows none. Where each
        // token's logits are wanted, tokens are guesses of what is decoded.
        const bool unlimited = input.each_token;
        if (input.length > 1 || input.seen[0] == 0) {
            const ChunkScanArgs args{
                .x = heads(x),
                .z = heads(z),
                .out = heads(out),
                .dt = steps,
                .a = layer.a,
                .dt_bias = bias,
                .b = groups(b),
                .c = groups(c),
                .d = with_strides(layer.d, 1, 0, 0),
                .initial = state,
                .final = state,
                .batch = input.sequences,
                .length = input.length,
                .heads = layer.heads,
                .dim = layer.dim,
                .groups = layer.groups,
                .states = layer.states,
                .softplus = !constant,
                .dt_min = unlimited ? 0.0f : layer.dt_min,
                .dt_max = unlimited ? std::numeric_limits<float>::infinity() : layer.dt_max,
                .n_threads = input.n_threads,
            };
            return mamba_chunk_scan(args, input.limit);
        }
        const StateUpdateArgs args{
            .state = state,
            .x = without_length(heads(x)),
            .dt = with_strides(steps, steps.stride[0], 1, 0),
            .z = z.width ? without_length(heads(z)) : View{},
            .out = without_length(heads(out)),
            .a = with_strides(layer.a, 1, 0, 0),
            .b = without_length(groups(b)),
            .c = without_length(groups(c)),
            .d = with_strides(layer.d, 1, 0, 0),
            .dt_bias = with_strides(bias, 1, 0, 0),
            .batch = input.sequences,
            .heads = layer.heads,
            .dim = layer.dim,
            .groups = layer.groups,
            .states = layer.states,
            .softplus = !constant,
            .a_is_log = false,
            .n_threads = input.n_threads,
        };
        selective_state_update(args, input.limit);
    };
}

}  // namespace klfast::engine
