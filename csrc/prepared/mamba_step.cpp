#include "prepared/mamba_step.h"

#include <cstddef>
#include <vector>

#include "ssm/conv/causal_conv1d.h"
#include "norm/rms_norm.h"
#include "ssm/scan/scan.h"

namespace klfast {

void mamba_step(const MambaMixer& m, const MambaStepArgs& a, Tier limit) {
    const DType type = a.x.dtype;
    const std::int64_t parts = m.rank + 2 * m.states;
    std::vector<std::byte> memory(a.batch * (2 * m.channels + parts) * size_of(type));
    // [batch, width], contiguous, `first` elements into the memory
    const auto rows = [&](std::int64_t first, std::int64_t width) {
        return View{.data = memory.data() + first * size_of(type), .dtype = type, .stride = {width, 1}};
    };
    const auto from = [&](View v, std::int64_t element) {
        v.data = static_cast<std::byte*>(v.data) + element * size_of(v.dtype);
        return v;
    };
    const auto in_time = [](View v, std::int64_t batch_stride, std::int64_t stride) {
        v.stride[0] = batch_stride, v.stride[1] = stride, v.stride[2] = 1;
        return v;
    };

    const View u = rows(0, m.channels), delta = rows(a.batch * m.channels, m.channels),
               projected = rows(2 * a.batch * m.channels, parts);
    const ConvArgs conv{
        .x = in_time(a.x, a.x.stride[0], a.x.stride[1]),
        .out = in_time(u, m.channels, 1),
        .weight = m.conv_weight,
        .bias = m.conv_bias,
        .initial = a.conv_state,
        .final = a.conv_state,
        .batch = a.batch,
        .channels = m.channels,
        .length = 1,
        .width = m.width,
        .initial_length = a.conv_length,
        .final_length = a.conv_length,
        .silu = true,
        .n_threads = a.n_threads,
    };
    causal_conv1d(conv, limit);

    m.x_proj(u.data, type, m.channels, projected.data, a.batch, a.n_threads, limit);
    const View b = from(projected, m.rank), c = from(b, m.states);
    const auto norm = [&](const View& weight, View part, std::int64_t width) {
        part.stride[1] = 0, part.stride[2] = 1;  // [batch, 1, width]
        const RmsNormArgs args{
            .x = part,
            .gate = {},
            .out = part,
            .weight = weight,
            .rows = a.batch,
            .rows_inner = 1,
            .channels = width,
            .group_size = width,
            .eps = m.eps,
            .weight_offset = 0,
            .norm_before_gate = false,
            .sigmoid_gate = false,
            .n_threads = a.n_threads,
        };
        rms_norm(args, limit);
    };
    if (m.normed) norm(m.dt_norm, projected, m.rank), norm(m.b_norm, b, m.states), norm(m.c_norm, c, m.states);
    m.dt_proj(projected.data, type, parts, delta.data, a.batch, a.n_threads, limit);

    const auto one_head = [](View v) {  // [batch, channels, ...] as [batch, 1, channels, ...]
        v.stride[3] = v.stride[2], v.stride[2] = v.stride[1], v.stride[1] = 0;
        return v;
    };
    const auto no_batch = [](View v) {  // [channels, ...] as [1, channels, ...]
        v.stride[2] = v.stride[1], v.stride[1] = v.stride[0], v.stride[0] = 0;
        return v;
    };
    const StateUpdateArgs update{
        .state = one_head(a.ssm_state),
        .x = one_head(u),
        .dt = one_head(delta),
        .z = one_head(a.z),
        .out = one_head(a.out),
        .a = no_batch(m.a_log),
        .b = one_head(b),
        .c = one_head(c),
        .d = no_batch(m.d),
        .dt_bias = no_batch(m.dt_bias),
        .batch = a.batch,
        .heads = 1,
        .dim = m.channels,
        .groups = 1,
        .states = m.states,
        .softplus = true,
        .a_is_log = true,
        .n_threads = a.n_threads,
    };
    selective_state_update(update, limit);
}

}  // namespace klfast
