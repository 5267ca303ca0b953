// Depthwise causal convolution over time, with an optional SiLU and carried state.
#pragma once

#include <cstdint>

#include "core/tiers.h"
#include "core/tensor_view.h"
#include "ssm/slots.h"

namespace klfast {

// out[t] = act(bias + sum_k weight[k] seq[t + k]) with seq = the last width - 1 values of `initial` (zeros if absent)
// followed by x; `final` receives the last final_length values of `initial` (all of it) followed by x. It may be
// `initial`.
//
// With `steps_seen`, both are one ring instead, of initial_length values: step t of a sequence lies at t %
// initial_length, and those of x follow the ones seen.
struct ConvArgs {
    View x, out;                               // [batch, channels, length]
    View weight;                               // [channels, width]
    View bias;                                 // [channels]
    View initial;                              // [batch, channels, initial_length], initial_length >= width - 1
    View final;                                // [batch, channels, final_length]
    Slots slots = {};                          // of `initial` and `final`, whose first dimension they replace
    const std::int64_t* steps_seen = nullptr;  // [batch], at least 0
    std::int64_t batch, channels, length, width, initial_length, final_length;
    bool silu;
    int n_threads;
};

void causal_conv1d(const ConvArgs& args, Tier limit);

}  // namespace klfast
