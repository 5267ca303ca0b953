// One decoding step of a Mamba mixer, from the output of in_proj to the input of out_proj.
#pragma once

#include <cstdint>

#include "core/tiers.h"
#include "prepared/linear_layer.h"
#include "core/tensor_view.h"

namespace klfast {

// What a mixer consists of. `rank` values of x_proj's output are for dt_proj, then come B and C, `states` each.
struct MambaMixer {
    View conv_weight, conv_bias;   // [channels, width], [channels]
    Projection x_proj, dt_proj;    // of dt_proj the weight only
    bool normed;                   // RMS norms of x_proj's three parts
    View dt_norm, b_norm, c_norm;  // their weights [rank], [states], [states]; absent: ones
    float eps;
    View a_log, d, dt_bias;  // A = -exp(a_log) [channels, states], [channels], [channels]
    std::int64_t channels, width, rank, states;
};

// The states move on in place. Between the parts values are rounded to x's type, as separate calls would.
struct MambaStepArgs {
    View x, z, out;   // [batch, channels]
    View conv_state;  // [batch, channels, conv_length], conv_length >= width - 1
    View ssm_state;   // [batch, channels, states]
    std::int64_t batch, conv_length;
    int n_threads;
};

void mamba_step(const MambaMixer& mixer, const MambaStepArgs& args, Tier limit);

}  // namespace klfast
