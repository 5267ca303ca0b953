// The largest value of each row.
#pragma once

#include <cstdint>

#include "core/tiers.h"

namespace klfast {

// x [rows, width], float, width > 0: the values and their columns, of equal ones the first. A NaN counts as larger than
// any number.
struct LargestArgs {
    const float* x;
    std::int64_t rows, width, stride;
    float* value;         // [rows]
    std::int64_t* index;  // [rows]
    int n_threads;
};

void largest(const LargestArgs& args, Tier limit);

}  // namespace klfast
