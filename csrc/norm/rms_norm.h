// Root-mean-square normalisation, with an optional gate before or after it.
#pragma once

#include <cstdint>

#include "core/tiers.h"
#include "core/tensor_view.h"

namespace klfast {

// v = x act(gate) (or x); out = (weight + weight_offset) v / sqrt(mean(v^2) + eps), the mean over each group of
// group_size channels. If norm_before_gate, v = x and out is multiplied by act(gate). act is silu, or sigmoid.
struct RmsNormArgs {
    View x, gate, out;  // [rows, rows_inner, channels]
    View weight;        // [channels]; absent: ones
    std::int64_t rows, rows_inner, channels, group_size;
    float eps, weight_offset;
    bool norm_before_gate, sigmoid_gate;
    int n_threads;
};

void rms_norm(const RmsNormArgs& args, Tier limit);

}  // namespace klfast
