#include <cmath>

#include "core/parallel.h"
#include "engine/instructions.h"
#include "ssm/delta/gated_delta_rule.h"

namespace klfast::engine {

Work delta_gates(View rate, View bias, float largest, std::int64_t heads, Columns a, Columns b, Columns g,
                 Columns beta) {
    return [=](const Input& input, const Buffers& buffers) {
        const View step = buffers[a], strength = buffers[b], decay = buffers[g], out = buffers[beta];
        const int threads = worthwhile_threads(input.n_threads, 60.0 * input.rows() * heads);
        parallel_for(input.rows(), 1, threads, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t row = begin; row < end; ++row)
                for (std::int64_t h = 0; h < heads; ++h) {
                    const float x = load_float(step.data, row * step.stride[0] + h, step.dtype) +
                                    load_float(bias.data, h, bias.dtype);
                    const float softplus = x > 20.0f ? x : std::log1p(std::exp(x));  // as torch's
                    store_float(decay.data, row * decay.stride[0] + h, decay.dtype,
                                load_float(rate.data, h, rate.dtype) * softplus);
                    const float logit = load_float(strength.data, row * strength.stride[0] + h, strength.dtype);
                    store_float(out.data, row * out.stride[0] + h, out.dtype, largest / (1.0f + std::exp(-logit)));
                }
        });
    };
}

Work delta_rule(DeltaRule layer, Columns q, Columns k, Columns v, Columns g, Columns beta, Columns out) {
    return [=](const Input& input, const Buffers& buffers) {
        const auto heads = [&](const Columns& columns, std::int64_t count) {
            return buffers.by_head(columns, input.length, count);
        };
        View decay = buffers.by_sequence(g, input.length);
        decay.stride[3] = 0;
        const GatedDeltaRuleArgs args{
            .q = heads(q, layer.key_heads),
            .k = heads(k, layer.key_heads),
            .v = heads(v, layer.heads),
            .out = heads(out, layer.heads),
            .g = decay,
            .beta = buffers.by_sequence(beta, input.length),
            .state = input.states[layer.state],
            .batch = input.sequences,
            .length = input.length,
            .key_heads = layer.key_heads,
            .heads = layer.heads,
            .key_dim = layer.key_dim,
            .value_dim = layer.value_dim,
            .normalize = true,
            .scale = layer.scale,
            .n_threads = input.n_threads,
        };
        gated_delta_rule(args, input.limit);
    };
}

}  // namespace klfast::engine
