// Logits of a few vocabulary entries a token, which differ from token to token.
#pragma once

#include <cstdint>

#include "core/tensor_view.h"
#include "core/tiers.h"

namespace klfast {

// out[s, t, j] = sum_k hidden[s, t, k] head[index[t, j], k], in float32.
struct GatheredLogitsArgs {
    View hidden;                // [students, tokens, features]
    View head;                  // [vocabulary, features]
    const std::int64_t* index;  // [tokens, entries], each a row of the head
    float* out;                 // [students, tokens, entries]
    std::int64_t students, tokens, entries, features;
    int n_threads;
};

void gathered_logits(const GatheredLogitsArgs& args, Tier limit);

}  // namespace klfast
