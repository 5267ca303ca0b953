// Rows of a tensor, weighted and added.
#pragma once

#include <cstdint>

#include "core/tiers.h"
#include "core/tensor_view.h"

namespace klfast {

// out[row] = sum over s < each of weights[row, s] x[place[row, s]]. Products are rounded to out's type, unless weights
// are float, before they are added in float, as separate functions would.
struct WeightedSumArgs {
    View x, weights, out;       // [.., width], [rows, each], [rows, width]; the last dimension contiguous
    const std::int64_t* place;  // [rows, each]: rows of x
    std::int64_t rows, each, width;
    int n_threads;
};

void weighted_sum(const WeightedSumArgs& args, Tier limit);

}  // namespace klfast
