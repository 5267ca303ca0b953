// The instructions of a program. Each calls the kernel of an op, on buffers, weights and states.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "elementwise/combine.h"
#include "engine/program.h"
#include "prepared/linear_layer.h"

namespace klfast::engine {

// out = the tokens' rows of table [vocabulary, width], rounded, times scale, rounded again. Tokens from the
// vocabulary's size on are rows of `more`.
Work embed(View table, std::int64_t vocabulary, View more, DType rounded_to, float scale, Columns out);
// The same with a quantized head's weight as table. A correction's rows are added to rows `corrected`, which rise.
Work embed_quantized(Projection tied, View more, DType rounded_to, float scale, Columns out,
                     std::vector<std::int32_t> corrected, std::optional<Projection> correction);

// out = in W^T + bias, rounded to in's type; out is a whole buffer.
Work project(Projection layer, Columns in, Columns out);

// The same of each sequence's last token alone, or of all tokens if the run wants each, to out's first rows.
Work project_last(Projection layer, Columns in, Columns out);

struct Norm {
    View weight;
    std::int64_t group_size;
    float eps, weight_offset;
    bool norm_before_gate, sigmoid_gate;
};
// Of each row; of each of `heads` parts of it with the same weight. `gate` of width 0: without.
Work normalise(Norm norm, std::int64_t heads, Columns in, Columns gate, Columns out);

// As csrc/elementwise/combine.h, for `each` rows a token; `narrow` of width 0: without.
Work combine_two(Combination how, float factor, std::int64_t each, Columns a, Columns b, Columns out, Columns narrow);

// The same of each row of `in` with one row.
Work combine_row(Combination how, View row, Columns in, Columns out);

// The causal convolution of in's columns on state [sequences, width - 1, channels].
struct Convolution {
    View weight, bias;  // [width, channels], [channels]
    std::int64_t channels, width;
    bool silu;
    int state;
};
Work convolve(Convolution layer, Columns in, Columns out);

// Mamba's recurrence on state [sequences, channels, states].
struct SelectiveScan {
    View a, d, dt_bias;  // [channels, states], [channels], [channels]
    std::int64_t channels, states;
    int state;
};
Work selective_scan(SelectiveScan layer, Columns x, Columns dt, Columns b, Columns c, Columns z, Columns out);

// Mamba-2's on state [sequences, heads, dim, states]; `z` of width 0: without gate; `dt` of width 0: dt_bias are the
// steps.
struct HeadScan {
    View a, d, dt_bias;  // [heads]
    std::int64_t heads, dim, groups, states;
    float dt_min, dt_max;
    int state;
};
Work head_scan(HeadScan layer, Columns x, Columns dt, Columns b, Columns c, Columns z, Columns out);

// Rotary embedding (Su et al. 2021, arXiv:2104.09864): out [2 count], float32, = cos then sin of position times
// frequency, times factor, rounded.
Work angles(View frequencies, std::int64_t count, float factor, DType rounded_to, Columns out);
// Turns the first channels of each head, pairs of which lie half of the angles apart.
Work rotate(std::int64_t heads, Columns angles, Columns x);

// `width` channels of each of in's heads, from `first` on, to those from `to` on of out's. `shared`: in is one head,
// for each of out's.
struct HeadCopy {
    std::int64_t heads, first, to, width;
    bool shared;
};
Work copy_heads(HeadCopy copy, Columns in, Columns out);

// Writes keys or values of the run's tokens to a cache [sequences, heads, capacity, width], at their positions.
Work remember(int state, std::int64_t heads, Columns in);

// Causal attention on caches that remember() has filled; window and sinks as csrc/attention/decode_attention.h.
struct Attention {
    std::int64_t heads, groups, key_dim, value_dim, window, sinks;
    float scale;
    int keys, values;  // states
};
Work attend(Attention layer, Columns q, Columns out);

// The gated delta rule on state [sequences, heads, key_dim, value_dim], with q and k divided by their norms; g is one a
// head or one a channel of its keys.
struct DeltaRule {
    std::int64_t key_heads, heads, key_dim, value_dim;
    float scale;
    int state;
};
Work delta_rule(DeltaRule layer, Columns q, Columns k, Columns v, Columns g, Columns beta, Columns out);

// How a router weighs the experts that it chooses for a token: those with the greatest scores plus bias. Of `groups`
// groups of experts only the best `open_groups` take part, by the sum of their two greatest.
struct Routing {
    View bias;       // [experts]; may be absent
    bool sigmoid;    // scores are sigmoids of the logits; else their softmax
    bool normalise;  // divide the scores of the chosen by epsilon and their sum
    float epsilon, factor;
    std::int64_t groups, open_groups;
    DType rounded_to;  // scores, and the result of each step after them
};
// index = the experts' numbers, as floats, highest score first; weights = their weights.
Work route(Routing how, Columns logits, Columns index, Columns weights);

// What route() has chosen, a route for each of a token's experts.
struct Routes {
    Columns index;
    std::int64_t experts;  // of the mixture
};
// out = in's rows, one a route, in the order of their experts. The next two take and give such rows.
Work gather(Routes routes, Columns in, Columns out);
// Each row by the matrix of its expert in a stack of matrices with out's columns; no other matrix is read. `slots` has
// the place of each expert's matrix in the stack, negative if it has none: its rows of out are left alone. Empty: each
// expert's matrix is at its number.
Work project_gathered(Projection stack, Routes routes, Columns in, Columns out, std::vector<std::int64_t> slots);
// out = the weighted sum of each token's rows.
Work sum_gathered(Routes routes, Columns weights, Columns in, Columns out);

}  // namespace klfast::engine
