// Calls of the ops' C++ entry points, with arguments that an input decides. They are those that the headers allow and,
// where they say nothing, those that the Python checks of klfast/ops let through.
#pragma once

#include "core/tiers.h"
#include "input.h"

namespace klfast::fuzz {

// The best tier allowed, and the number of threads.
struct How {
    Tier limit;
    int n_threads;
};

using Call = void(Input& input, How how);

Call call_dequant_matmul, call_grouped_dequant_matmul, call_linear, call_dequantize_row;
Call call_decode_attention;
Call call_logit_divergence, call_accumulate, call_from_parts, call_gathered_logits;
Call call_causal_conv1d, call_causal_conv1d_update, call_selective_scan, call_selective_state_update,
    call_mamba_chunk_scan, call_gated_delta_rule, call_mamba_step;
Call call_rms_norm;
Call call_combine, call_largest, call_weighted_sum;

// Ends the process, as the fuzzer expects of a fault, unless a promise is kept.
void require(bool is_kept, const char* promise);

}  // namespace klfast::fuzz
