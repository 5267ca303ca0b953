// The state-space recurrences of Mamba (selective scan) and Mamba-2 (SSD), whole sequences and single steps.
#pragma once

#include <cstdint>

#include "core/tiers.h"
#include "core/tensor_view.h"
#include "ssm/slots.h"

namespace klfast {

// h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t,  y_t = (C_t . h_t + D u_t) silu(z_t); dt = softplus(delta + delta_bias) if
// `softplus`, else delta + delta_bias.
struct SelectiveScanArgs {
    View u, delta, z, out;  // [batch, channels, length]
    View a;                 // [channels, states]
    View b, c;              // [batch, groups, states, length], or constant in time: [channels, states]
    View d, delta_bias;     // [channels]
    View initial, state;    // [batch, channels, states], h before the first step (absent: zeros) and after the last
    std::int64_t batch, channels, length, groups, states;
    bool constant_b, constant_c;
    bool softplus;
    int n_threads;
};

// One step of the recurrence; `state` is read and written, at `slots` along its first dimension.
struct StateUpdateArgs {
    View state;          // [batch, heads, dim, states]
    View x, dt, z, out;  // [batch, heads, dim]
    View a;              // [heads, dim, states]
    View b, c;           // [batch, groups, states]
    View d, dt_bias;     // [heads, dim]
    Slots slots = {};
    std::int64_t batch, heads, dim, groups, states;
    bool softplus;
    bool a_is_log;  // `a` holds log(-A)
    int n_threads;
};

// As the selective scan, with one A and one dt a head.
struct ChunkScanArgs {
    View x, z, out;       // [batch, length, heads, dim]
    View dt;              // [batch, length, heads]
    View a, dt_bias;      // [heads]
    View b, c;            // [batch, length, groups, states]
    View d;               // [heads, dim]
    View initial, final;  // [batch, heads, dim, states]
    std::int64_t batch, length, heads, dim, groups, states;
    bool softplus;
    float dt_min, dt_max;
    int n_threads;
};

void selective_scan(const SelectiveScanArgs& args, Tier limit);
void selective_state_update(const StateUpdateArgs& args, Tier limit);
void mamba_chunk_scan(const ChunkScanArgs& args, Tier limit);

}  // namespace klfast
