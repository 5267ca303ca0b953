// Attention of one query a head on many keys, as in decoding.
#pragma once

#include <cstdint>

#include "core/tiers.h"
#include "core/tensor_view.h"

namespace klfast {

// out[b, h] = sum_s softmax_s(scale q[b, h] . k[b, g, s]) v[b, g, s] with g = h / (heads / groups).
// The last dimension of each tensor is contiguous.
struct DecodeAttentionArgs {
    View q;    // [batch, heads, key_dim]
    View k;    // [batch, groups, keys, key_dim]
    View v;    // [batch, groups, keys, value_dim]
    View out;  // [batch, heads, value_dim]
    std::int64_t batch, heads, groups, keys, key_dim, value_dim;
    float scale;
    int n_threads;
};

void decode_attention(const DecodeAttentionArgs& args, Tier limit);

}  // namespace klfast
