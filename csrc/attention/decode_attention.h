// Attention of a few queries a head on many keys, as in decoding and for a chunk of a prompt.
#pragma once

#include <cstdint>

#include "core/tiers.h"
#include "core/tensor_view.h"

namespace klfast {

// out[b, t, h] = sum_s softmax_s(scale q[b, t, h] . k[b, g, s]) v[b, g, s] with g = h / (heads / groups). The last
// query of each sequence sees `keys` keys, or keys_of[b], and each before it one fewer; with a window, of these only
// its own, `window` before that and the first `sinks`. The last dimension of each tensor is contiguous.
struct DecodeAttentionArgs {
    View q;    // [batch, length, heads, key_dim]
    View k;    // [batch, groups, keys, key_dim]
    View v;    // [batch, groups, keys, value_dim]
    View out;  // [batch, length, heads, value_dim]
    std::int64_t batch, length, heads, groups, keys, key_dim, value_dim;
    const std::int64_t* keys_of = nullptr;
    std::int64_t window = -1, sinks = 0;  // -1: no window
    float scale;
    int n_threads;
};

void decode_attention(const DecodeAttentionArgs& args, Tier limit);

}  // namespace klfast
