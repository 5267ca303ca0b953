// The gated delta rule (Yang et al. 2024, arXiv:2412.06464): linear attention that replaces what the state held for a
// key instead of adding to it. With a decay for each key channel it is Kimi Delta Attention (arXiv:2510.26692).
#pragma once

#include <cstdint>

#include "core/tiers.h"
#include "core/tensor_view.h"

namespace klfast {

// S = exp(g_t) S;  S = S + k_t (beta_t (v_t - S^T k_t))^T;  o_t = scale S^T q_t. `state` is read and written. Each head
// of keys serves heads / key_heads consecutive heads.
struct GatedDeltaRuleArgs {
    View q, k;    // [batch, length, key_heads, key_dim]; divided by their norms if `normalize`
    View v, out;  // [batch, length, heads, value_dim]
    View g;       // [batch, length, heads, key_dim], log of the decay; one a head if its last stride is 0
    View beta;    // [batch, length, heads]
    View state;   // [batch, heads, key_dim, value_dim]
    std::int64_t batch, length, key_heads, heads, key_dim, value_dim;
    bool normalize;  // q / sqrt(q.q + 1e-6), and k alike
    float scale;
    int n_threads;
};

void gated_delta_rule(const GatedDeltaRuleArgs& args, Tier limit);

}  // namespace klfast
