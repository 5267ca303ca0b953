// Root-mean-square normalisation, with an optional gate before it.
#pragma once

#include <cstdint>

#include "core/tiers.h"
#include "core/tensor_view.h"

namespace klfast {

// v = x silu(gate) (or x); out = weight v / sqrt(mean(v^2) + eps), the mean over each group of group_size channels.
struct RmsNormArgs {
    View x, gate, out;  // [rows, rows_inner, channels]
    View weight;        // [channels]; absent: ones
    std::int64_t rows, rows_inner, channels, group_size;
    float eps;
    int n_threads;
};

void rms_norm(const RmsNormArgs& args, Tier limit);

}  // namespace klfast
