#include "engine/instructions.h"
#include "ssm/delta/gated_delta_rule.h"

namespace klfast::engine {

Work delta_rule(DeltaRule layer, Columns q, Columns k, Columns v, Columns g, Columns beta, Columns out) {
    return [=](const Input& input, const Buffers& buffers) {
        const auto heads = [&](const Columns& columns, std::int64_t count) {
            return buffers.by_head(columns, input.length, count);
        };
        View decay = heads(g, layer.heads);
        if (g.width == layer.heads) decay.stride[3] = 0;
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
