// Depthwise causal convolution over time, with an optional SiLU and carried state.
#pragma once

#include <cstdint>

#include "core/tiers.h"
#include "core/tensor_view.h"

namespace klfast {

// out[t] = act(bias + sum_k weight[k] seq[t + k]) with seq = the last width - 1 values of `initial` (zeros if absent)
// followed by x; `final` receives the last final_length values of `initial` (all of it) followed by x. It may be
// `initial`.
struct ConvArgs {
    View x, out;   // [batch, channels, length]
    View weight;   // [channels, width]
    View bias;     // [channels]
    View initial;  // [batch, channels, initial_length], initial_length >= width - 1
    View final;    // [batch, channels, final_length]
    std::int64_t batch, channels, length, width, initial_length, final_length;
    bool silu;
    int n_threads;
};

void causal_conv1d(const ConvArgs& args, Tier limit);

}  // namespace klfast
